"""What a segment of a sequence does to any state that enters it, S -> P S + U, chunk-parallel in torch.

U is the state that the segment leaves behind where it begins with zeros. P, its transition, is what becomes of the
identity where nothing is written, v = 0: the columns of a state do not mix, so one walk over [0 | I] with the values
[v | 0] leaves [U | P]. Of an additive rule P is diagonal, and a single column of ones stands for I. There are no
outputs, hence no queries; autograd does the backward. Suffixes and steps: see chunk.py.
"""

import torch
from torch.nn.functional import pad

from . import reference
from .chunk import _decays, _early, _prepare, _products, _walk_attention, _walk_delta, _walk_dplr


def _start(rule, k, v):
    """I [K, K] or its ones [K, 1]."""
    dtype, K = reference.compute_dtype(v), k.shape[-1]
    if rule == "linear_attention":
        return torch.ones(K, 1, dtype=dtype, device=v.device)
    return torch.eye(K, dtype=dtype, device=v.device)


def _prepare_both(rule, k, v, g, beta, cu_seqlens):
    """As _prepare, of the values [v | 0] and the initial states [0 | I]."""
    start = _start(rule, k, v)
    both = pad(v, (0, start.shape[-1]))
    layout, _, k_RCK, both_RCV, g_RCD, beta_RC1, initial = _prepare(None, k, both, g, beta, 1.0, None, cu_seqlens)
    initial[..., v.shape[-1] :] = start
    return layout, k_RCK, both_RCV, g_RCD, beta_RC1, initial


def _split(final, v):
    """[U | P] -> (P, U)."""
    state, transition = final.split([v.shape[-1], final.shape[-1] - v.shape[-1]], -1)
    return transition.contiguous(), state.contiguous()


def linear_attention(k, v, g=None, *, cu_seqlens=None):
    """See api.summary."""
    layout, k_RCK, v_RCV, g_RCD, _, initial = _prepare_both("linear_attention", k, v, g, None, cu_seqlens)
    k_end_RCK, decay_RCD = k_RCK, None
    if g is not None:
        _, decay_RCD, to_end_RCD = _decays(g_RCD)
        k_end_RCK = k_RCK * to_end_RCD
    _, final = _walk_attention(layout, initial, k_end_RCK, v_RCV, decay_RCD, keep=False)
    transition, state = _split(final, v)
    return transition.squeeze(-1), state


def delta_rule(k, v, beta, g=None, *, cu_seqlens=None):
    """See api.summary."""
    layout, k_RCK, v_RCV, g_RCD, beta_RC1, initial = _prepare_both("delta_rule", k, v, g, beta, cu_seqlens)
    (kk_RCC,), (k_end_RCK,), decay_RCD = _products([k_RCK], [k_RCK], g_RCD)
    chunks = kk_RCC, k_RCK, k_end_RCK, v_RCV, beta_RC1, decay_RCD
    _, _, final = _walk_delta(layout, initial, *chunks, keep=False)
    return _split(final, v)


def dplr(k, v, a, b, g, *, cu_seqlens=None):
    """See api.summary."""
    layout, k_RCK, v_RCV, g_RCK, _, initial = _prepare_both("dplr", k, v, g, None, cu_seqlens)
    a_RCK, b_RCK = (layout.pack(x.to(v_RCV.dtype)) for x in (a, b))
    of_early, ends, decay_RCK = _products([_early(a_RCK)], [k_RCK, b_RCK], g_RCK)
    _, _, final = _walk_dplr(layout, initial, of_early, ends, a_RCK, v_RCV, decay_RCK, keep=False)
    return _split(final, v)


def rwkv6(attention, k, v, g, u, *, cu_seqlens=None):
    """See api.summary. `attention` is the summary of linear_attention, of any backend; the bonus u writes nothing."""
    return attention(k, v, g, cu_seqlens=cu_seqlens)


def gsa(attention, k, v, s, g, *, cu_seqlens=None):
    """See api.summary. Both states, the slots' keys and values, decay alike."""
    transition, keys = attention(s, k, g, cu_seqlens=cu_seqlens)
    _, values = attention(s, v, g, cu_seqlens=cu_seqlens)
    return transition, (keys, values)


def loop(rule, k, v, *operands, cu_seqlens=None):
    """The specification for linear_attention, delta_rule and dplr: the loop over tokens, once for U and once for P."""
    rule_of = getattr(reference, rule)
    options = {"scale": 1.0, "return_state": True, "cu_seqlens": cu_seqlens}
    _, state = rule_of(k, k, v, *operands, **options)
    start = _start(rule, k, v)
    nothing = v.new_zeros(*v.shape[:3], start.shape[-1])
    initial = start.expand(*state.shape[:2], *start.shape)
    _, transition = rule_of(k, k, nothing, *operands, initial_state=initial, **options)
    return transition.squeeze(-1) if rule == "linear_attention" else transition, state


def apply_summary(transition, state, initial):
    """See api.apply_summary."""
    if isinstance(state, tuple):
        return tuple(apply_summary(transition, *pair) for pair in zip(state, initial, strict=True))
    moved = transition.unsqueeze(-1) * initial if transition.ndim == 3 else transition @ initial
    return moved + state


def compose_summaries(second, first):
    """See api.compose_summaries."""
    transition, state = first
    product = second[0] * transition if transition.ndim == 3 else second[0] @ transition
    return product, apply_summary(*second, state)
