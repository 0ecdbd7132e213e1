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


def dplr(q, k, v, a, b, g, *, scale=None, initial_state=None, return_state=False, cu_seqlens=None):
    """S_t = Diag(e^g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,  o_t = scale S_t^T q_t (arXiv 2503.14456)."""
    scale, dtype = k.shape[-1] ** -0.5 if scale is None else scale, v.dtype
    q, k, v, decay, _ = _expand(q, k, v, g, None)
    a, b = a.to(v.dtype), b.to(v.dtype)
    sequences = _sequences(*v.shape[:2], cu_seqlens)
    states, outputs, final = _states(k, v, initial_state, len(sequences)), [], []
    for S, (n, start, end) in zip(states, sequences):
        for t in range(start, end):
            u = (S * a[n, t, :, :, None]).sum(-2)
            S = decay[n, t, :, :, None] * S + b[n, t, :, :, None] * u[:, None, :]
            S = S + k[n, t, :, :, None] * v[n, t, :, None, :]
            outputs.append(scale * (S * q[n, t, :, :, None]).sum(-2))
        final.append(S)
    return _gather(outputs, v, states, final, dtype, return_state)


def norm_loss_gradient(z, target, weight, bias, eps):
    """d/dz 1/2 |LN(z; weight, bias) - target|^2 over the last dimension."""
    z = z - z.mean(-1, keepdim=True)
    rstd = (z.square().mean(-1, keepdim=True) + eps).rsqrt()
    z = z * rstd
    e = weight * (weight * z + bias - target)
    return rstd * (e - e.mean(-1, keepdim=True) - z * (e * z).mean(-1, keepdim=True))


def ttt_linear(
    q, k, v, eta, token_scale, weight, bias, *,
    eps=1e-6, scale=None, mini_batch=16, initial_state=None, offset=None, return_state=False, cu_seqlens=None,
):  # fmt: skip
    """acc_t = acc_(t-1) + eta_t [k_t, 1] grad_t^T,  o_t = (W_0 - s_t acc_t)^T [scale q_t, 1] with s = token_scale and
    grad_t the gradient at z = W_0^T [k_t, 1] of 1/2 |LN(z) - (v_t - k_t)|^2; a mini-batch's last token moves W_0 to
    W_0 - s_t acc_t, and acc to 0 (arXiv 2407.04620)."""
    scale, dtype, (H, D) = k.shape[-1] ** -0.5 if scale is None else scale, v.dtype, v.shape[2:]
    q, k, v, eta, weight, bias = (x.to(compute_dtype(v)) for x in (q, k, v, eta, weight, bias))
    step = (torch.ones_like(eta) if token_scale is None else token_scale.to(v.dtype))[..., None, None]
    sequences, one = _sequences(*v.shape[:2], cu_seqlens), v.new_ones(H, 1)
    states = v.new_zeros(len(sequences), H, 2, D + 1, D) if initial_state is None else initial_state.to(v.dtype)
    seen, outputs, final = [0] * len(sequences) if offset is None else offset.tolist(), [], []
    for state, past, (b, start, end) in zip(states, seen, sequences):
        W, acc = state.unbind(1)
        for t in range(start, end):
            key, query = torch.cat([k[b, t], one], -1), torch.cat([scale * q[b, t], one], -1)
            z = (W * key[:, :, None]).sum(-2)
            grad = norm_loss_gradient(z, v[b, t] - k[b, t], weight, bias, eps)
            acc = acc + eta[b, t, :, None, None] * key[:, :, None] * grad[:, None, :]
            moved = W - step[b, t] * acc
            outputs.append((moved * query[:, :, None]).sum(-2))
            if (past + t - start + 1) % mini_batch == 0:
                W, acc = moved, torch.zeros_like(acc)
        final.append(torch.stack([W, acc], 1))
    return _gather(outputs, v, states, final, dtype, return_state)


