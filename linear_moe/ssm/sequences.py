"""Where tokens lie in their sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_positions(B: int, T: int, cu_seqlens: Tensor | None, device) -> Tensor:
    """Each token's place in its own sequence, int64 ``[B, T]``."""
    token = torch.arange(T, device=device)
    if cu_seqlens is None:
        return token.expand(B, T)
    return (token - cu_seqlens.long()[sequence_of(T, cu_seqlens)]).expand(B, T)


def tokens_seen(B: int, T: int, cu_seqlens: Tensor | None, before: Tensor | None, device) -> tuple[Tensor, Tensor]:
    """How many tokens of its sequence came before each token, int64 ``[B, T]``, and of how many each sequence has now
    consisted, int64 ``[N]``, where ``before`` ``[N]`` (None: 0) had been seen earlier."""
    place = sequence_positions(B, T, cu_seqlens, device)
    lengths = torch.full((B,), T, device=device) if cu_seqlens is None else cu_seqlens.diff().long()
    if before is None:
        return place, lengths
    earlier = before[:, None] if cu_seqlens is None else before[sequence_of(T, cu_seqlens)]
    return place + earlier, before + lengths


def sequence_of(T: int, cu_seqlens: Tensor) -> Tensor:
    """Which sequence each of T tokens belongs to; the last where cu_seqlens ends early."""
    token = torch.arange(T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True).clamp(max=len(cu_seqlens) - 2)
