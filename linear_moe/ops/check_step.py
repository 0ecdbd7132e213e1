"""What a caller of one-token steps can get wrong: each a ValueError with the rule and the values."""

import torch

from .check import _holds, _one_device, _require, _shape, check_conv_options, check_conv_weight, check_offset
from .reference import compute_dtype

# Every rule's operands in its function's order, and their shapes: R rows (tokens), all else as in api.py
OPERANDS = {
    "linear_attention": {"q": "R H K", "k": "R H K", "v": "R HV V", "g": "None | HV | R HV | R HV K"},
    "delta_rule": {"q": "R H K", "k": "R H K", "v": "R HV V", "beta": "R HV", "g": "None | HV | R HV | R HV K"},
    "dplr": {"q": "R H K", "k": "R H K", "v": "R H V", "a": "R H K", "b": "R H K", "g": "R H K"},
    "rwkv6": {"q": "R H K", "k": "R H K", "v": "R H V", "g": "R H K", "u": "H K"},
    "gsa": {"q": "R H K", "k": "R H K", "v": "R H V", "s": "R H M", "g": "R H M"},
    "ttt_linear": {
        "q": "R H D", "k": "R H D", "v": "R H D", "eta": "R H", "token_scale": "None | R H", "weight": "H D",
        "bias": "H D",
    },
    "titans_linear": {"q": "R H K", "k": "R H K", "v": "R H V", "theta": "R H", "g": "R H", "m": "R H"},
}  # fmt: skip
# The states of the R rows, or the S of a store
STATES = {
    "linear_attention": ("HV K V",),
    "delta_rule": ("HV K V",),
    "dplr": ("H K V",),
    "rwkv6": ("H K V",),
    "gsa": ("H M K", "H M V"),
    "ttt_linear": ("H 2 D+1 D",),
    "titans_linear": ("H 3 K V",),
}
OPTIONS = {  # and their defaults
    "ttt_linear": {"eps": 1e-6, "mini_batch": 16, "offset": None},
    "titans_linear": {"mini_batch": 16, "offset": None},
}
ONE_DTYPE = ("q", "k", "v", "a", "b", "s")  # the operands that share v's


def with_defaults(rule, operands, **options):
    """(operands with None for those left out at the end, {option: value or its default}) of a rule.

    Raises ValueError for a rule that is not known, and for operands and options (those that are not None) that it does
    not have.
    """
    if rule not in OPERANDS:
        raise ValueError(f"step: rule ({rule!r}) must be one of {', '.join(OPERANDS)}")
    names, known = [*OPERANDS[rule]], OPTIONS.get(rule, {})
    _require(len(operands) <= len(names), rule, f"the operands are {', '.join(names)}, not {len(operands)}")
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        _require(name in known, rule, f"{name} is no option of this rule")
    return [*operands, *[None] * (len(names) - len(operands))], known | given


def check_step(rule, state, operands, slots, mini_batch=1, offset=None, eps=None):
    """One token of a rule: its operands, all of them, the states or the store, and its options."""
    sizes, operands = {}, dict(zip(OPERANDS[rule], operands))
    for name, forms in OPERANDS[rule].items():
        _match(rule, name, operands[name], forms, sizes)
    H, HV = sizes["H"], sizes.get("HV", sizes["H"])
    _require(H > 0 and HV % H == 0, rule, f"value heads ({HV}) must be a multiple of key heads ({H})")
    v = operands["v"]
    dtypes = {name: x.dtype for name, x in operands.items() if name in ONE_DTYPE}
    shared, found = ", ".join(dtypes), ", ".join(map(str, dtypes.values()))
    _require(len({*dtypes.values()}) == 1, rule, f"{shared} must share a dtype, not {found}")
    forms = STATES[rule]
    parts = state if isinstance(state, tuple) else (state,)
    kinds = [torch.is_tensor(state)] if len(forms) == 1 else [isinstance(state, tuple), *map(torch.is_tensor, parts)]
    wanted = "a tensor" if len(forms) == 1 else "a tuple of two tensors, the slots' keys and values"
    _require(all(kinds) and len(parts) == len(forms), rule, f"the state must be {wanted}")
    count = ("R", sizes["R"]) if slots is None else ("S", len(parts[0]) if parts[0].ndim else 0)
    for part, form in zip(parts, forms):
        _shape(rule, "state", part, dict([count, *_form(form, sizes).items()]))
        _one_device(rule, v, state=part)
    _one_device(rule, v, **operands, offset=offset)
    if slots is not None:
        check_slots(rule, slots, v, compute_dtype(v), *parts)
    _require(isinstance(mini_batch, int) and mini_batch > 0, rule, f"mini_batch ({mini_batch}) must be at least 1")
    check_offset(rule, offset, *count, mini_batch)


