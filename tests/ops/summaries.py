"""Inputs of ops.summary, drawn fresh; its results and their gradients, and the same by definition."""

import pytest
import torch

from linear_moe import ops
from tests.ops import cases, composed

ORDER = {  # of every rule's operands
    "linear_attention": ("q", "k", "v", "g"),
    "delta_rule": ("q", "k", "v", "beta", "g"),
    "dplr": ("q", "k", "v", "a", "b", "g"),
    "rwkv6": ("q", "k", "v", "g", "u"),
    "gsa": ("q", "k", "v", "s", "g"),
}
SUMMARISED = [(rule, decay) for rule in ("linear_attention", "delta_rule") for decay in cases.DECAYS]
SUMMARISED += [(rule, "channel") for rule in ("dplr", "rwkv6", "gsa")]
every_rule = pytest.mark.parametrize("rule, decay", SUMMARISED, ids=["-".join(case) for case in SUMMARISED])


def inputs(rule, decay, B, T, cu_seqlens=None, *, strong=False, **options):
    """{name: float64 tensor} of a rule's operands, and the state that enters."""
    if rule in composed.RULES:
        return composed.inputs(rule, B, T, cu_seqlens, strong=strong)
    return cases.inputs(rule, decay, B, T, cu_seqlens, strong=strong, **options)


def one_state(state):
    """gsa's two as one."""
    return torch.cat(state, -1) if isinstance(state, tuple) else state


def summary_of(rule, x, **options):
    """(transition, state) of the op."""
    return ops.summary(rule, *(x.get(name) for name in ORDER[rule]), **options)


def summary_by_loop(rule, x, cu_seqlens=None):
    """The same by definition: the rule's loop from zeros; the loop on the identity where nothing is written."""
    options = {"return_state": True, "backend": "reference", "cu_seqlens": cu_seqlens}
    x = {name: tensor for name, tensor in x.items() if name != "initial_state"}
    _, state = getattr(ops, rule)(**x, **options)
    if rule in ("delta_rule", "dplr"):
        K, nothing = x["k"].shape[-1], x["v"].new_zeros(*x["v"].shape[:3], x["k"].shape[-1])
        identity = torch.eye(K).to(x["v"]).expand(*state.shape[:2], K, K)
        _, transition = getattr(ops, rule)(**x | {"v": nothing}, initial_state=identity, **options)
        return transition, state
    (B, T, HV), K = x["v"].shape[:3], (x["s"] if rule == "gsa" else x["k"]).shape[-1]
    g = x.get("g", torch.zeros(HV).to(x["v"]))
    g = (g if g.ndim == 4 else g.expand(B, T, HV).unsqueeze(-1)).expand(B, T, HV, K)
    lengths = [T] * B if cu_seqlens is None else cu_seqlens.diff().tolist()
    segments = g.flatten(0, 1).split(lengths) if lengths else ()
    whole = [segment.sum(0).exp() for segment in segments]
    return torch.stack(whole) if whole else g.new_zeros(0, HV, K), one_state(state)


def results(function, rule, x, dtype=torch.float64, **options):
    """{name: tensor} of both results and the gradients of one random direction of them."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    narrow = {*cases.VECTORS, *composed.IN_DTYPE} - {"g"}
    x = {name: tensor.to(dtype if name in narrow else wide) for name, tensor in x.items() if name != "initial_state"}
    x = {name: tensor.requires_grad_(name not in ("q", "u")) for name, tensor in x.items()}
    transition, state = function(rule, x, **options)
    state, noise = one_state(state), torch.Generator().manual_seed(0)
    assert transition.dtype == state.dtype == wide and transition.is_contiguous() and state.is_contiguous()
    direction = [torch.randn(y.shape, generator=noise, dtype=torch.float64) for y in (transition, state)]
    loss = (transition.double() * direction[0]).sum() + (state.double() * direction[1]).sum()
    leaves = {name: tensor for name, tensor in x.items() if tensor.requires_grad}
    loss = loss + 0 * sum(tensor.double().sum() for tensor in leaves.values())  # without tokens nothing else is in it
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return {"transition": transition, "state": state} | {f"d{name}": grad for name, grad in zip(leaves, grads)}
