"""The public functions of linear_moe.ops: arguments checked, then handed to the chosen backend.

Shapes: B batch, T tokens, H key heads, HV value heads (a multiple of H; value head h uses key head h // (HV // H)),
K and V channels. N sequences: B, or len(cu_seqlens) - 1 when packed (then B is 1 and cu_seqlens, int32 or int64 [N+1]
on the tensors' device, holds every sequence's first row and the end, T; zero-length sequences are legal). Any T >= 0.
Values of cu_seqlens that do not fit are a ValueError on a CPU, and on a GPU, where nothing is read, an assertion there.
q, k [B, T, H, K]; v [B, T, HV, V]; beta [B, T, HV]; g, the log decay, <= 0: None, [HV], [B, T, HV] or [B, T, HV, K].
States are [N, HV, K, V] float32 (float64 for float64 values); the rules compute in that dtype and return v's dtype.
Everything is differentiable, states and constant decays included.
"""

from functools import partial

import torch
from torch.nn.functional import silu

from . import chunk, compose, norm, online, reference, routing, slots
from . import grouped as grouped_torch
from . import short_conv as conv
from . import summary as summaries
from .backend import choose_backend, kernels, without_autocast
from .check import (
    check_combine,
    check_conv,
    check_dplr,
    check_grouped,
    check_gsa,
    check_norm,
    check_online,
    check_route,
    check_rule,
    check_rwkv6,
    check_summary,
)

KERNELS = {"linear_attention": "rules", "delta_rule": "rules", "dplr": "dplr"}  # of linear_moe.ops.triton
KERNELS |= {"read_by_value": "slots"}
PARTS = {"rwkv6": ("linear_attention",), "gsa": ("linear_attention", "read_by_value")}  # of what is in compose.py


def _function(rule, backend):
    """What runs a rule on a backend: a function of its own, or a composition of such."""
    if backend == "reference":
        return getattr(reference, rule)
    if rule in PARTS:
        parts = [_function(part, backend) for part in PARTS[rule]]
        return partial(getattr(compose, rule), *parts)
    if backend == "triton":
        return getattr(kernels(KERNELS[rule]), rule)
    return getattr(slots if rule == "read_by_value" else chunk, rule)


def _int32(cu_seqlens):
    return None if cu_seqlens is None else cu_seqlens.int()


def _run(rule, operands, scale, initial_state, return_state, cu_seqlens, backend):
    """A rule over sequences, its operands checked, by the chosen backend."""
    _, k, v, *_ = operands
    widths = [x.shape[-1] for x in operands if x is not None and x.ndim == 4]
    function = _function(rule, choose_backend(rule, backend, v, *widths))
    options = {"initial_state": initial_state, "return_state": return_state, "cu_seqlens": _int32(cu_seqlens)}
    with without_autocast(v.device.type):
        return function(*operands, scale=k.shape[-1] ** -0.5 if scale is None else scale, **options)


def linear_attention(
    q, k, v, g=None, *, scale=None, initial_state=None, return_state=False, cu_seqlens=None, backend="auto"
):
    """S_t = Diag(e^g_t) S_{t-1} + k_t v_t^T,  o_t = scale S_t^T q_t (arXiv 2006.16236; decays: 2312.06635, 2405.21060).

    Shapes and dtypes: see the module. scale defaults to K^-1/2. Returns (o [B, T, HV, V], final state or None).
    Raises ValueError for shapes, dtypes, cu_seqlens or a backend that do not fit.
    """
    check_rule("linear_attention", q, k, v, None, g, initial_state, cu_seqlens)
    return _run("linear_attention", (q, k, v, g), scale, initial_state, return_state, cu_seqlens, backend)


