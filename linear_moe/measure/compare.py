"""One function twice, on the device and in float64 on the CPU: outputs and every gradient, as relative errors."""

import torch

TOLERANCE = 1e-2  # of a result in bfloat16 that is timed
LOSS_SCALE = 64.0  # float16 is trained with one: without it small gradients vanish
# dtype: limits of outputs and states, and of gradients
LIMITS = {torch.float32: (1e-5, 1e-4), torch.float16: (5e-3, 1e-2), torch.bfloat16: (1e-2, 2e-2)}


def outputs_and_gradients(function, inputs, device, per_token=()):
    """({name: float64 tensor on the CPU}, scales): outputs, and every input's gradient "d<name>" times LOSS_SCALE.

    function(inputs, device) returns {name: tensor}. Each output goes its own fixed random way. per_token: names of
    inputs [H] that are the same number for every token: the function gets them as [1, T, H] (of "v"'s T), and their
    gradient's scale is the sum of its terms' absolute values; without that a sum that cancels out would count as wrong.
    """
    leaves, T = dict(inputs), inputs["v"].shape[1] if per_token else 0
    for name in per_token:
        leaves[name] = inputs[name].expand(1, T, -1).contiguous()
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    outputs, noise = function(leaves, device), torch.Generator().manual_seed(0)
    towards = {n: torch.randn(y.shape, generator=noise, dtype=torch.float64).to(device) for n, y in outputs.items()}
    loss = LOSS_SCALE * sum((y.double() * towards[name]).sum() for name, y in outputs.items())
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)))
    scales = {f"d{name}": grads[name].abs().sum((0, 1)) for name in per_token}
    grads |= {name: grads[name].sum((0, 1)) for name in per_token}
    found = outputs | {f"d{name}": grad for name, grad in grads.items()}
    return {name: x.detach().double().cpu() for name, x in found.items()}, scales


def relative_error(x, reference, scale=None):
    """|x - reference| / |scale|, in float64, scale being the reference unless given; inf where only that is zero."""
    x, reference = x.double(), reference.double()
    error, size = (x - reference).norm().item(), (reference if scale is None else scale).norm().item()
    return error / size if size else (0.0 if error == 0 else float("inf"))


def compare(function, exact, inputs, dtype, device, *, wide=(), per_token=(), limits=None):
    """The result of a check: {"ok", "errors" {name: relative error}, "text": what is wrong}.

    function(inputs, device), on the device, and exact(inputs, "cpu"), in float64, both return {name: tensor}. inputs:
    {name: float32 tensor on the CPU}, rounded to dtype for both, but for those named in `wide`: they stay in float32.
    limits: of outputs and of gradients, LIMITS[dtype] unless given. per_token: see outputs_and_gradients.
    """
    inputs = {name: x if name in wide else x.to(dtype) for name, x in inputs.items()}
    given = {name: x.to(device) for name, x in inputs.items()}
    found, _ = outputs_and_gradients(function, given, device)
    expected, scales = outputs_and_gradients(exact, {n: x.double() for n, x in inputs.items()}, "cpu", per_token)
    return verdict(found, expected, limits or LIMITS[dtype], scales)


def verdict(found, expected, limits, scales=None):
    """The result of a check, of {name: tensor}; gradients are those whose name begins with d."""
    errors = {name: relative_error(found[name], x, (scales or {}).get(name)) for name, x in expected.items()}
    limit = {name: limits[name.startswith("d")] for name in errors}
    wrong = {name: error for name, error in errors.items() if not error < limit[name]}  # nan too
    text = ", ".join(f"{name} {error:.1e} (limit {limit[name]:.0e})" for name, error in wrong.items())
    return {"ok": not wrong, "errors": errors, "text": text}