def _match(rule, name, x, forms, sizes):
    """x has one of the forms ("None | HV | R HV"); sizes of symbols that are met for the first time are noted."""
    forms = forms.split(" | ")
    if x is None and forms[0] == "None":
        return
    forms = [form for form in forms if form != "None"]
    first = forms[0].split()
    if not {*first} <= sizes.keys():
        _require(torch.is_tensor(x), rule, f"{name} must be a tensor, not {type(x).__name__}")
        _require(x.ndim == len(first), rule, f"{name} must be [{', '.join(first)}], not {[*x.shape]}")
        for symbol, size in zip(first, x.shape):
            sizes.setdefault(symbol, size)
    _shape(rule, name, x, *(_form(form, sizes) for form in forms))


def _form(form, sizes):
    """{symbol: size} of "H 2 D+1 D"."""
    more = {"2": 2, "3": 3, "D+1": sizes.get("D", 0) + 1}
    return {symbol: (sizes | more)[symbol] for symbol in form.split()}


def check_slots(rule, slots, x, dtype, *stores):
    """The slots of x's rows, and stores that are written in place."""
    fits = torch.is_tensor(slots) and slots.dtype in (torch.int32, torch.int64) and [*slots.shape] == [len(x)]
    found = f"{slots.dtype} {[*slots.shape]}" if torch.is_tensor(slots) else type(slots).__name__
    _require(fits, rule, f"slots must be an int32 or int64 tensor [R] = [{len(x)}], not {found}")
    _one_device(rule, x, slots=slots)
    S = len(stores[0])
    _holds(rule, slots, lambda y: ((y >= 0) & (y < S)).all(), f"slots must be at least 0 and below S ({S})")
    for store in stores:
        fits = store.dtype == dtype and store.is_contiguous()
        found = f"{store.dtype} with strides {store.stride()}"
        _require(fits, rule, f"the store must be contiguous {dtype} to be written in place, not {found}")


def refuse_gradients(rule, tensors, slots):
    """With slots, whose store is written in place."""
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    _require(slots is None or not differentiated, rule, "with slots there is no backward; decode under torch.no_grad()")


def check_conv_step(x, weight, state, activation, normalize, slots):
    """The operands of conv_step."""
    rule = "conv_step"
    _require(torch.is_tensor(x) and x.ndim == 2, rule, "x must be a tensor [R, D]")
    (R, D) = x.shape
    _shape(rule, "x", x, {"R": R, "D": D})
    check_conv_options(rule, D, activation, normalize)
    if weight is None:
        _require(state is None, rule, "without a weight there is no state")
        return
    W = check_conv_weight(rule, D, weight)
    _one_device(rule, x, weight=weight)
    _check_rows_state(rule, x, state, {"D": D, "W - 1": W - 1}, slots)


def check_shift_step(x, state, slots):
    """The operands of shift_step."""
    rule = "shift_step"
    _require(torch.is_tensor(x) and x.ndim == 2, rule, "x must be a tensor [R, D]")
    _check_rows_state(rule, x, state, {"D": x.shape[1]}, slots)


def _check_rows_state(rule, x, state, size, slots):
    """Inputs that are kept, one state for every row of x, or a store of them."""
    _require(torch.is_tensor(state) and state.ndim, rule, f"state must be a tensor, not {type(state).__name__}")
    count = {"R": len(x)} if slots is None else {"S": len(state)}
    _shape(rule, "state", state, count | size)
    _one_device(rule, x, state=state)
    if slots is not None:
        check_slots(rule, slots, x, x.dtype, state)