def delta_rule(
    q, k, v, beta, g=None, *, scale=None, initial_state=None, return_state=False, cu_seqlens=None, backend="auto"
):
    """S_t = (I - b_t k_t k_t^T) Diag(e^g_t) S_{t-1} + b_t k_t v_t^T,  o_t = scale S_t^T q_t.

    Without g DeltaNet (arXiv 2406.06484), with g a head Gated DeltaNet (2412.06464), with g a channel KDA (2510.26692).
    Shapes and dtypes: see the module. scale defaults to K^-1/2. Returns (o [B, T, HV, V], final state or None).
    Raises ValueError for shapes, dtypes, cu_seqlens or a backend that do not fit.
    """
    check_rule("delta_rule", q, k, v, beta, g, initial_state, cu_seqlens)
    return _run("delta_rule", (q, k, v, beta, g), scale, initial_state, return_state, cu_seqlens, backend)


def dplr(q, k, v, a, b, g, *, scale=None, initial_state=None, return_state=False, cu_seqlens=None, backend="auto"):
    """S_t = Diag(e^g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,  o_t = scale S_t^T q_t (RWKV-7, arXiv 2503.14456).

    a reads the state before its decay; |a| = 1 and b = -iclr a, iclr in (0, 1), keep the state bounded. q, k, a, b, g
    [B, T, H, K] and v [B, T, H, V]: as many key heads as value heads, a decay a channel; q, k, v, a, b share a dtype.
    scale defaults to K^-1/2. Returns (o [B, T, H, V], final state or None).
    Raises ValueError for shapes, dtypes, cu_seqlens or a backend that do not fit.
    """
    check_rule("dplr", q, k, v, None, g, initial_state, cu_seqlens)
    check_dplr(k, v, a, b, g)
    return _run("dplr", (q, k, v, a, b, g), scale, initial_state, return_state, cu_seqlens, backend)


def rwkv6(q, k, v, g, u, *, scale=None, initial_state=None, return_state=False, cu_seqlens=None, backend="auto"):
    """S_t = Diag(e^g_t) S_{t-1} + k_t v_t^T,  o_t = scale (S_{t-1}^T q_t + (q_t . (u * k_t)) v_t) (arXiv 2404.05892).

    q, k, g [B, T, H, K]; v [B, T, H, V]; u, the current token's bonus, [H, K]: as many key heads as value heads, a
    decay a channel. scale defaults to K^-1/2.
    Returns (o [B, T, H, V], final state or None).
    Raises ValueError for shapes, dtypes, cu_seqlens or a backend that do not fit.
    """
    check_rwkv6(q, k, v, g, u, initial_state, cu_seqlens)
    return _run("rwkv6", (q, k, v, g, u), scale, initial_state, return_state, cu_seqlens, backend)


def gsa(q, k, v, s, g, *, scale=None, initial_state=None, return_state=False, cu_seqlens=None, backend="auto"):
    """Gated slot attention over M slots (arXiv 2409.07146): with the slots' keys Kt = Diag(e^g_t) Kt + s_t k_t^T and
    values Vt = Diag(e^g_t) Vt + s_t v_t^T, p_t = softmax(scale Kt q_t) over the slots and o_t = Vt^T p_t.

    q, k [B, T, H, K]; v [B, T, H, V]; s, g [B, T, H, M], q, k, v, s of one dtype. The state is a tuple, (Kt
    [N, H, M, K], Vt [N, H, M, V]). scale defaults to K^-1/2.
    Returns (o [B, T, H, V], final state or None).
    Raises ValueError for shapes, dtypes, cu_seqlens or a backend that do not fit.
    """
    check_gsa(q, k, v, s, g, initial_state, cu_seqlens)
    return _run("gsa", (q, k, v, s, g), scale, initial_state, return_state, cu_seqlens, backend)


