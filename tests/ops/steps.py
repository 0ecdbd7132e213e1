"""Tokens of every rule, drawn fresh, and what a sequence of them gives: the oracle of one-token steps."""

import torch
from torch.nn.functional import normalize

from linear_moe import ops
from linear_moe.ops.check_step import OPERANDS, STATES

SIZES = {"R": 3, "T": 20, "H": 2, "HV": 4, "K": 8, "V": 12, "D": 12, "M": 10}
MINI_BATCH = 4
# (rule, the shape of its decay where there is a choice)
GROUPED = [(rule, g) for rule in ("linear_attention", "delta_rule") for g in (None, "HV", "R T HV", "R T HV K")]
CASES = [*GROUPED, *((rule, None) for rule in OPERANDS if rule not in ("linear_attention", "delta_rule"))]
IDS = [f"{rule} {g or ''}".strip() for rule, g in CASES]
ROUNDED = ("q", "k", "v", "a", "b", "s")  # operands that may have less than float32


def shape(form, sizes):
    known = sizes | {"2": 2, "3": 3, "D+1": sizes["D"] + 1}
    return [known[symbol] for symbol in form.split()]


def draw(case, **sizes):
    """({name: float64 operands of a sequence}, its state). Strong decays mix up to -50 with about -0.1."""
    (rule, g), sizes = case, SIZES | sizes
    forms = {name: form.split(" | ")[-1] for name, form in OPERANDS[rule].items()}
    if case in GROUPED:
        forms |= {"g": g}
    x = {}
    for name, form in forms.items():
        if form is not None:
            x[name] = _draw(name, shape(form.replace("R", "R T") if "T" not in form else form, sizes), x)
    state = [
        (0.3 if rule == "ttt_linear" else 1) * torch.randn(shape(f"R {form}", sizes), dtype=torch.float64)
        for form in STATES[rule]
    ]
    return x, tuple(state) if len(state) > 1 else state[0]


def _draw(name, size, x):
    y = torch.randn(size, dtype=torch.float64)
    if name in ("k", "a"):
        return normalize(y, dim=-1)
    if name == "b":  # as RWKV-7 draws it: otherwise the state explodes
        return -y.sigmoid() * x["a"]
    if name in ("g", "m"):
        return -0.2 * y.sigmoid() * torch.where(torch.rand(size) < 0.1, 250, 1)
    if name in ("beta", "eta", "theta", "token_scale", "s"):
        return 0.5 * y.sigmoid()
    return y


def token(x, t):
    """The operands of one token, in the rule's order."""
    return [y if is_a_heads(name, y) else y[:, t] for name, y in x.items()]


def is_a_heads(name, y):
    return name in ("u", "weight", "bias") or y.ndim == 1


def options(rule, offset):
    """Of a rule that learns online, else none."""
    online = rule in ("ttt_linear", "titans_linear")
    return {"offset": offset, "mini_batch": MINI_BATCH} if online else {}


def parts(state):
    return state if isinstance(state, tuple) else (state,)


def map_state(function, state):
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)


def entries(store, slots):
    """A copy of those entries."""
    return map_state(lambda y: y[slots], store)


def whole(rule, x, state, offset):
    """The loop over a sequence's tokens: outputs and final state."""
    given = options(rule, offset)
    return getattr(ops, rule)(*x.values(), initial_state=state, return_state=True, backend="reference", **given)
