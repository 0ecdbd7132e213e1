"""Every update rule's kernels against the float64 loop over tokens, packed with empty sequences and initial states."""

from functools import partial

import torch
from torch.nn.functional import normalize

from linear_moe.ops import api, decoding, online
from linear_moe.ops.triton import tuning

from .compare import LIMITS, compare, verdict

DECAYS = ("no decay", "constant", "scalar", "channel")
ROUNDED = ("q", "k", "v", "s", "a", "b")  # operands in the dtype under test; all others are float32
KERNELS = {  # whose tuning entries say at which widths a rule is checked, by how their names begin
    "linear_attention": ("prepare", "scan_", "key_gradients"),
    "dplr": ("dplr_",),
    "ttt_linear": ("ttt_",),
    "titans_linear": ("titans_",),
    "step": ("step",),
}
KERNELS |= dict.fromkeys(("delta_rule", "rwkv6", "gsa"), KERNELS["linear_attention"])
SLOTS = 64
MINI_BATCH = 16
STEPS = 20


def widths(rule, architecture):
    """Widths (K, V) for which the tuning table has an entry of its own for one of a rule's kernels."""
    kernels = tuning.table()[tuning.nearest(architecture)]
    keys = {key.split()[0] for name, entry in kernels.items() if name.startswith(KERNELS[rule]) for key in entry}
    return sorted(tuple(map(int, key.split("x"))) for key in keys - {"*"})


def check_rule(rule, decay, heads, K, V, dtype, device, lengths, seed):
    """Outputs, final states and every gradient. decay: of DECAYS, for the two rules that have the choice."""
    torch.manual_seed(seed)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    inputs, offset = draw(rule, decay, heads, K, V, lengths)
    wide = [name for name in inputs if name not in ROUNDED]
    run = partial(_run, rule, cu=cu, offset=offset)
    exact = partial(_run, rule, cu=cu, offset=offset, backend="reference")
    per_token = ("g",) if decay == "constant" else ()
    return compare(run, exact, inputs, dtype, device, wide=wide, per_token=per_token)


def draw(rule, decay, heads, K, V, lengths):
    """({name: float32 tensor} of a rule's operands, offsets of the rules that learn online or None).

    heads: (H, HV); rules whose heads are not grouped take H.
    """
    (H, HV), T, N = heads, sum(lengths), len(lengths)
    HV = HV if rule in ("linear_attention", "delta_rule") else H
    K, offset = V if rule == "ttt_linear" else K, None
    unit = partial(normalize, dim=-1)
    x = {"q": torch.randn(1, T, H, K), "k": unit(torch.randn(1, T, H, K)), "v": torch.randn(1, T, HV, V)}
    state = (N, HV, K, V)
    if rule in ("linear_attention", "delta_rule"):
        if rule == "delta_rule":
            x["beta"] = torch.rand(1, T, HV)
        if decay != "no decay":
            x["g"] = log_decay(*{"constant": (HV,), "scalar": (1, T, HV), "channel": (1, T, HV, K)}[decay])
    elif rule == "dplr":  # a and b as RWKV-7 draws them: otherwise the state explodes
        x["a"] = unit(torch.randn(1, T, H, K))
        x |= {"b": -torch.rand(1, T, H, K) * x["a"], "g": log_decay(1, T, H, K)}
    elif rule == "rwkv6":
        x |= {"g": log_decay(1, T, H, K), "u": torch.randn(H, K)}
    elif rule == "gsa":
        x |= {"s": torch.rand(1, T, H, SLOTS), "g": log_decay(1, T, H, SLOTS)}
        state = (N, H, SLOTS, K + V)
    elif rule == "ttt_linear":
        x |= {"eta": 0.2 * torch.rand(1, T, H), "token_scale": torch.rand(1, T, H)}
        x |= {"weight": 1 + 0.2 * torch.randn(H, V), "bias": 0.2 * torch.randn(H, V)}
        state, offset = (N, H, 2, V + 1, V), torch.randint(MINI_BATCH, (N,))
    elif rule == "titans_linear":
        x |= {"theta": 0.5 * torch.rand(1, T, H), "g": log_decay(1, T, H), "m": log_decay(1, T, H)}
        state, offset = (N, H, 3, K, V), torch.randint(MINI_BATCH, (N,))
    else:
        raise ValueError(f"rule ({rule!r}) must be one of {', '.join(KERNELS)}")
    x["initial_state"] = torch.randn(state) * (0.3 if rule == "ttt_linear" else 1)
    return x, offset