def _run_online(rule, operands, mini_batch, scale, backend, options):
    """A rule that learns online, its operands checked, by the chosen backend."""
    _, k, v, *_ = operands
    obstacle = None
    if max(k.shape[-1], v.shape[-1]) > online.MAX_WIDTH:
        obstacle = f"its kernels take heads of at most {online.MAX_WIDTH} channels, not {max(k.shape[-1], v.shape[-1])}"
    elif mini_batch > online.MAX_MINI_BATCH:
        obstacle = f"its kernels take mini-batches of at most {online.MAX_MINI_BATCH} tokens, not {mini_batch}"
    backend = choose_backend(rule, backend, v, obstacle=obstacle)
    module = kernels("online") if backend == "triton" else {"torch": online, "reference": reference}[backend]
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    with without_autocast(v.device.type):
        return getattr(module, rule)(*operands, scale=scale, mini_batch=mini_batch, **options)


def ttt_linear(
    q, k, v, eta, token_scale, weight, bias, *,
    eps=1e-6, scale=None, mini_batch=16, initial_state=None, offset=None, return_state=False, cu_seqlens=None,
    backend="auto",
):  # fmt: skip
    """TTT-Linear (arXiv 2407.04620): a linear model W with bias, trained on the tokens while it reads them.

    A mini-batch is `mini_batch` tokens, counted from a sequence's start. With W_0 the model at its start, for its
    tokens acc_t = acc_{t-1} + eta_t [k_t, 1] grad_t^T,  o_t = (W_0 - s_t acc_t)^T [scale q_t, 1], where grad_t is the
    gradient at z = W_0^T [k_t, 1] of 1/2 |LN(z; weight, bias) - (v_t - k_t)|^2 (LN with eps). Behind its last token W_0
    becomes W_0 - s_t acc_t, and acc 0.

    q, k, v [B, T, H, D]; eta and s = token_scale (None: ones) [B, T, H]; weight, bias [H, D]. scale defaults to D^-1/2.
    States [N, H, 2, D + 1, D], (W_0, acc), the bias of W its last row; offset int [N] (None: zeros): how many tokens of
    its mini-batch a state has seen, so that parts of a sequence equal the whole. Returns (o [B, T, H, D], final state
    or None). Raises ValueError for shapes, dtypes, cu_seqlens, an offset or a backend that do not fit.
    """
    gates = {"eta": eta} | ({} if token_scale is None else {"token_scale": token_scale})
    head = {"weight": weight, "bias": bias}
    check_online("ttt_linear", q, k, v, gates, head, offset, mini_batch, initial_state, cu_seqlens)
    options = {"eps": eps, "initial_state": initial_state, "offset": offset}
    options |= {"return_state": return_state, "cu_seqlens": _int32(cu_seqlens)}
    operands = (q, k, v, eta, token_scale, weight, bias)
    return _run_online("ttt_linear", operands, mini_batch, scale, backend, options)


def titans_linear(
    q, k, v, theta, g, m, *,
    scale=None, mini_batch=16, initial_state=None, offset=None, return_state=False, cu_seqlens=None, backend="auto",
):  # fmt: skip
    """Titans' linear memory (arXiv 2501.00663): gradient descent with momentum and forgetting.

    Z_t = e^m_t Z_{t-1} - theta_t k_t (S_0^T k_t - v_t)^T,  S_t = e^g_t S_{t-1} + Z_t,  o_t = scale S_t^T q_t, with S_0
    the S at the start of the mini-batch of `mini_batch` tokens, counted from the sequence's start.

    q, k [B, T, H, K]; v [B, T, H, V]; the rate theta and the logarithms g = log(1 - alpha), m = log(eta), both <= 0,
    [B, T, H]. scale defaults to K^-1/2. States [N, H, 3, K, V], (S_0, S, Z), and offset as in ttt_linear. Returns
    (o [B, T, H, V], final state or None). Raises ValueError for shapes, dtypes, cu_seqlens, an offset or a backend that
    do not fit.
    """
    gates = {"theta": theta, "g": g, "m": m}
    check_online("titans_linear", q, k, v, gates, {}, offset, mini_batch, initial_state, cu_seqlens)
    options = {"initial_state": initial_state, "offset": offset}
    options |= {"return_state": return_state, "cu_seqlens": _int32(cu_seqlens)}
    return _run_online("titans_linear", (q, k, v, theta, g, m), mini_batch, scale, backend, options)


