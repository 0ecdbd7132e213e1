"""Saves for the backward what a tensor was made from, instead of the tensor."""

from collections.abc import Callable

import torch
from torch import Tensor


class Recompute(torch.autograd.graph.saved_tensors_hooks):
    """Inside this context, operations that save one of ``made`` save nothing and call for it again in the backward.

    Args:
        made: the tensors not to save, each with the function that makes it again, bit for bit. A view of one, with all
            of its elements in order, counts as it.
    """

    def __init__(self, made: list[tuple[Tensor, Callable[[], Tensor]]]):
        again = {_place(x): function for x, function in made if x.numel()}

        def pack(x: Tensor):
            function = again.get(_place(x)) if x.is_contiguous() else None
            return x if function is None else (function, x.shape)

        def unpack(saved) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            function, shape = saved
            with torch.no_grad():
                return function().view(shape)

        super().__init__(pack, unpack)


def _place(x: Tensor) -> tuple:
    """Where the tensor lies: tensors alive at the same time with equal places are views of the same elements."""
    return x.device, x.data_ptr(), x.numel(), x.dtype
