"""What a caller of ops can get wrong: each a ValueError with the rule and the values."""

import torch


def _require(condition, rule, message):
    if not condition:
        raise ValueError(f"{rule}: {message}")


def _shape(rule, name, x, *allowed):
    """x must be a float tensor of one of the allowed shapes, each given as {symbol: size}."""
    _require(torch.is_tensor(x), rule, f"{name} must be a tensor, not {type(x).__name__}")
    text = " or ".join(f"[{', '.join(s)}] = {[*s.values()]}" for s in allowed)
    fits = any([*x.shape] == [*s.values()] for s in allowed)
    _require(fits, rule, f"{name} must be {text}, not {[*x.shape]}")
    _require(x.is_floating_point(), rule, f"{name} must be floating point, not {x.dtype}")


def _one_device(rule, x, **others):
    for name, other in others.items():
        fits = other is None or other.device == x.device
        _require(fits, rule, f"{name} and the input must be on one device ({x.device})")


def check_cu_seqlens(rule, cu_seqlens, B, T, device):
    """The number of sequences. Every row must be some sequence's: see _holds."""
    if cu_seqlens is None:
        return B
    _require(torch.is_tensor(cu_seqlens), rule, f"cu_seqlens must be a tensor, not {type(cu_seqlens).__name__}")
    fits = cu_seqlens.dtype in (torch.int32, torch.int64)
    _require(fits, rule, f"cu_seqlens must be int32 or int64, not {cu_seqlens.dtype}")
    fits = cu_seqlens.ndim == 1 and len(cu_seqlens) > 0
    _require(fits, rule, f"cu_seqlens must be [N + 1], not {[*cu_seqlens.shape]}")
    _require(B == 1, rule, f"with cu_seqlens the batch size ({B}) must be 1")
    _require(cu_seqlens.device == device, rule, f"cu_seqlens is on {cu_seqlens.device}, the inputs on {device}")
    borders = f"cu_seqlens must run from 0 to T ({T}) and not decrease"
    _holds(rule, cu_seqlens, lambda x: (x[0] == 0) & (x[-1] == T) & (x.diff() >= 0).all(), borders)
    return len(cu_seqlens) - 1


def _holds(rule, x, fits, message):
    """fits(values of x). On a CPU the values are read, which is free there.

    Elsewhere nothing is read back: the device itself stops at a value that does not fit. It looks once at a tensor,
    however many ops take it, and not at all at those that routing made.
    """
    known = getattr(x, "_known_to", None)
    if len(x) == 0 or known is MADE_HERE:
        return
    if x.device.type == "cpu":
        _require(bool(fits(x)), rule, f"{message}: {x.tolist()}")
        return
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()  # a replay may bring other values
    if x.is_inference() or capturing or known != (message, x._version):
        torch._assert_async(fits(x), f"{rule}: {message}")
        x._known_to = None if x.is_inference() else (message, x._version)


MADE_HERE = object()


def made_here(*tensors):
    """Says of tensors that hold borders or slots that their values fit and will not change (sequences.remembered)."""
    for x in tensors:
        x._known_to, x._tables = MADE_HERE, {}


def _check_operands(rule, lead, q, k, v, beta, g, state, N):
    for name, x in (("q", q), ("k", k), ("v", v)):
        _require(torch.is_tensor(x), rule, f"{name} must be a tensor, not {type(x).__name__}")
        fits = x.ndim == len(lead) + 2
        _require(fits, rule, f"{name} must be [{', '.join(lead)}, heads, channels], not {[*x.shape]}")
    (H, K), (HV, V) = k.shape[-2:], v.shape[-2:]
    _shape(rule, "q", q, {**lead, "H": H, "K": K})
    _shape(rule, "k", k, {**lead, "H": H, "K": K})
    _shape(rule, "v", v, {**lead, "HV": HV, "V": V})
    _require(H > 0 and HV % H == 0, rule, f"value heads ({HV}) must be a multiple of key heads ({H})")
    heads = {**lead, "HV": HV}
    if rule == "delta_rule":
        _shape(rule, "beta", beta, heads)
    else:
        _require(beta is None, rule, "beta is an operand of delta_rule only")
    if g is not None:
        _shape(rule, "g", g, {"HV": HV}, heads, {**heads, "K": K})
    if state is not None:
        _shape(rule, "state", state, {"N": N, "HV": HV, "K": K, "V": V})
    for name, x in (("q", q), ("k", k), ("beta", beta), ("g", g), ("state", state)):
        _require(x is None or x.device == v.device, rule, f"{name} and v must be on one device ({v.device})")
    _require(q.dtype == k.dtype == v.dtype, rule, f"q, k, v must share a dtype, not {q.dtype}, {k.dtype}, {v.dtype}")


