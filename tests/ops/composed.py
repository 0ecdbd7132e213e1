"""Inputs of the rules of compose.py, drawn fresh, and those rules as functions that cases.py compares."""

import torch

from linear_moe import ops
from tests.ops import cases

TOKENS = {"q", "k", "v", "s", "g"}
IN_DTYPE = {"q", "k", "v", "s"}


def gsa(*, initial_state=None, **x):
    """ops.gsa with its state as one tensor [N, H, M, K + V]."""
    widths = [x["k"].shape[-1], x["v"].shape[-1]]
    state = None if initial_state is None else initial_state.split(widths, -1)
    o, state = ops.gsa(**x, initial_state=state)
    return o, None if state is None else torch.cat(state, -1)


RULES = {"gsa": gsa, "rwkv6": ops.rwkv6}


def inputs(rule, B, T, cu_seqlens=None, *, strong=True, H=2, K=8, V=12, M=10):
    """{name: float64 tensor}. Strong decays mix up to -50 with about -0.1. M: slots."""
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    x = {"q": torch.randn(B, T, H, K), "k": torch.randn(B, T, H, K), "v": torch.randn(B, T, H, V)}
    if rule == "gsa":
        x["s"], x["initial_state"] = torch.rand(B, T, H, M), torch.randn(N, H, M, K + V)
    else:
        x["u"], x["initial_state"] = torch.randn(H, K), torch.randn(N, H, K, V)
    g = -0.2 * torch.rand(B, T, H, M if rule == "gsa" else K)
    x["g"] = torch.where(torch.rand(g.shape) < 0.1, 250 * g, g) if strong else g
    return {name: tensor.double() for name, tensor in x.items()}


def run(rule, x, dtype=torch.float64, **options):
    """`cases.results` with q, k, v, s in dtype; all others too, but never in less than float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = {name: tensor.to(dtype if name in IN_DTYPE else wide) for name, tensor in x.items()}
    return cases.results(RULES[rule], x, **options)


def rounded(x, dtype):
    """In float64, but to the precision in which `run` takes them."""
    return {name: t.to(dtype if name in IN_DTYPE else torch.float32).double() for name, t in x.items()}
