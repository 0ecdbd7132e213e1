"""Inputs of the update rules, drawn fresh, and the comparisons that both rules go through."""

import torch
from torch.nn.functional import normalize

from linear_moe import ops
from tests.helpers import rel_err

DECAYS = ("none", "constant", "scalar", "channel")
LENGTHS = (0, 1, 63, 64, 65, 130)
PACKED = {
    "packed": [0, 63, 64, 129],
    "packed-empty-sequences": [0, 0, 65, 66, 66, 131, 131],
    "packed-all-empty": [0, 0, 0],
    "packed-no-sequence": [0],
}
H, HV, K, V = 2, 4, 8, 12
VECTORS = ("q", "k", "v", "a", "b")  # operands that share a dtype


def layouts(lengths=LENGTHS, packed=PACKED):
    """{id: (B, T, cu_seqlens or None)}: dense and packed."""
    dense = {f"T{T}": (2, T, None) for T in lengths}
    return dense | {name: (1, ends[-1], torch.tensor(ends, dtype=torch.int32)) for name, ends in packed.items()}


def inputs(rule, decay, B, T, cu_seqlens=None, *, heads=HV, strong=True):
    """{name: float64 tensor} of a rule's differentiable operands. Strong decays mix up to -50 with about -0.1."""
    heads = H if rule == "dplr" else heads  # its heads are not grouped
    shapes = {"constant": (heads,), "scalar": (B, T, heads), "channel": (B, T, heads, K)}
    x = {
        "q": torch.randn(B, T, H, K),
        "k": normalize(torch.randn(B, T, H, K), dim=-1),
        "v": torch.randn(B, T, heads, V),
    }
    if rule == "delta_rule":
        x["beta"] = torch.rand(B, T, heads)
    if rule == "dplr":  # as RWKV-7 draws them: otherwise the state explodes
        x["a"] = -normalize(torch.randn(B, T, heads, K), dim=-1)
        x["b"] = -torch.rand(B, T, heads, K) * x["a"]
    if decay != "none":
        g = -0.2 * torch.rand(shapes[decay])
        x["g"] = torch.where(torch.rand(shapes[decay]) < 0.1, 250 * g, g) if strong else g
    x["initial_state"] = torch.randn(B if cu_seqlens is None else len(cu_seqlens) - 1, heads, K, V)
    return {name: tensor.double() for name, tensor in x.items()}


def run(rule, x, dtype=torch.float64, **options):
    """`results` of a rule with its vectors in dtype; gates and states too, but never in less than float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = {name: tensor.to(dtype if name in VECTORS else wide) for name, tensor in x.items()}
    return results(getattr(ops, rule), x, **options)


def results(function, x, **options):
    """{name: tensor} of a function's output, final state and every gradient, all for one cotangent."""
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}
    o, state = function(**x, return_state=True, **options)
    noise = torch.Generator().manual_seed(0)
    loss = sum((y.double() * torch.randn(y.shape, generator=noise, dtype=torch.float64)).sum() for y in (o, state))
    grads = torch.autograd.grad(loss, list(x.values()), materialize_grads=True)
    return {"o": o, "state": state} | {f"d{name}": grad for name, grad in zip(x, grads)}


def assert_close(result, reference, forward, gradient, scales=None):
    """Relative errors below `forward` for outputs and states, below `gradient` for gradients; all finite.

    scales: {name: what the error is measured against}, where that is not the reference itself.
    """
    assert result.keys() == reference.keys()
    assert all(y.isfinite().all() for y in result.values()), "nan or inf"
    found = {name: rel_err(result[name], reference[name], (scales or {}).get(name)) for name in reference}
    limits = {name: forward if name in ("o", "state", "transition") else gradient for name in found}
    wrong = {name: f"{error:.1e}" for name, error in found.items() if not error < limits[name]}
    assert not wrong, f"relative errors (forward < {forward:.0e}, gradients < {gradient:.0e}): {wrong}"


def terms_of_constant_decay(rule, x, cu_seqlens=None):
    """[H], the sum of the absolute values of a constant decay's gradients of single tokens.

    The gradient is their sum. Where that cancels out, half precision leaves nothing of it but the terms' rounding.
    """
    B, T = x["v"].shape[:2]
    per_token = x | {"g": x["g"].expand(B, T, -1)}
    return run(rule, per_token, backend="reference", cu_seqlens=cu_seqlens)["dg"].abs().sum((0, 1))


def assert_matches_loop(rule, x, cu_seqlens=None):
    """The chunked rule against the loop in float64, itself in float64 and in float32."""
    reference = run(rule, x, backend="reference", cu_seqlens=cu_seqlens)
    assert_close(run(rule, x, backend="torch", cu_seqlens=cu_seqlens), reference, 1e-12, 1e-12)
    assert_close(run(rule, x, torch.float32, backend="torch", cu_seqlens=cu_seqlens), reference, 1e-5, 1e-4)


def assert_bf16(rule, x):
    """bf16 operands against the loop in float64 on the same rounded operands."""
    x |= {name: x[name].bfloat16().double() for name in VECTORS if name in x}
    assert_close(run(rule, x, torch.bfloat16), run(rule, x, backend="reference"), 1e-2, 1e-2)


def gradcheck(rule, x, cu_seqlens=None):
    def function(*tensors):
        return getattr(ops, rule)(**dict(zip(x, tensors)), return_state=True, cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in x.values()], fast_mode=True)


def assert_causal(function, x, tokens, cuts):
    """For every (outputs, inputs) of cuts, slices of tokens: those outputs have exactly zero gradient to those inputs.

    `tokens` names the tensors of x that have tokens in their second dimension.
    """
    x = {name: tensor.float().requires_grad_() for name, tensor in x.items()}
    o = function(**x)
    for read, hidden in cuts:
        part = o[:, read]
        grads = torch.autograd.grad((part * torch.randn_like(part)).sum(), list(x.values()), retain_graph=True)
        for name, grad in zip(x, grads):
            assert grad.isfinite().all(), f"gradient of {name}"
            if name in tokens:
                assert (grad[:, hidden] == 0).all(), f"o[{read}] depends on {name}[{hidden}]"


def assert_rule_causal(rule, decay):
    """Exact causality, dense (later tokens) and packed (later tokens and other sequences)."""
    tokens = {*VECTORS, "beta"} | ({"g"} if decay in ("scalar", "channel") else set())

    def dense(**x):
        return getattr(ops, rule)(**x)[0]

    cuts = [(slice(0, t), slice(t, None)) for t in (1, 16, 30, 31, 60)]
    assert_causal(dense, inputs(rule, decay, 2, 70), tokens, cuts)
    cu_seqlens = torch.tensor([0, 33, 33, 50, 90], dtype=torch.int32)

    def packed(**x):
        return getattr(ops, rule)(**x, cu_seqlens=cu_seqlens)[0]

    cuts = [(slice(33, 40), hidden) for hidden in (slice(0, 33), slice(40, None))]
    cuts += [(slice(0, 33), slice(33, None)), (slice(50, 90), slice(0, 50))]
    assert_causal(packed, inputs(rule, decay, 1, 90, cu_seqlens), tokens, cuts)
