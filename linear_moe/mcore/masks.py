"""What a model is called with beside its tokens, made into what layers use: masks, packs, and which tokens count."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from linear_moe.ops.check import check_cu_seqlens
from linear_moe.ops.sequences import sequence_of


def packed_cu_seqlens(packed_seq_params, x: Tensor) -> Tensor | None:
    """Borders of the packed sequences, int32 ``[N + 1]``, padding included; None when not packed.

    x: ``[b, s, ...]``, what is packed.

    Raises:
        ValueError: borders that do not run from 0 to s, or a batch of more than one (see ops.check_cu_seqlens).
    """
    if packed_seq_params is None:
        return None
    padded = packed_seq_params.cu_seqlens_q_padded
    cu_seqlens = (packed_seq_params.cu_seqlens_q if padded is None else padded).int()
    check_cu_seqlens("packed sequences", cu_seqlens, *x.shape[:2], x.device)
    return cu_seqlens


def padding_tokens(
    padding_mask: Tensor | None, packed_seq_params, shape: tuple[int, int], sequence_parallel_group=None
) -> Tensor | None:
    """Which tokens are padding, bool ``[b, s]``; None where nothing says so.

    Args:
        padding_mask: Megatron's, ``[b, s]``, True for padding. packed_seq_params: padding lies between the real and
            the padded end of a sequence. shape: (b, s).
        sequence_parallel_group: the ranks over which the first pipeline stage, but no other, has cut padding_mask.

    Raises:
        ValueError: a mask of another shape.
    """
    found = None
    if padding_mask is not None:
        found = padding_mask.bool()
        if sequence_parallel_group is not None and found.shape[-1] < shape[1]:
            part = found.T.int()  # not every backend gathers booleans
            found = gather_from_sequence_parallel_region(part, group=sequence_parallel_group).T.bool()
        if found.shape != shape:
            raise ValueError(f"padding_mask must be [b, s] = {[*shape]}, but is {[*padding_mask.shape]}")
    real = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q
    padded = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q_padded
    if padded is not None and padded is not real:
        places = torch.arange(shape[1], device=padded.device)
        owner = sequence_of(shape[1], padded)
        between = (places - padded[owner] >= real.diff()[owner])[None]
        found = between if found is None else found | between
    return found


def require_causal(attention_mask: Tensor) -> None:
    """Refuses a mask that says more than the causal order, which is all that linear layers keep to.

    attention_mask: Megatron's, bool ``[b or 1, 1, s, s]``, True where attention is forbidden. Nothing is read back to
    the host: what the mask holds is asserted on its device.

    Raises:
        ValueError: a mask of another shape.
    """
    s = attention_mask.shape[-1]
    if attention_mask.ndim != 4 or attention_mask.shape[-2] != s:
        raise ValueError(
            f"attention_mask must be [b, 1, s, s], but is {[*attention_mask.shape]}; padding is told by padding_mask"
        )
    causal = torch.ones(s, s, dtype=torch.bool, device=attention_mask.device).triu(1)
    message = "linear mixers keep to the causal order alone, but attention_mask says more: pack documents instead"
    torch._assert_async((attention_mask == causal).all(), message)


def causal_mask(queries: int, keys: int, device) -> Tensor:
    """Bool ``[queries, keys]``, True where attention is allowed: the last query sees the last key.

    Raises:
        ValueError: more queries than keys.
    """
    if queries > keys:
        raise ValueError(f"causal attention needs at least as many keys ({keys}) as queries ({queries})")
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def block_causal_mask(cu_seqlens: Tensor, T: int) -> Tensor:
    """Bool ``[T, T]``: row t may attend to tokens up to t of its own sequence."""
    token = torch.arange(T, device=cu_seqlens.device)
    sequence = sequence_of(T, cu_seqlens)
    return (sequence[:, None] == sequence) & (token[:, None] >= token)
