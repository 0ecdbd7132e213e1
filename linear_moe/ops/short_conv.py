"""Causal depthwise convolution over dense or packed sequences, with carried state."""

import torch
from torch.nn.functional import silu

from .reference import compute_dtype
from .take import put, take


def short_conv(x, weight, *, activation="silu", initial_state=None, return_state=False, cu_seqlens=None):
    """See api.short_conv.

    Every sequence is laid out behind its W-1 earlier inputs, so one plain convolution over the whole line serves all;
    the outputs at those W-1 places mix sequences and are never read.
    """
    B, T, D = x.shape
    past = weight.shape[1] - 1
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    tail = x.new_zeros(N, past, D) if initial_state is None else initial_state.to(x.dtype).mT
    if cu_seqlens is None:
        line = torch.cat([tail, x], 1)
        state = line[:, T:].mT
        y = _convolve(line, weight, activation)
        return y, state if return_state else None
    token = torch.arange(T, device=x.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    slot = token + (sequence + 1) * past
    behind = torch.arange(past, device=x.device)
    starts = torch.arange(N, device=x.device) * past
    line = put(x[0], slot, T + N * past) + put(
        tail.flatten(0, 1), (cu_seqlens[:-1, None] + starts[:, None] + behind).flatten(), T + N * past
    )
    y = take(_convolve(line.unsqueeze(0), weight, activation)[0], slot - past).unsqueeze(0)
    state = take(line, (cu_seqlens[1:, None] + starts[:, None] + behind).flatten()).view(N, past, D).mT
    return y, state if return_state else None


def _convolve(line, weight, activation):
    """[B, W-1+T, D] -> [B, T, D]."""
    dtype = compute_dtype(line)
    y = torch.nn.functional.conv1d(line.to(dtype).mT, weight.to(dtype).unsqueeze(1), groups=len(weight)).mT
    return (silu(y) if activation == "silu" else y).to(line.dtype)