def check_rule(rule, q, k, v, beta, g, initial_state, cu_seqlens):
    """The operands of a rule over sequences."""
    _require(torch.is_tensor(v) and v.ndim == 4, rule, "v must be a tensor [B, T, HV, V]")
    N = check_cu_seqlens(rule, cu_seqlens, *v.shape[:2], v.device)
    _check_operands(rule, {"B": v.shape[0], "T": v.shape[1]}, q, k, v, beta, g, initial_state, N)


def check_dplr(k, v, a, b, g):
    """What dplr asks beyond check_rule: the same heads everywhere."""
    lead = dict(zip(("B", "T"), v.shape[:-2]))
    for name, x in (("k", k), ("a", a), ("b", b), ("g", g)):
        _shape("dplr", name, x, {**lead, "H": v.shape[-2], "K": k.shape[-1]})
    _one_device("dplr", v, a=a, b=b)
    _require(a.dtype == b.dtype == v.dtype, "dplr", f"a, b, v must share a dtype, not {a.dtype}, {b.dtype}, {v.dtype}")


def check_rwkv6(q, k, v, g, u, initial_state, cu_seqlens):
    """The operands of rwkv6: as many key heads as value heads, a decay a channel."""
    _check_rwkv6_state(q, k, v, g, initial_state, cu_seqlens)
    _shape("rwkv6", "u", u, {"H": v.shape[2], "K": k.shape[-1]})
    _one_device("rwkv6", v, u=u)


def _check_rwkv6_state(q, k, v, g, initial_state, cu_seqlens):
    """All operands but u."""
    check_rule("rwkv6", q, k, v, None, g, initial_state, cu_seqlens)
    (B, T, H, _), K = v.shape, k.shape[-1]
    for name, x in (("k", k), ("g", g)):
        _shape("rwkv6", name, x, {"B": B, "T": T, "H": H, "K": K})


def check_gsa(q, k, v, s, g, initial_state, cu_seqlens):
    """The operands of gsa."""
    rule = "gsa"
    for name, x in (("v", v), ("k", k), ("s", s)):
        _require(torch.is_tensor(x) and x.ndim == 4, rule, f"{name} must be a tensor [B, T, H, channels]")
    (B, T, H, V), K, M = v.shape, k.shape[-1], s.shape[-1]
    N = check_cu_seqlens(rule, cu_seqlens, B, T, v.device)
    lead = {"B": B, "T": T, "H": H}
    shapes = {"q": (q, {"K": K}), "k": (k, {"K": K}), "v": (v, {"V": V}), "s": (s, {"M": M}), "g": (g, {"M": M})}
    for name, (x, width) in shapes.items():
        _shape(rule, name, x, {**lead, **width})
    if initial_state is not None:
        fits = isinstance(initial_state, tuple) and len(initial_state) == 2
        _require(fits, rule, "the state must be a tuple of two tensors, the slots' keys and values")
        keys, values = initial_state
        _shape(rule, "keys' state", keys, {"N": N, "H": H, "M": M, "K": K})
        _shape(rule, "values' state", values, {"N": N, "H": H, "M": M, "V": V})
        _one_device(rule, v, keys=keys, values=values)
    _one_device(rule, v, q=q, k=k, s=s, g=g)
    dtypes = [x.dtype for x in (q, k, v, s)]
    _require(len({*dtypes}) == 1, rule, f"q, k, v, s must share a dtype, not {', '.join(map(str, dtypes))}")


def check_shift(x, initial_state, cu_seqlens):
    """The operands of token_shift; the number of sequences."""
    rule = "token_shift"
    _require(torch.is_tensor(x) and x.ndim == 3, rule, "x must be a tensor [B, T, D]")
    N = check_cu_seqlens(rule, cu_seqlens, *x.shape[:2], x.device)
    if initial_state is not None:
        _shape(rule, "initial_state", initial_state, {"N": N, "D": x.shape[2]})
        _one_device(rule, x, initial_state=initial_state)
    return N


