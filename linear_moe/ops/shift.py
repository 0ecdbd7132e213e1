"""The token before each one, inside dense or packed sequences."""

import torch

from .check import check_shift
from .sequences import sequence_of
from .take import take


def token_shift(x, *, initial_state=None, return_state=False, cu_seqlens=None):
    """x [B, T, D] -> what its sequence held one token earlier [B, T, D] (RWKV's token shift, arXiv 2305.13048).

    At a sequence's first token that is its initial state [N, D] (None: zeros); N sequences, dense or packed as in
    linear_moe/ops/api.py. The state is every sequence's last token [N, D], its initial one where it is empty, in x's
    dtype. Returns (shifted, state or None). Differentiable. Raises ValueError for shapes, dtypes or cu_seqlens that do
    not fit.
    """
    N = check_shift(x, initial_state, cu_seqlens)
    _, T, D = x.shape
    state = x.new_zeros(N, D) if initial_state is None else initial_state.to(x.dtype)
    if cu_seqlens is None:
        line = torch.cat([state.unsqueeze(1), x], 1)
        return line[:, :T], line[:, T] if return_state else None
    cu_seqlens = cu_seqlens.int()
    line = torch.cat([x[0], state])  # no row of it is taken twice
    token = torch.arange(T, device=x.device, dtype=cu_seqlens.dtype)
    sequence = sequence_of(T, cu_seqlens)
    previous = torch.where(token == cu_seqlens[sequence], T + sequence, token - 1)
    if return_state:
        own = T + torch.arange(N, device=x.device)
        state = take(line, torch.where(cu_seqlens.diff() == 0, own, cu_seqlens[1:] - 1))
    return take(line, previous).unsqueeze(0), state if return_state else None
