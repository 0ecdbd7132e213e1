"""The specification: every update rule as a loop over tokens, in any dtype. Slow on purpose; float64 is the oracle.

Shapes are those of linear_moe/ops/api.py, which also checks them: nothing is checked here.
"""

from itertools import pairwise

import torch


def compute_dtype(v):
    """The dtype a rule computes in and keeps its state in: float32, or float64 for float64 inputs."""
    return torch.float64 if v.dtype == torch.float64 else torch.float32


def _expand(q, k, v, g, beta):
    """Compute dtype, one key head per value head, and a decay [B, T, HV, K or 1] whatever the form of g."""
    dtype, (B, T, HV, _) = compute_dtype(v), v.shape
    q, k = (x.to(dtype).repeat_interleave(HV // x.shape[2], dim=2) for x in (q, k))
    g = torch.zeros(HV, dtype=dtype, device=v.device) if g is None else g.to(dtype)
    decay = (g if g.ndim == 4 else g.expand(B, T, HV).unsqueeze(-1)).exp()
    return q, k, v.to(dtype), decay, None if beta is None else beta.to(dtype).unsqueeze(-1)


def _sequences(B, T, cu_seqlens):
    """(row of the batch, first token, end) of every sequence, in the order of the states."""
    if cu_seqlens is None:
        return [(b, 0, T) for b in range(B)]
    ends = cu_seqlens.tolist()
    return [(0, start, end) for start, end in pairwise(ends)]


def _states(k, v, initial_state, count):
    shape = (count, v.shape[2], k.shape[3], v.shape[3])
    return v.new_zeros(shape) if initial_state is None else initial_state.to(v.dtype)


def _gather(outputs, v, states, final, dtype, return_state):
    """Outputs come sequence by sequence, which is token order in both layouts."""
    o = torch.stack(outputs).view(v.shape) if outputs else torch.zeros_like(v)
    return o.to(dtype), (torch.stack(final) if final else states) if return_state else None


def linear_attention(q, k, v, g=None, *, scale=None, initial_state=None, return_state=False, cu_seqlens=None):
    """S_t = Diag(e^g_t) S_{t-1} + k_t v_t^T,  o_t = scale S_t^T q_t (arXiv 2006.16236, 2312.06635)."""
    scale, dtype = k.shape[-1] ** -0.5 if scale is None else scale, v.dtype
    q, k, v, decay, _ = _expand(q, k, v, g, None)
    sequences = _sequences(*v.shape[:2], cu_seqlens)
    states, outputs, final = _states(k, v, initial_state, len(sequences)), [], []
    for S, (b, start, end) in zip(states, sequences):
        for t in range(start, end):
            S = decay[b, t, :, :, None] * S + k[b, t, :, :, None] * v[b, t, :, None, :]
            outputs.append(scale * (S * q[b, t, :, :, None]).sum(-2))
        final.append(S)
    return _gather(outputs, v, states, final, dtype, return_state)


def delta_rule(q, k, v, beta, g=None, *, scale=None, initial_state=None, return_state=False, cu_seqlens=None):
    """S_t = (I - b_t k_t k_t^T) Diag(e^g_t) S_{t-1} + b_t k_t v_t^T,  o_t = scale S_t^T q_t.

    Without g DeltaNet (arXiv 2406.06484), with g a head Gated DeltaNet (2412.06464), with g a channel KDA (2510.26692).
    """
    scale, dtype = k.shape[-1] ** -0.5 if scale is None else scale, v.dtype
    q, k, v, decay, beta = _expand(q, k, v, g, beta)
    sequences = _sequences(*v.shape[:2], cu_seqlens)
    states, outputs, final = _states(k, v, initial_state, len(sequences)), [], []
    for S, (b, start, end) in zip(states, sequences):
        for t in range(start, end):
            S = decay[b, t, :, :, None] * S
            missing = beta[b, t] * (v[b, t] - (S * k[b, t, :, :, None]).sum(-2))
            S = S + k[b, t, :, :, None] * missing[:, None, :]
            outputs.append(scale * (S * q[b, t, :, :, None]).sum(-2))
        final.append(S)
    return _gather(outputs, v, states, final, dtype, return_state)


def short_conv(x, weight, *, activation="silu", initial_state=None, return_state=False, cu_seqlens=None):
    """y_t = act(sum_i weight[:, i] x_{t-W+1+i}), where x before the sequence is its initial state (zeros if None)."""
    dtype, W = compute_dtype(x), weight.shape[1]
    sequences = _sequences(*x.shape[:2], cu_seqlens)
    tails = x.new_zeros(len(sequences), x.shape[2], W - 1) if initial_state is None else initial_state
    outputs, final = [], []
    for tail, (b, start, end) in zip(tails.to(dtype), sequences):
        window = list(tail.unbind(-1))
        for t in range(start, end):
            window.append(x[b, t].to(dtype))
            y = sum(weight[:, i].to(dtype) * window[len(window) - W + i] for i in range(W))
            outputs.append(torch.nn.functional.silu(y) if activation == "silu" else y)
        final.append(torch.stack(window[len(window) - W + 1 :], -1) if W > 1 else tail)
    o = torch.stack(outputs).view(x.shape) if outputs else torch.zeros_like(x)
    return o.to(x.dtype), (torch.stack(final) if final else tails).to(x.dtype) if return_state else None
