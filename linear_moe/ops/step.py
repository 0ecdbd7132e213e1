"""One token of every rule in torch: two or three passes over the states, no loop over tokens or rows.

Each function takes (state, the rule's operands without T) in the dtype it computes in, as many key heads as value
heads, and returns (o, new state). Shapes: see decoding.py.
"""

import torch

from .reference import compute_dtype, norm_loss_gradient


def step(rule, state, operands, **options):
    """See decoding.step."""
    q, k, v, *gates = operands
    compute, groups = compute_dtype(v), v.shape[1] // k.shape[1]
    operands = q.repeat_interleave(groups, 1), k.repeat_interleave(groups, 1), v, *gates
    operands = [None if x is None else x.to(compute) for x in operands]
    state = tuple(x.to(compute) for x in state) if isinstance(state, tuple) else state.to(compute)
    o, state = RULES[rule](state, *operands, **options)
    return o.to(v.dtype), state


def linear_attention(S, q, k, v, g, *, scale):
    S = _decayed(S, g) + _outer(k, v)
    return scale * _read(S, q), S


def delta_rule(S, q, k, v, beta, g, *, scale):
    S = _decayed(S, g)
    S = S + _outer(k, beta.unsqueeze(-1) * (v - _read(S, k)))
    return scale * _read(S, q), S


def dplr(S, q, k, v, a, b, g, *, scale):
    S = _decayed(S, g) + _outer(b, _read(S, a)) + _outer(k, v)
    return scale * _read(S, q), S


def rwkv6(S, q, k, v, g, u, *, scale):
    bonus = (q * u * k).sum(-1, keepdim=True) * v
    return scale * (_read(S, q) + bonus), _decayed(S, g) + _outer(k, v)


def gsa(state, q, k, v, s, g, *, scale):
    keys, values = (_decayed(S, g) + _outer(s, x) for S, x in zip(state, (k, v)))
    p = (scale * _read(keys.mT, q)).softmax(-1)
    return _read(values, p), (keys, values)


def ttt_linear(state, q, k, v, eta, token_scale, weight, bias, *, scale, eps, mini_batch, offset):
    W, acc = state.unbind(2)
    one = torch.ones_like(k[..., :1])
    key, query = torch.cat([k, one], -1), torch.cat([scale * q, one], -1)
    grad = norm_loss_gradient(_read(W, key), v - k, weight, bias, eps)
    acc = acc + _outer(key, eta.unsqueeze(-1) * grad)
    moved = W - (acc if token_scale is None else token_scale[..., None, None] * acc)
    complete = _completes(offset, mini_batch, W)
    after = torch.where(complete, moved, W), torch.where(complete, 0, acc)
    return _read(moved, query), torch.stack(after, 2)


def titans_linear(state, q, k, v, theta, g, m, *, scale, mini_batch, offset):
    S_0, S, Z = state.unbind(2)
    Z = _decayed(Z, m) + _outer(k, theta.unsqueeze(-1) * (v - _read(S_0, k)))
    S = _decayed(S, g) + Z
    S_0 = torch.where(_completes(offset, mini_batch, S), S, S_0)
    return scale * _read(S, q), torch.stack([S_0, S, Z], 2)


RULES = {
    function.__name__: function
    for function in (linear_attention, delta_rule, dplr, rwkv6, gsa, ttt_linear, titans_linear)
}


def _outer(x, y):
    return x.unsqueeze(-1) * y.unsqueeze(-2)


def _read(S, x):
    """S^T x: [R, H, K, V] and [R, H, K] -> [R, H, V]."""
    return (x.unsqueeze(-2) @ S).squeeze(-2)


def _decayed(S, g):
    """Diag(e^g) S. g: None, [HV], [R, HV] or, a channel of S's, [R, HV, K]."""
    if g is None:
        return S
    g = g if g.ndim == 3 else g.unsqueeze(-1)
    return g.exp().unsqueeze(-1) * S


def _completes(offset, mini_batch, S):
    """[R, 1, 1, 1]: whether this token is the last of its mini-batch. offset: [R], None for zeros."""
    seen = S.new_zeros(len(S), dtype=torch.int32) if offset is None else offset
    return (seen + 1 == mini_batch).view(-1, 1, 1, 1)