def check_online(rule, q, k, v, gates, head, offset, mini_batch, initial_state, cu_seqlens):
    """The operands of ttt_linear and titans_linear. gates [B, T, H] and head [H, V], tensors by name: see api.py."""
    _require(torch.is_tensor(v) and v.ndim == 4, rule, "v must be a tensor [B, T, H, V]")
    (B, T, H, V), N = v.shape, check_cu_seqlens(rule, cu_seqlens, *v.shape[:2], v.device)
    _require(torch.is_tensor(k) and k.ndim == 4, rule, "k must be a tensor [B, T, H, K]")
    K = V if head else k.shape[-1]
    for name, x in (("q", q), ("k", k)):
        _shape(rule, name, x, {"B": B, "T": T, "H": H, "K": K})
    _shape(rule, "v", v, {"B": B, "T": T, "H": H, "V": V})
    for name, x in gates.items():
        _shape(rule, name, x, {"B": B, "T": T, "H": H})
    for name, x in head.items():
        _shape(rule, name, x, {"H": H, "V": V})
    if initial_state is not None:
        size = {"2": 2, "D + 1": V + 1, "D": V} if head else {"3": 3, "K": K, "V": V}
        _shape(rule, "initial_state", initial_state, {"N": N, "H": H} | size)
    check_offset(rule, offset, "N", N, mini_batch)
    _require(isinstance(mini_batch, int) and mini_batch > 0, rule, f"mini_batch ({mini_batch}) must be at least 1")
    _one_device(rule, v, q=q, k=k, **gates, **head, initial_state=initial_state, offset=offset)
    _require(q.dtype == k.dtype == v.dtype, rule, f"q, k, v must share a dtype, not {q.dtype}, {k.dtype}, {v.dtype}")


def check_offset(rule, offset, name, size, mini_batch):
    """offset: None, or int [size], how much of its mini-batch each state has seen; name: the size's symbol."""
    if offset is None:
        return
    fits = torch.is_tensor(offset) and offset.dtype in (torch.int32, torch.int64) and [*offset.shape] == [size]
    _require(fits, rule, f"offset must be an int32 or int64 tensor [{name}] = [{size}], not {offset}")
    message = f"offset must be at least 0 and below mini_batch ({mini_batch})"
    _holds(rule, offset, lambda x: ((x >= 0) & (x < mini_batch)).all(), message)


def check_conv_options(rule, D, activation, normalize):
    """What follows a convolution of D channels."""
    _require(activation in ("silu", None), rule, f"activation ({activation!r}) must be 'silu' or None")
    fits = normalize is None or (normalize > 0 and D % normalize == 0)
    _require(fits, rule, f"the channels ({D}) must be a multiple of the normalised width ({normalize})")


def check_conv_weight(rule, D, weight):
    """A convolution's weight; the number of its columns."""
    _require(torch.is_tensor(weight) and weight.ndim == 2, rule, "weight must be a tensor [D, W]")
    W = weight.shape[1]
    _shape(rule, "weight", weight, {"D": D, "W": W})
    _require(W > 0, rule, "weight must have at least one column")
    return W


def check_conv(x, weight, activation, normalize, initial_state, return_state, cu_seqlens, routes):
    """The operands of short_conv."""
    rule = "short_conv"
    _require(torch.is_tensor(x) and x.ndim == 3, rule, "x must be a tensor [B, T, D]")
    B, T, D = x.shape
    _shape(rule, "x", x, {"B": B, "T": T, "D": D})
    check_conv_options(rule, D, activation, normalize)
    if routes is not None:
        _require(cu_seqlens is None, rule, "routes bring their own cu_seqlens")
        tokens = len(routes.row)
        _require(tokens == B * T, rule, f"the routes are of {tokens} tokens, x has {B * T}")
        N = len(routes.cu_seqlens) - 1
    else:
        N = check_cu_seqlens(rule, cu_seqlens, B, T, x.device)
    _one_device(rule, x, weight=weight, initial_state=initial_state, routes=None if routes is None else routes.token)
    if weight is None:
        _require(initial_state is None and not return_state, rule, "without a weight there is no state")
        return
    W = check_conv_weight(rule, D, weight)
    if initial_state is not None:
        _shape(rule, "initial_state", initial_state, {"N": N, "D": D, "W - 1": W - 1})


def check_route(indices, weights, num_memories, cu_seqlens):
    """The operands of route."""
    rule = "route"
    fits = indices.ndim == 3 and indices.shape == weights.shape
    shapes = f"{[*indices.shape]} and {[*weights.shape]}"
    _require(fits, rule, f"indices and weights must both be [B, T, k], not {shapes}")
    fits = not indices.is_floating_point() and weights.is_floating_point()
    _require(fits, rule, f"indices must be integers ({indices.dtype}) and weights floats ({weights.dtype})")
    k = indices.shape[2]
    _require(k <= num_memories, rule, f"k ({k}) must not exceed num_memories ({num_memories})")
    check_cu_seqlens(rule, cu_seqlens, *indices.shape[:2], indices.device)


