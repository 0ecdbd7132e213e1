"""Our Triton kernels beside a peer's on one GPU, in one process: errors first, then times, memory and the floor."""

import statistics
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn.functional import logsigmoid, normalize

from linear_moe.ops import api, decoding

from . import flops
from .compare import TOLERANCE, relative_error
from .h200 import floor
from .machine import heading, require_gpu
from .peers import load
from .tables import table
from .timing import MODES, gradients, graph_of, measure, milliseconds, peak, sets

REFERENCE_TOKENS = 200


@dataclass(frozen=True)
class Size:
    """B sequences (packed into one row: B sequences of T tokens each), H key heads, HV value heads of width D."""

    B: int
    T: int
    H: int
    D: int
    HV: int = 0
    packed: bool = False

    def __str__(self):
        heads = f"{self.H}" if self.HV in (0, self.H) else f"{self.H}:{self.HV}"
        return f"{self.B}/{self.T}/{heads}/{self.D}" + (" packed" if self.packed else "")

    def scaled(self, scale):
        """The same with fewer tokens and heads, and at most two sequences."""
        H = max(1, int(self.H * scale))
        HV = H * (self.HV // self.H) if self.HV else 0
        return Size(min(self.B, 2), max(16, int(self.T * scale)), H, self.D, HV, self.packed)


SIZES = [Size(4, 2048, 16, 128), Size(1, 8192, 96, 128), Size(4, 4096, 64, 128)]
SIZES += [Size(8, 2048, 32, 256), Size(2, 16384, 16, 128)]
# FlashQLA's own, with the milliseconds it publishes for an H200: of itself and of fla, and of which direction
FLASH_QLA = {
    Size(1, 8192, 16, 128, 64): "forward 0.397, fla 0.814",
    Size(8, 1024, 8, 128, 32, packed=True): "forward 0.178, fla 0.493",
    Size(1, 32768, 2, 128, 8): "forward 0.320, fla 0.902",
    Size(1, 8192, 16, 128, 32): "backward 0.789, fla 1.444",
    Size(1, 32768, 4, 128, 8): "backward 0.887, fla 2.743",
}


@dataclass(frozen=True)
class Rule:
    """A rule and its twin in fla. decay: dimensions of g, None without; case: of the table of FLOPs."""

    name: str
    ours: str
    decay: int | None
    peer: str  # module:function
    given: tuple[str, ...]  # the peer's names of our inputs, None for one that it makes itself
    case: str
    options: tuple = ()

    @property
    def delta(self):
        return self.ours == "delta_rule"


QKV = ("q", "k", "v")
RULES = [
    Rule("linear_attention", "linear_attention", None, "fla.ops.linear_attn:chunk_linear_attn", QKV,
         "attention no decay", (("normalize", False),)),
    Rule("retention", "linear_attention", 1, "fla.ops.retention:chunk_retention", (*QKV, None), "attention constant"),
    Rule("mamba2", "linear_attention", 3, "fla.ops.simple_gla:chunk_simple_gla", (*QKV, "g"), "attention scalar"),
    Rule("gla", "linear_attention", 4, "fla.ops.gla:chunk_gla", (*QKV, "g"), "attention channel"),
    Rule("deltanet", "delta_rule", None, "fla.ops.delta_rule:chunk_delta_rule", (*QKV, "beta"), "delta no decay"),
    Rule("gated_deltanet", "delta_rule", 3, "fla.ops.gated_delta_rule:chunk_gated_delta_rule", (*QKV, "beta", "g"),
         "delta scalar"),
    Rule("kda", "delta_rule", 4, "fla.ops.kda:chunk_kda", (*QKV, "beta", "g"), "delta channel"),
]  # fmt: skip


def draw(rule, size, device, dtype):
    """{name: tensor} of one set of inputs, in our order. A constant decay is retention's and takes no gradient."""
    B, T, HV = (1, size.B * size.T, size.HV or size.H) if size.packed else (size.B, size.T, size.HV or size.H)
    random = partial(torch.randn, device=device)
    q, k = (normalize(random(B, T, size.H, size.D), dim=-1).to(dtype) for _ in range(2))
    inputs = {"q": q, "k": k, "v": random(B, T, HV, size.D).to(dtype)}
    if rule.delta:
        inputs["beta"] = random(B, T, HV).sigmoid()
    if rule.decay == 1:
        inputs["g"] = (1 - 2.0 ** (-5.0 - torch.arange(HV, device=device))).log()
    elif rule.decay:
        inputs["g"] = logsigmoid(random(*(B, T, HV, size.D)[: rule.decay])) / 16
    return {n: x if n == "g" and rule.decay == 1 else x.requires_grad_() for n, x in inputs.items()}


def borders(size, device, dtype=torch.int32):
    """cu_seqlens of a packed size, else None."""
    return torch.arange(size.B + 1, device=device, dtype=dtype) * size.T if size.packed else None


def ours(rule, size, device, backend="triton"):
    """Our function of one set of inputs."""
    function = getattr(api, rule.ours)
    cu_seqlens = borders(size, device)
    return lambda *x: function(*x, scale=size.D**-0.5, cu_seqlens=cu_seqlens, backend=backend)[0]


def theirs(rule, size, device, peer):
    """The peer's function of the same inputs in the same order."""
    function = load("flash_qla:chunk_gated_delta_rule" if peer == "flash-qla" else rule.peer, peer)
    options = dict(rule.options, scale=size.D**-0.5)
    if size.packed:
        options["cu_seqlens"] = borders(size, device, torch.int64)
    return lambda *x: function(**{n: t for n, t in zip(rule.given, x) if n}, **options)[0]


def errors(functions, rule, size, device, dtype):
    """For each function the relative error of its output, and of its worst gradient, from the float64 reference."""
    H = min(size.H, 2)
    short = Size(min(size.B, 2), min(size.T, REFERENCE_TOKENS), H, size.D, H * size.HV // size.H)
    inputs = [*draw(rule, short, device, dtype).values()]
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    reference = ours(rule, short, device, "reference")(*exact)
    do = torch.randn_like(reference)
    expected = gradients(reference, exact, do)
    found = []
    for make in functions:
        o = make(rule, short, device)(*inputs)
        worst = max(map(relative_error, gradients(o, inputs, do.to(o.dtype)), expected))
        found.append((relative_error(o, reference), worst))
    return found


def kernels(peer=None, repeats=30, rules=None, device="cuda", scale=1.0):
    """Prints a table of every rule at every size; returns how many of our results are wrong in bf16.

    peer: "fla", "flash-qla" (its own shapes and rule) or None. rules: names, None for all. Raises NoGPU, or ImportError
    for a peer that is not installed. On device "cpu" kernels run under the interpreter, in float32, `scale` smaller.
    """
    require_gpu(device)
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    chosen = [rule for rule in RULES if not rules or rule.name in rules]
    if not chosen:
        raise ValueError(f"rules ({', '.join(rules)}) must be among {', '.join(rule.name for rule in RULES)}")
    sizes = {size: "" for size in SIZES}
    if peer == "flash-qla":
        chosen, sizes = [rule for rule in RULES if rule.name == "gated_deltanet"], FLASH_QLA
    makers = [ours] + ([partial(theirs, peer=peer)] if peer else [])
    for rule in chosen if peer else []:
        theirs(rule, SIZES[0], device, peer)  # a missing peer is said before anything is measured
    rows, wrong = [], 0
    for rule in chosen:
        for size, note in sizes.items():
            row, bad = _compare(rule, size.scaled(scale) if scale < 1 else size, makers, device, dtype, repeats)
            rows.append((*row, note) if peer == "flash-qla" else row)
            wrong += bad
            print(f"{rule.name} {size}: done", flush=True)
    header = ["rule", "B/T/H/D", *(f"errors of {x}" for x in ("ours", peer)[: len(makers)])]
    for mode in MODES:
        header += [f"{mode} ms"] + [f"{peer} ms", "x"] * bool(peer) + ["floor ms", "reached"]
    header += ["peak MiB"] + [f"{peer} MiB"] * bool(peer) + ["published ms"] * (peer == "flash-qla")
    print(f"\n{heading(device)}\n\n{table(header, rows)}")
    return wrong


def timed(rule, size, makers, device, dtype, repeats):
    """({mode: milliseconds of every maker's function}, MiB of each, {mode: least milliseconds on an H200}).

    makers: functions such as `ours` of a rule, a size and a device, measured in turns.
    """
    shape = (1, size.B * size.T) if size.packed else (size.B, size.T)
    shape = (*shape, size.HV or size.H, size.D)

    def make():
        return [*draw(rule, size, device, dtype).values()], torch.randn(shape, device=device).to(dtype)

    functions, draws = [maker(rule, size, device) for maker in makers], sets(make, device)
    inputs, do = draws[0]
    memory = [peak(function, inputs, do) for function in functions]
    times = measure([(function, draws) for function in functions], device, repeats)
    work = {mode: count * do[..., 0].numel() for mode, count in flops.of_modes(rule.case, size.D).items()}
    return times, memory, floor(inputs, do, work)


def _compare(rule, size, makers, device, dtype, repeats):
    """One row of the table, and whether our results are wrong."""
    accuracy = errors(makers, rule, size, device, dtype)
    times, memory, least = timed(rule, size, makers, device, dtype, repeats)
    row = [rule.name, str(size), *(f"{o:.0e} {g:.0e}" for o, g in accuracy)]
    for mode in MODES:
        mine, *other = times[mode]
        row += [f"{mine:.3f}", *(cell for t in other for cell in (f"{t:.3f}", f"{t / mine:.2f}"))]
        row += [f"{least[mode]:.3f}", f"{least[mode] / mine:.0%}"]
    return (*row, *(f"{m:.0f}" for m in memory)), any(e > TOLERANCE for e in accuracy[0])


def decode(
    rules=("linear_attention", "gla", "deltanet", "gated_deltanet", "kda"), repeats=10, device="cuda", scale=1.0
):
    """Prints tokens a second of `step` after contexts of 1k to 1M tokens, for batches of 1 and 64 sequences.

    Heads: 16 of width 128. The steps of a run feed each other their states, and are replayed as one CUDA graph.
    """
    require_gpu(device)
    contexts, rows = [max(1, int(1024 * 4**i * scale)) for i in range(6)], []
    for rule in (rule for rule in RULES if rule.name in rules):
        for B in (1, 64) if scale == 1 else (1, 2):
            size = Size(B, 0, max(1, int(16 * scale)), 128)
            speed = [f"{decode_speed(rule, size, context, repeats, device):.0f}" for context in contexts]
            rows.append((rule.name, str(B), *speed))
    header = ("rule", "sequences", *(f"after {context}" for context in contexts))
    print(f"{heading(device)}\n\nTokens a second, all sequences together\n\n{table(header, rows)}")


def decode_speed(rule, size, context, repeats, device, steps=16):
    """Tokens a second of one rule."""
    cuda = torch.device(device).type == "cuda"
    dtype, state, piece = torch.bfloat16 if cuda else torch.float32, None, 65536 // size.B
    with torch.no_grad():
        for start in range(0, context, piece):  # the context, in pieces that fit in memory
            x = draw(rule, replace(size, T=min(piece, context - start)), device, dtype)
            _, state = getattr(api, rule.ours)(**x, initial_state=state, return_state=True, backend="triton")
        x = {name: value if value.ndim == 1 else value[:, -1] for name, value in x.items()}

        def run():
            S = state
            for _ in range(steps):
                _, S = decoding.step(rule.ours, S, *x.values(), backend="triton")

        with graph_of(run) if cuda else nullcontext((run, None)) as (replay, _):
            times = [milliseconds(device, lambda: None, lambda _: replay()) for _ in range(repeats)]
    return size.B * steps / (1e-3 * statistics.median(times))
