"""Inputs of the rules of compose.py, drawn fresh, and those rules as functions that cases.py compares."""

import torch

from linear_moe import ops
from tests.ops import cases

H, K, V, SLOTS = 2, 8, 12, 10
TOKENS = {"q", "k", "v", "s", "g"}
IN_DTYPE = {"q", "k", "v", "s"}


def gsa(*, keys=None, values=None, return_state=False, **x):
    """ops.gsa whose state is given as two operands and returned as one tensor [N, H, M, K + V]."""
    initial = None if keys is None else (keys, values)
    o, state = ops.gsa(**x, initial_state=initial, return_state=return_state)
    return o, None if state is None else torch.cat(state, -1)


RULES = {"gsa": gsa, "rwkv6": ops.rwkv6}


def inputs(rule, B, T, cu_seqlens=None, *, strong=True):
    """{name: float64 tensor}. Strong decays mix up to -50 with about -0.1."""
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    x = {"q": torch.randn(B, T, H, K), "k": torch.randn(B, T, H, K), "v": torch.randn(B, T, H, V)}
    if rule == "gsa":
        x["s"] = torch.rand(B, T, H, SLOTS)
        states = {"keys": torch.randn(N, H, SLOTS, K), "values": torch.randn(N, H, SLOTS, V)}
    else:
        x["u"] = torch.randn(H, K)
        states = {"initial_state": torch.randn(N, H, K, V)}
    g = -0.2 * torch.rand(B, T, H, SLOTS if rule == "gsa" else K)
    x["g"] = torch.where(torch.rand(g.shape) < 0.1, 250 * g, g) if strong else g
    return {name: tensor.double() for name, tensor in (x | states).items()}


def run(rule, x, dtype=torch.float64, **options):
    """`cases.results` with q, k, v, s in dtype; all others too, but never in less than float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = {name: tensor.to(dtype if name in IN_DTYPE else wide) for name, tensor in x.items()}
    return cases.results(RULES[rule], x, **options)


def rounded(x, dtype):
    """In float64, but to the precision in which `run` takes them."""
    return {name: t.to(dtype if name in IN_DTYPE else torch.float32).double() for name, t in x.items()}


def assert_causal(rule, **options):
    """Exact causality, dense (later tokens) and packed (later tokens and other sequences)."""

    def function(cu_seqlens):
        return lambda **x: RULES[rule](**x, cu_seqlens=cu_seqlens, **options)[0]

    cuts = [(slice(0, t), slice(t, None)) for t in (1, 30, 33, 64)]
    cases.assert_causal(function(None), inputs(rule, 2, 70), TOKENS, cuts)
    cu_seqlens = torch.tensor([0, 33, 33, 50, 90], dtype=torch.int32)
    cuts = [(slice(33, 40), hidden) for hidden in (slice(0, 33), slice(40, None))]
    cuts += [(slice(0, 33), slice(33, None)), (slice(50, 90), slice(0, 50))]
    cases.assert_causal(function(cu_seqlens), inputs(rule, 1, 90, cu_seqlens), TOKENS, cuts)
