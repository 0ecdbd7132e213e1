"""Causal depthwise convolution over dense or packed sequences, with carried state."""

import torch
from torch.nn.functional import silu

from .reference import compute_dtype
from .sequences import sequence_of
from .take import put, take


def short_conv(x, weight, *, activation="silu", initial_state=None, return_state=False, cu_seqlens=None):
    """See api.short_conv.

    Every sequence is laid out behind its W-1 earlier inputs, so one plain convolution over the whole line serves all;
    what it gives at those W-1 places mixes sequences and is never read.
    """
    T, D, past = x.shape[1], x.shape[2], weight.shape[1] - 1
    N = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
    tail = x.new_zeros(N, past, D) if initial_state is None else initial_state.to(x.dtype).mT
    if cu_seqlens is None:
        line = torch.cat([tail, x], 1)
        y, state = _convolve(line, weight, activation), line[:, T:]
    else:
        slot, first, last = _places(cu_seqlens, T, past)
        rows = T + N * past
        line = put(x[0], slot, rows) + put(tail.flatten(0, 1), first, rows)
        y = take(_convolve(line.unsqueeze(0), weight, activation)[0], slot - past).unsqueeze(0)
        state = take(line, last).view(N, past, D)
    return y, state.mT if return_state else None


def _places(cu_seqlens, T, past):
    """Where on the line lie the tokens [T], each sequence's earlier inputs [N * past] and its last ones [N * past]."""
    token = torch.arange(T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = sequence_of(T, cu_seqlens)
    shift = past * torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device).unsqueeze(1)
    behind = shift + torch.arange(past, device=cu_seqlens.device)
    first, last = (ends.unsqueeze(1) + behind for ends in (cu_seqlens[:-1], cu_seqlens[1:]))
    return token + past * (sequence + 1), first.flatten(), last.flatten()


def _convolve(line, weight, activation):
    """[B, W-1+T, D] -> [B, T, D]."""
    dtype, W = compute_dtype(line), weight.shape[1]
    T = line.shape[1] - W + 1
    wide, weight = line.to(dtype), weight.to(dtype)
    y = sum(wide[:, i : i + T] * weight[:, i] for i in range(W))
    return (silu(y) if activation == "silu" else y).to(line.dtype)