def short_conv(
    x,
    weight,
    *,
    activation="silu",
    normalize=None,
    initial_state=None,
    return_state=False,
    cu_seqlens=None,
    routes=None,
    backend="auto",
):
    """Causal depthwise convolution: y_t = norm(act(sum_i weight[:, i] x_{t-W+1+i})), never across a sequence's borders.

    x [B, T, D]; weight [D, W], the last column for the current token, or None for no convolution; activation "silu" or
    None; normalize None, or the width of the heads that are then divided by their L2 norm. With routes x holds tokens
    and y [1, R, D] their rows: the taps follow each bucket's own tokens. The state [N, D, W-1], in x's dtype, holds the
    last W-1 inputs before the sequence, oldest first (None: zeros); a sequence shorter than that keeps the end of its
    old state. Returns (y [B, T, D], state or None), computed in float32 (float64 for float64 inputs). Raises ValueError
    for shapes, dtypes, cu_seqlens, options or a backend that do not fit.
    """
    check_conv(x, weight, activation, normalize, initial_state, return_state, cu_seqlens, routes)
    backend, cu_seqlens = choose_backend("short_conv", backend, x), _int32(cu_seqlens)
    state = {"initial_state": initial_state, "return_state": return_state}
    if backend == "triton":
        maps = {} if routes is None else {"token": routes.token, "row": routes.row}
        cu_seqlens = cu_seqlens if routes is None else routes.cu_seqlens
        return kernels("conv").short_conv(
            x, weight, activation=activation, normalize=normalize, cu_seqlens=cu_seqlens, **state, **maps
        )
    if routes is not None:
        x, cu_seqlens = routing.gather(x.flatten(0, 1), routes).unsqueeze(0), routes.cu_seqlens
    last = None
    if weight is not None:
        function = {"torch": conv, "reference": reference}[backend].short_conv
        x, last = function(x, weight, activation=activation, cu_seqlens=cu_seqlens, **state)
    elif activation:
        x = silu(x)
    return x if normalize is None else norm.l2_norm(x.unflatten(-1, (-1, normalize))).flatten(-2), last


def route(indices, weights, *, num_memories, shared, cu_seqlens=None, backend="auto"):
    """Sorts tokens into buckets, stably: see routing.Routes and routing.route.

    indices int [B, T, k], distinct for a token and below num_memories; weights [B, T, k] float; `shared` adds one more
    memory, the last, that holds every token with weight 1; cu_seqlens [N+1] (then B is 1), else N = B.
    Raises ValueError for shapes, dtypes, cu_seqlens or a backend that do not fit.
    """
    check_route(indices, weights, num_memories, cu_seqlens)
    backend = choose_backend("route", backend, weights)
    function = {"reference": routing.route_reference, "torch": routing.route}.get(backend) or kernels("routing").route
    return function(indices, weights, num_memories=num_memories, shared=shared, cu_seqlens=_int32(cu_seqlens))


def grouped_linear(x, weight, offsets, *, routes=None, backend="auto"):
    """One linear map for each group of consecutive rows: row r of group m becomes x[r] @ weight[m].T.

    x [R, D], or tokens [B*T, D] with routes, whose rows are then gathered; weight [G, E, D]; offsets int32 [G], the END
    of every group's rows, the last one R. Returns [R, E]. Raises ValueError for shapes, dtypes or a backend that do not
    fit.
    """
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):  # as F.linear
        x, weight = (y.to(torch.get_autocast_dtype(x.device.type)) for y in (x, weight))
    check_grouped(x, weight, offsets, routes)
    if choose_backend("grouped_linear", backend, x) == "triton":
        maps = (None, None) if routes is None else (routes.token, routes.row)
        return kernels("grouped").grouped_linear(x, weight, offsets, *maps)
    return grouped_torch.grouped_linear(x if routes is None else routing.gather(x, routes), weight, offsets)


