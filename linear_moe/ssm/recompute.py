"""Saves for the backward what a tensor was made from, instead of the tensor."""

from collections.abc import Callable

import torch
from torch import Tensor


class Recompute(torch.autograd.graph.saved_tensors_hooks):
    """Inside this context, operations that save one of ``made`` save nothing and call for it again in the backward.

    Of nested hooks autograd runs the innermost only, so inside torch.utils.checkpoint(use_reentrant=False) this one
    recomputes on its own; and what is saved is not watched for changes in place.

    Args:
        made: the tensors not to save, each with the function that makes it again, bit for bit. A view of one, with all
            of its elements in order, counts as it.
    """

    def __init__(self, made: list[tuple[Tensor, Callable[[], Tensor]]]):
        again = {_place(x): function for x, function in made if x.numel()}

        def pack(x: Tensor):
            function = again.get(_place(x)) if x.is_contiguous() else None
            # Detached: an operation's own output would hold the graph that holds it.
            return x.detach() if function is None else (function, x.shape)

        def unpack(saved) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            function, shape = saved
            with torch.no_grad():
                return function().view(shape)

        super().__init__(pack, unpack)


def _place(x: Tensor) -> tuple:
    """Where the tensor lies: tensors alive at the same time with equal places are views of the same elements."""
    return x.untyped_storage()._cdata, x.storage_offset(), x.numel(), x.dtype