def log_decay(*shape):
    """Strong for the first third of the tokens and weak behind; of a constant decay strong for every other head."""
    axis = min(1, len(shape) - 1)
    place = torch.arange(shape[axis])
    strong = place % 2 == 1 if len(shape) == 1 else place < shape[axis] // 3
    rate = torch.where(strong, 5.0, 0.1).view(-1, *[1] * (len(shape) - axis - 1))
    return -torch.rand(shape) * rate


def _run(rule, x, device, *, cu, offset, backend="triton"):
    """{"o", "S"}, the final state as one tensor."""
    x, options = dict(x), {"return_state": True, "cu_seqlens": cu.to(device), "backend": backend}
    if offset is not None:
        options["offset"] = offset.to(device)
    if rule == "gsa":  # its state is a pair: the slots' keys and values
        x["initial_state"] = x["initial_state"].split([x["k"].shape[-1], x["v"].shape[-1]], -1)
    o, state = getattr(api, rule)(**x, **options)
    return {"o": o, "S": torch.cat(state, -1) if rule == "gsa" else state}


def check_steps(rule, heads, K, V, dtype, device, seed):
    """STEPS tokens one by one, with every decay that the rule has, against the loop."""
    torch.manual_seed(seed)
    found, expected = {}, {}
    for decay in DECAYS if rule in ("linear_attention", "delta_rule") else ("its own",):
        x, offset = draw(rule, decay, heads, K, V, [STEPS])
        x = {name: t.to(dtype) if name in ROUNDED else t for name, t in x.items()}
        exact, cu = {name: t.double() for name, t in x.items()}, torch.tensor([0, STEPS])
        with torch.no_grad():
            loop = _run(rule, exact, "cpu", cu=cu, offset=offset, backend="reference")
            stepped = _run_steps(rule, x, device, offset)
        loop["S"] = torch.cat([exact["initial_state"], loop["S"], exact["initial_state"]])
        expected |= {f"{name} of {decay}": t for name, t in loop.items()}
        found |= {f"{name} of {decay}": t.double().cpu() for name, t in stepped.items()}
    return verdict(found, expected, LIMITS[dtype])


def _run_steps(rule, x, device, offset):
    """{"o", "S"} as of _run, token by token; S a store of three states, of which the tokens touch the middle one."""
    x = {name: t.to(device) for name, t in x.items()}
    state, slots = x.pop("initial_state"), torch.tensor([1], device=device)
    store = state.repeat(3, *[1] * (state.ndim - 1))
    if rule == "gsa":
        keys, values = store.split([x["k"].shape[-1], x["v"].shape[-1]], -1)
        store = keys.contiguous(), values.contiguous()
    outputs = []
    for t in range(STEPS):
        token = [y[:, t] if y.ndim > 2 else y for y in x.values()]  # what is a head's has no token
        seen = {} if offset is None else {"offset": ((offset + t) % MINI_BATCH).repeat(3).to(device)}
        o, store = decoding.step(rule, store, *token, **seen, slots=slots, backend="triton")
        outputs.append(o)
    return {"o": torch.stack(outputs, 1), "S": torch.cat(store, -1) if rule == "gsa" else store}


def takes_step(rule, K, V):
    """Whether there is a one-token kernel for such heads: those that learn online take fewer channels, TTT K = V."""
    if rule not in ("ttt_linear", "titans_linear"):
        return True
    return max(K, V) <= online.MAX_WIDTH and (rule == "titans_linear" or K == V)
