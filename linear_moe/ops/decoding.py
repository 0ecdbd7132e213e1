"""One token at a time: the rules, the convolution and the token shift of api.py and shift.py, for decoding.

R rows, one token each. A state belongs to a row; or, with `slots`, it is a store of S states, any number, of which row
r reads and writes entry slots[r] in place: nothing else of it is read, copied or written, and what is returned is the
store itself. So one token of Mixture-of-Memories costs its routed buckets alone. slots int32 or int64 [R], distinct
(which is not checked), on the tensors' device; as for cu_seqlens, values that do not fit are a ValueError on a CPU and
an assertion on a GPU, where nothing is read back. A store is contiguous and has no backward.
"""

import torch
from torch.nn.functional import silu

from . import norm, online, reference
from .backend import choose_backend, kernels, without_autocast
from .check_step import OPERANDS, check_conv_step, check_shift_step, check_step, refuse_gradients, with_defaults
from .step import step as step_torch


def step(
    rule, state, *operands,
    scale=None, eps=None, mini_batch=None, offset=None, slots=None, backend="auto",
):  # fmt: skip
    """One token of `rule`, the name of a function of api.py, in each of R rows.

    operands: that function's, in its order, without the dimension T: [R, H, K] for [B, T, H, K]; what is a head's (a
    constant g [HV], u, weight, bias) as it is; a None at the end may be left out. Options, and their defaults, are its
    own too: eps is one of ttt_linear; mini_batch and offset, int32 or int64 [R] or with slots [S], which step reads and
    leaves as it is, are of ttt_linear and titans_linear. state: what that function takes and returns, float32 (float64
    for float64 values), [R, ...] or with slots [S, ...]; for gsa a tuple of two.

    Returns (o [R, HV, V] in v's dtype, state): without slots a new one, the given one left as it is, else the store.
    Without slots the torch form is differentiable; the kernels are not, and "auto" leaves to torch what is
    differentiated. Raises ValueError for an unknown rule, operands, options or slots that do not fit, gradients of a
    store, or a backend that cannot run.
    """
    operands, options = with_defaults(rule, operands, eps=eps, mini_batch=mini_batch, offset=offset)
    check_step(rule, state, operands, slots, **options)
    k, v = operands[1:3]
    tensors = [x for x in (*operands, *_parts(state)) if x is not None]
    refuse_gradients(rule, tensors, slots)
    obstacle = _obstacle(rule, k, v, tensors)
    backend = choose_backend("step", backend, v, k.shape[-1], v.shape[-1], obstacle=obstacle)
    options["scale"] = k.shape[-1] ** -0.5 if scale is None else scale
    if backend == "triton":
        return getattr(kernels("step"), rule)(state, *operands, **options, slots=slots)
    if slots is not None and offset is not None:
        options["offset"] = offset.index_select(0, slots)
    run = {"torch": step_torch, "reference": _step_reference}[backend]
    with without_autocast(v.device.type):
        o, new = run(rule, _take(state, slots), operands, **options)
    return o, _put(state, slots, new)


def conv_step(x, weight, state, *, activation="silu", normalize=None, slots=None):
    """short_conv of one token in each of R rows: x [R, D], weight [D, W] or None, state [R or with slots S, D, W-1].

    activation, normalize and the state, in x's dtype, are short_conv's. Returns (y [R, D], state): a new one, or the
    store, or None without a weight. Differentiable without slots. Raises ValueError for what does not fit.
    """
    check_conv_step(x, weight, state, activation, normalize, slots)
    refuse_gradients("conv_step", (x, weight, state), slots)
    y = x
    if weight is not None:
        compute = reference.compute_dtype(x)
        line = torch.cat([_take(state, slots).to(x.dtype), x.unsqueeze(-1)], -1)  # [R, D, W]
        y = (line.to(compute) * weight.to(compute)).sum(-1)
        state = _put(state, slots, line[..., 1:])
    if activation:
        y = silu(y)
    y = y.to(x.dtype)
    return y if normalize is None else norm.l2_norm(y.unflatten(-1, (-1, normalize))).flatten(-2), state


def shift_step(x, state, *, slots=None):
    """token_shift of one token in each of R rows: x [R, D], state [R, D] or with slots [S, D] -> (what was there before
    [R, D], state), that is x, or the store, which now holds it.

    In x's dtype. Differentiable without slots. Raises ValueError for what does not fit.
    """
    check_shift_step(x, state, slots)
    refuse_gradients("shift_step", (x, state), slots)
    previous = _take(state, slots).to(x.dtype)
    return previous, _put(state, slots, x.clone())


def _obstacle(rule, k, v, tensors):
    """Why the kernels cannot run this step, or None."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "one-token steps have no backward; decode under torch.no_grad()"
    widest = max(k.shape[-1], v.shape[-1])
    if rule in ("ttt_linear", "titans_linear") and widest > online.MAX_WIDTH:
        return f"the kernels of {rule} take heads of at most {online.MAX_WIDTH} channels, not {widest}"
    return None


def _step_reference(rule, state, operands, **options):
    """The loop over tokens, with one."""
    forms = OPERANDS[rule].values()
    per_token = [x is not None and x.ndim > 1 and "R" in form.split() for x, form in zip(operands, forms)]
    operands = [x.unsqueeze(1) if token else x for x, token in zip(operands, per_token)]
    o, state = getattr(reference, rule)(*operands, **options, initial_state=state, return_state=True)
    return o.squeeze(1), state


def _parts(state):
    return state if isinstance(state, tuple) else (state,)


def _take(state, slots):
    """The rows' own states."""
    if slots is None:
        return state
    taken = [store.index_select(0, slots) for store in _parts(state)]
    return tuple(taken) if isinstance(state, tuple) else taken[0]


def _put(state, slots, new):
    """What a step returns as its state: `new`, or the store that holds it now."""
    if slots is None:
        return new
    for store, x in zip(_parts(state), _parts(new)):
        store.index_copy_(0, slots.long(), x)
    return state