def combine(rows, routes, *, backend="auto"):
    """The weighted sum of every token's rows: [R, ...] -> [B*T, ...], in the rows' dtype.

    Raises ValueError for routes of another number of rows or a backend that does not fit.
    """
    check_combine(rows, routes)
    if choose_backend("combine", backend, rows) == "triton":
        return kernels("combine").combine(rows, routes.row, routes.weights)
    return routing.combine(rows, routes)


def gated_norm(o, weight, gate=None, *, eps, activation="silu", routes=None, backend="auto"):
    """RMS norm over V of o [tokens, HV, V], times weight [V], times act(gate) where a gate [tokens, HV, V] is given.

    With routes o holds rows [R, HV, V], which are combined first. Activation "silu" or "sigmoid". In o's dtype,
    computed in at least float32. Raises ValueError for shapes, an activation or a backend that do not fit.
    """
    check_norm(o, weight, gate, activation, routes)
    if choose_backend("gated_norm", backend, o) == "triton":
        maps = (None, None) if routes is None else (routes.row, routes.weights)
        return kernels("combine").combine_norm(o, *maps, gate, weight, eps=eps, activation=activation)
    return norm.gated_norm(o, weight, gate, eps=eps, activation=activation, routes=routes)


def _summary_function(rule, backend):
    """What makes a rule's summary on a backend: a function of its own, or one made of linear_attention's."""
    if rule in PARTS:
        return partial(getattr(summaries, rule), _summary_function("linear_attention", backend))
    if backend == "reference":
        return partial(summaries.loop, rule)
    return getattr(kernels("summary") if backend == "triton" else summaries, rule)


def summary(rule, *operands, cu_seqlens=None, backend="auto"):
    """What the tokens of every sequence do to whatever state S enters it: S becomes P S + U. For context parallelism,
    whose ranks each hold a segment: apply_summary moves a state over a segment, compose_summaries joins two segments.

    rule: "linear_attention", "delta_rule", "dplr", "rwkv6" or "gsa"; operands: those of that function, in its order and
    shapes. q and u change no state: they may be None, and have no gradient.
    Returns (transition, state): state, U, is the final state from zeros [N, HV, K, V] (gsa: the tuple of its two); the
    transition is P [N, HV, K, K] for delta_rule and dplr, and for the others P's diagonal, the whole decay e^(sum g)
    [N, HV, K] (gsa: [N, H, M]). Both float32 (float64 for float64 values), contiguous, and differentiable in every
    operand. A sequence without tokens has the identity and zeros. Raises ValueError for another rule (the states of
    ttt_linear and titans_linear are not affine), and for shapes, dtypes, cu_seqlens or a backend that do not fit.
    """
    operands = check_summary(rule, operands, cu_seqlens)
    v = operands[1]
    widths = [x.shape[-1] for x in operands if x is not None and x.ndim == 4]
    backend = choose_backend(f"summary of {rule}", backend, v, *widths)
    with without_autocast(v.device.type):
        return _summary_function(rule, backend)(*operands, cu_seqlens=_int32(cu_seqlens))


def apply_summary(transition, state, initial):
    """P S + U: the state behind a segment whose summary is (transition, state), where `initial` entered it.

    Shapes: see summary; initial and the result are like its state (gsa: tuples of two).
    """
    with without_autocast(transition.device.type):
        return summaries.apply_summary(transition, state, initial)


def compose_summaries(second, first):
    """The summary of two segments in a row, from those of each: (P2 P1, P2 U1 + U2). Shapes: see summary."""
    with without_autocast(first[0].device.type):
        return summaries.compose_summaries(second, first)