def check_grouped(x, weight, offsets, routes):
    """The operands of grouped_linear."""
    rule = "grouped_linear"
    fits = x.ndim == 2 and weight.ndim == 3 and x.shape[1] == weight.shape[2] and offsets.shape == weight.shape[:1]
    shapes = f"{[*x.shape]}, {[*weight.shape]} and {[*offsets.shape]}"
    _require(fits, rule, f"x must be [R, D], weight [G, E, D] and offsets [G], not {shapes}")
    _one_device(rule, x, weight=weight, offsets=offsets)
    _require(x.dtype == weight.dtype, rule, f"x and weight must share a dtype, not {x.dtype} and {weight.dtype}")
    rows = len(x)
    if routes is not None:
        _require(len(routes.row) == len(x), rule, f"the routes are of {len(routes.row)} tokens, x has {len(x)}")
        rows = len(routes.token)
    _require(offsets.dtype == torch.int32, rule, f"offsets must be int32, not {offsets.dtype}")
    message = f"offsets must end at the number of rows ({rows}) and not decrease"
    _holds(rule, offsets, lambda x: (x[0] >= 0) & (x[-1] == rows) & (x.diff() >= 0).all(), message)


def check_combine(rows, routes):
    """The operands of combine."""
    _rows_of(routes, "combine", "rows", rows)


def _rows_of(routes, rule, name, x):
    fits = len(routes.token) == len(x)
    _require(fits, rule, f"the routes have {len(routes.token)} rows, {name} has {len(x)}")


def check_norm(o, weight, gate, activation, routes):
    """The operands of gated_norm."""
    rule = "gated_norm"
    _require(torch.is_tensor(o) and o.ndim == 3, rule, "o must be a tensor [tokens or rows, HV, V]")
    rows, HV, V = o.shape
    _shape(rule, "weight", weight, {"V": V})
    _require(activation in ("silu", "sigmoid"), rule, f"activation ({activation!r}) must be 'silu' or 'sigmoid'")
    tokens = rows
    if routes is not None:
        _rows_of(routes, rule, "o", o)
        tokens = len(routes.row)
    _one_device(rule, o, weight=weight, gate=gate)
    if gate is not None:
        _shape(rule, "gate", gate, {"tokens": tokens, "HV": HV, "V": V})


def _check_rwkv6_summary(q, k, v, g, u, cu_seqlens):
    _check_rwkv6_state(q, k, v, g, None, cu_seqlens)
    if u is not None:
        check_rwkv6(q, k, v, g, u, None, cu_seqlens)


def _check_dplr_summary(q, k, v, a, b, g, cu_seqlens):
    check_rule("dplr", q, k, v, None, g, None, cu_seqlens)
    check_dplr(k, v, a, b, g)


def _check_attention_summary(q, k, v, g, cu_seqlens):
    check_rule("linear_attention", q, k, v, None, g, None, cu_seqlens)


def _check_delta_summary(q, k, v, beta, g, cu_seqlens):
    check_rule("delta_rule", q, k, v, beta, g, None, cu_seqlens)


def _check_gsa_summary(q, k, v, s, g, cu_seqlens):
    check_gsa(q, k, v, s, g, None, cu_seqlens)


# Rules whose state is an affine function of the one before: the order of their operands, how many of them must be
# given, and what checks them
AFFINE = {
    "linear_attention": ("q, k, v, g", 3, _check_attention_summary),
    "delta_rule": ("q, k, v, beta, g", 4, _check_delta_summary),
    "dplr": ("q, k, v, a, b, g", 6, _check_dplr_summary),
    "rwkv6": ("q, k, v, g, u", 4, _check_rwkv6_summary),
    "gsa": ("q, k, v, s, g", 5, _check_gsa_summary),
}


def check_summary(rule, operands, cu_seqlens):
    """The operands of summary, q and u perhaps None. Returns all but q, on which no state depends."""
    online = rule in ("ttt_linear", "titans_linear")
    reason = "a state is no affine function of the one before, so a segment has no summary: pass the state on"
    _require(not online, rule, reason)
    _require(rule in AFFINE, "summary", f"rule ({rule!r}) must be one of {sorted(AFFINE)}")
    order, least, check = AFFINE[rule]
    most = order.count(",") + 1
    fits = least <= len(operands) <= most
    _require(fits, rule, f"summary takes {least} to {most} operands ({order}), not {len(operands)}")
    q, k, *others = (*operands, *[None] * (most - len(operands)))
    check(k if q is None else q, k, *others, cu_seqlens)
    return k, *others