def titans_linear(
    q, k, v, theta, g, m, *,
    scale=None, mini_batch=16, initial_state=None, offset=None, return_state=False, cu_seqlens=None,
):  # fmt: skip
    """Z_t = e^m_t Z_(t-1) - theta_t k_t (S_0^T k_t - v_t)^T,  S_t = e^g_t S_(t-1) + Z_t,  o_t = scale S_t^T q_t,
    where S_0 is the S with which the mini-batch begins (arXiv 2501.00663)."""
    scale, dtype, (H, V), K = k.shape[-1] ** -0.5 if scale is None else scale, v.dtype, v.shape[2:], k.shape[-1]
    q, k, v, theta, g, m = (x.to(compute_dtype(v)) for x in (q, k, v, theta, g, m))
    keep, momentum = g.exp()[..., None, None], m.exp()[..., None, None]
    sequences = _sequences(*v.shape[:2], cu_seqlens)
    states = v.new_zeros(len(sequences), H, 3, K, V) if initial_state is None else initial_state.to(v.dtype)
    seen, outputs, final = [0] * len(sequences) if offset is None else offset.tolist(), [], []
    for state, past, (b, start, end) in zip(states, seen, sequences):
        S_0, S, Z = state.unbind(1)
        for t in range(start, end):
            missing = theta[b, t, :, None] * (v[b, t] - (S_0 * k[b, t, :, :, None]).sum(-2))
            Z = momentum[b, t] * Z + k[b, t, :, :, None] * missing[:, None, :]
            S = keep[b, t] * S + Z
            outputs.append(scale * (S * q[b, t, :, :, None]).sum(-2))
            if (past + t - start + 1) % mini_batch == 0:
                S_0 = S
        final.append(torch.stack([S_0, S, Z], 1))
    return _gather(outputs, v, states, final, dtype, return_state)


def rwkv6(q, k, v, g, u, *, scale=None, initial_state=None, return_state=False, cu_seqlens=None):
    """S_t = Diag(e^g_t) S_{t-1} + k_t v_t^T,  o_t = scale (S_{t-1} + (u * k_t) v_t^T)^T q_t (arXiv 2404.05892)."""
    scale, dtype = k.shape[-1] ** -0.5 if scale is None else scale, v.dtype
    q, k, v, decay, _ = _expand(q, k, v, g, None)
    u = u.to(v.dtype)
    sequences = _sequences(*v.shape[:2], cu_seqlens)
    states, outputs, final = _states(k, v, initial_state, len(sequences)), [], []
    for S, (b, start, end) in zip(states, sequences):
        for t in range(start, end):
            write = k[b, t, :, :, None] * v[b, t, :, None, :]
            outputs.append(scale * ((S + u[..., None] * write) * q[b, t, :, :, None]).sum(-2))
            S = decay[b, t, :, :, None] * S + write
        final.append(S)
    return _gather(outputs, v, states, final, dtype, return_state)


def gsa(q, k, v, s, g, *, scale=None, initial_state=None, return_state=False, cu_seqlens=None):
    """Slots' keys Kt = Diag(e^g_t) Kt + s_t k_t^T and values Vt, likewise,  o_t = Vt^T softmax(scale Kt q_t)
    (arXiv 2409.07146). The state is (Kt, Vt)."""
    scale, dtype = k.shape[-1] ** -0.5 if scale is None else scale, v.dtype
    q, k, v, s, g = (x.to(compute_dtype(v)) for x in (q, k, v, s, g))
    decay = g.exp()
    sequences = _sequences(*v.shape[:2], cu_seqlens)
    initial_keys, initial_values = (None, None) if initial_state is None else initial_state
    states = [_states(s, x, initial, len(sequences)) for x, initial in ((k, initial_keys), (v, initial_values))]
    outputs, final = [], [[], []]
    for keys, values, (b, start, end) in zip(*states, sequences):
        for t in range(start, end):
            keys = decay[b, t, :, :, None] * keys + s[b, t, :, :, None] * k[b, t, :, None, :]
            values = decay[b, t, :, :, None] * values + s[b, t, :, :, None] * v[b, t, :, None, :]
            p = (scale * (keys * q[b, t, :, None, :]).sum(-1)).softmax(-1)
            outputs.append((values * p[..., None]).sum(-2))
        final[0].append(keys)
        final[1].append(values)
    o, values = _gather(outputs, v, states[1], final[1], dtype, return_state)
    return o, (torch.stack(final[0]) if sequences else states[0], values) if return_state else None


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


def token_shift(x, *, initial_state=None, return_state=False, cu_seqlens=None):
    """The token before each one in its sequence; before the first that is the initial state (zeros if None)."""
    sequences = _sequences(*x.shape[:2], cu_seqlens)
    states = x.new_zeros(len(sequences), x.shape[2]) if initial_state is None else initial_state.to(x.dtype)
    outputs, final = [], []
    for previous, (b, start, end) in zip(states, sequences):
        for t in range(start, end):
            outputs.append(previous)
            previous = x[b, t]
        final.append(previous)
    return _gather(outputs, x, states, final, x.dtype, return_state)
