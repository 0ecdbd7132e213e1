"""The public functions of linear_moe.ops: arguments checked, then handed to the chosen backend.

Shapes: B batch, T tokens, H key heads, HV value heads (a multiple of H; value head h uses key head h // (HV // H)),
K and V channels. N sequences: B, or len(cu_seqlens) - 1 when packed (then B is 1 and cu_seqlens, int32 [N+1] on the
tensors' device, holds every sequence's first row and the end; zero-length sequences are legal). Any T >= 0.
q, k [B, T, H, K]; v [B, T, HV, V]; beta [B, T, HV]; g, the log decay, <= 0: None, [HV], [B, T, HV] or [B, T, HV, K].
States are [N, HV, K, V] float32 (float64 for float64 values); the rules compute in that dtype and return v's dtype.
Everything is differentiable, states and constant decays included.
"""

from contextlib import nullcontext

import torch

from . import chunk, reference
from . import short_conv as conv
from .check import check_backend, check_conv, check_rule, check_step
from .step import RULES
from .step import step as step_torch


def _without_autocast(device_type):
    """The rules choose their own precision; autocast would run their products in bf16."""
    known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else nullcontext()


def linear_attention(
    q, k, v, g=None, *, scale=None, initial_state=None, return_state=False, cu_seqlens=None, backend="auto"
):
    """S_t = Diag(e^g_t) S_{t-1} + k_t v_t^T,  o_t = scale S_t^T q_t (arXiv 2006.16236; decays: 2312.06635, 2405.21060).

    Shapes and dtypes: see the module. scale defaults to K^-1/2. Returns (o [B, T, HV, V], final state or None).
    Raises ValueError for shapes, dtypes, cu_seqlens or a backend that do not fit.
    """
    check_rule("linear_attention", q, k, v, None, g, initial_state, cu_seqlens)
    rule = {"torch": chunk, "reference": reference}[check_backend(backend)].linear_attention
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    with _without_autocast(v.device.type):
        return rule(
            q, k, v, g, scale=scale, initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens
        )


def delta_rule(
    q, k, v, beta, g=None, *, scale=None, initial_state=None, return_state=False, cu_seqlens=None, backend="auto"
):
    """S_t = (I - b_t k_t k_t^T) Diag(e^g_t) S_{t-1} + b_t k_t v_t^T,  o_t = scale S_t^T q_t.

    Without g DeltaNet (arXiv 2406.06484), with g a head Gated DeltaNet (2412.06464), with g a channel KDA (2510.26692).
    Shapes and dtypes: see the module. scale defaults to K^-1/2. Returns (o [B, T, HV, V], final state or None).
    Raises ValueError for shapes, dtypes, cu_seqlens or a backend that do not fit.
    """
    check_rule("delta_rule", q, k, v, beta, g, initial_state, cu_seqlens)
    rule = {"torch": chunk, "reference": reference}[check_backend(backend)].delta_rule
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    with _without_autocast(v.device.type):
        return rule(
            q, k, v, beta, g, scale=scale, initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens
        )


def short_conv(
    x, weight, *, activation="silu", initial_state=None, return_state=False, cu_seqlens=None, backend="auto"
):
    """Causal depthwise convolution: y_t = act(sum_i weight[:, i] x_{t-W+1+i}), never across a sequence's borders.

    x [B, T, D]; weight [D, W], the last column for the current token; activation "silu" or None. The state
    [N, D, W-1], in x's dtype, holds the last W-1 inputs before the sequence, oldest first (None: zeros); a sequence
    shorter than that keeps the end of its old state. Returns (y [B, T, D], state or None), computed in float32
    (float64 for float64 inputs). Raises ValueError for shapes, dtypes, cu_seqlens, activation or a backend that do not
    fit.
    """
    check_conv(x, weight, activation, initial_state, cu_seqlens)
    function = {"torch": conv, "reference": reference}[check_backend(backend)].short_conv
    return function(
        x,
        weight,
        activation=activation,
        initial_state=initial_state,
        return_state=return_state,
        cu_seqlens=cu_seqlens,
    )


def step(rule, state, q, k, v, beta=None, g=None, *, scale=None, backend="auto"):
    """One token of `rule` ("linear_attention" or "delta_rule") for every sequence of a batch, for decoding.

    state [B, HV, K, V]; q, k [B, H, K]; v [B, HV, V]; beta [B, HV] for the delta rule, else None; g None, [HV],
    [B, HV] or [B, HV, K]. Returns (o [B, HV, V] in v's dtype, new state); the given state is left as it is.
    Raises ValueError for an unknown rule, or shapes, dtypes or a backend that do not fit.
    """
    if rule not in RULES:
        raise ValueError(f"step: rule ({rule!r}) must be one of {sorted(RULES)}")
    check_step(rule, state, q, k, v, beta, g)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    if check_backend(backend) == "torch":
        with _without_autocast(v.device.type):
            return step_torch(rule, state, q, k, v, beta, g, scale=scale)
    g = g.unsqueeze(1) if g is not None and g.ndim > 1 else g
    operands = [x.unsqueeze(1) for x in (q, k, v, beta) if x is not None]
    o, state = getattr(reference, rule)(*operands, g, scale=scale, initial_state=state, return_state=True)
    return o.squeeze(1), state
