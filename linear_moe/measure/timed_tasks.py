"""Times: kernels and layers, beside a peer if asked, by kernel; what they need compiled; and decoding."""

from dataclasses import replace
from functools import partial

import torch

from . import flops, layer_benchmark
from .compare import relative_error
from .kernel_benchmark import RULES, Size, decode_speed, draw, ours, theirs, timed
from .peers import keep_share, shorten_tuning
from .profiles import profile_of
from .timing import MODES, gradients, measure, milliseconds, peak
from .workload import CASES, Shape

WARM_TOKENS = 256  # lengths are nothing that kernels are compiled for


def dtype_on(device):
    """The interpreter has no bfloat16."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def rule_of(name):
    return next(rule for rule in RULES if rule.name == name)


def makers(peer):
    if peer:
        shorten_tuning()
    return [ours] + ([partial(theirs, peer=peer)] if peer else [])


def compile_rule(name, size, device, peer, share, shares):
    """What time_rule needs at that size; of the peer's configurations one of `shares` parts."""
    rule, small = rule_of(name), Size(1, min(WARM_TOKENS, size.T), size.H, size.D, size.HV)
    if peer:
        keep_share(share, shares)
    for make in makers(peer)[1 if share else 0 :]:
        inputs = [*draw(rule, small, device, dtype_on(device)).values()]
        o = make(rule, small, device)(*inputs)
        gradients(o, inputs, torch.randn_like(o))
    return {}


def time_rule(name, size, device, peer, repeats):
    """A row of times beside the peer, and profiles of both."""
    rule, dtype, sides = rule_of(name), dtype_on(device), makers(peer)
    times, memory, least = timed(rule, size, sides, device, dtype, repeats)
    row = {"rule": name, "B/T/H/D": str(size)}
    for mode in MODES:
        row |= side_by_side(f"{mode} ms", times[mode], peer)
    row |= {"floor ms": f"{least['both']:.3f}", "reached": f"{least['both'] / times['both'][0]:.0%}"}
    row |= side_by_side("peak MiB", memory, peer, digits=0, ratio=False)
    inputs = [*draw(rule, size, device, dtype).values()]
    functions, found, profiles = [make(rule, size, device) for make in sides], [], {}
    do = torch.randn_like(functions[0](*inputs))
    for who, function in zip(("ours", peer), functions):

        def both(function=function):
            o = function(*inputs)
            return [o, *gradients(o, inputs, do)]

        found.append(both())
        profiles[f"{name} {size} {who}"] = profile_of(both, device)
    if peer:
        row["apart"] = f"{max(map(relative_error, *found)):.0e}"
    per_head = {title.rpartition(".")[2]: count for title, count in flops.of_kernels(rule.case, size.D).items()}
    work = {kernel: count * do[..., 0].numel() for kernel, count in per_head.items()}
    return {"row": row, "profiles": profiles, "flops": work}


def side_by_side(label, values, peer, digits=3, ratio=True):
    """{column: cell} of our value and, where there is one, the peer's."""
    mine, *other = values
    cells = {label: f"{mine:.{digits}f}"}
    for value in other:
        cells |= {f"{peer} {label}": f"{value:.{digits}f}"} | ({f"{label} x": f"{value / mine:.2f}"} if ratio else {})
    return cells


def _prepared(name, widths, device, tokens=0):
    """A case of workload.CASES and its inputs: one sequence of so many tokens, 0 for the whole Shape."""
    case = next(case for case in CASES if case.name == name)
    shape = Shape(*widths, dtype_on(device), device)
    return case, case.prepare(replace(shape, B=1, T=tokens) if tokens else shape)


def compile_case(name, widths, device):
    """What time_case needs."""
    case, prepared = _prepared(name, widths, device, WARM_TOKENS)
    case.run(*prepared)
    case.run(*prepared, backward=False)
    return {}


def time_case(name, widths, device, repeats, tokens=0):
    """A row of times of one op of workload.CASES, ours alone, and its profile."""
    case, prepared = _prepared(name, widths, device, tokens)
    row, runs = {"op": name, "K x V": "{}x{}".format(*widths)}, {"forward": partial(case.run, *prepared, False)}
    if case.backward:
        runs["both"] = partial(case.run, *prepared)
    for label, run in runs.items():
        times = measure([(run, [([], None)])], device, repeats, modes=("forward",))
        row[f"{label} ms"] = f"{times['forward'][0]:.3f}"
    return {"row": row, "profiles": {f"{name} {row['K x V']}": profile_of(run, device)}}


def layer_sides(size, device, peer):
    """The layers that are compared at one size."""
    make, mom, dtype = layer_benchmark.Layer, layer_benchmark.MOM, dtype_on(device)
    layers = {"ours MoM": make(size, mom, dtype, device), "ours plain": make(size, None, dtype, device)}
    layers["ours MoM, recompute"] = make(size, mom, dtype, device, recompute=True)
    if peer:
        shorten_tuning()
        kinds = layer_benchmark.THEIRS
        layers |= {f"{peer} {kind}": layer_benchmark.peer_layer(kind, size, dtype, device) for kind in kinds}
    return [layer_benchmark.Side(name, layer) for name, layer in layers.items()]


def compile_layer(size, device, peer, share, shares):
    """What time_layer needs; of the peer's configurations one of `shares` parts."""
    if peer:
        keep_share(share, shares)
    for side in layer_sides(size, device, peer)[3 if share else 0 :]:
        x = torch.randn(1, min(WARM_TOKENS, size.T), size.H * size.D, device=device, dtype=dtype_on(device))
        inputs = side.inputs(x.requires_grad_())
        gradients(side(*inputs), inputs, torch.ones_like(x))
    return {}


def time_layer(size, device, peer, repeats):
    """Rows of times and memory of our layers and the peer's, and a profile of each."""
    sides, dtype = layer_sides(size, device, peer), dtype_on(device)
    times, saved, draws = layer_benchmark.measured(sides, size, device, dtype, repeats)
    x, do = draws[0]
    rows, profiles, cuda = [], {}, torch.device(device).type == "cuda"
    for i, side in enumerate(sides):
        inputs = side.inputs(x)
        row = {"layer": side.name, "B/T/H/D": str(size)} | {f"{mode} ms": f"{times[mode][i]:.3f}" for mode in MODES}
        if isinstance(side.layer, layer_benchmark.Layer):
            row["floor ms"] = f"{layer_benchmark.least_time(side.layer, size, x, do):.3f}"
        row |= {"saved B/token": f"{saved[i]:.0f}", "peak MiB": f"{peak(side, inputs, do):.0f}"}
        if cuda:
            row["host waits"] = str(layer_benchmark.waits(side, x))
        rows.append(row)
        run = partial(_forward_and_backward, side, inputs, do)
        profiles[f"{side.name} {size}"] = profile_of(run, device)
    return {"rows": rows, "profiles": profiles}


def _forward_and_backward(side, inputs, do):
    return gradients(side(*inputs), inputs, do)


def time_decoding(name, sequences, size, contexts, device, repeats):
    """A row of tokens a second, all sequences together, after contexts of so many tokens."""
    row = {"rule": name, "sequences": str(sequences)}
    for context in contexts:
        speed = decode_speed(rule_of(name), Size(sequences, 0, size.H, size.D), context, repeats, device)
        row[f"after {context}"] = f"{speed:.0f}"
    return {"row": row}


def time_machine(device):
    """What this device can do at most: a large copy, a large product of bf16 matrices."""
    n = 8192 if torch.device(device).type == "cuda" else 64
    a, b = (torch.randn(n, n, device=device).to(dtype_on(device)) for _ in range(2))
    source = torch.randn(2**28 if n > 64 else 2**10, device=device)
    target = torch.empty_like(source)

    def fastest(run):
        run()
        return 1e-3 * min(milliseconds(device, lambda: None, lambda _: run()) for _ in range(5))

    copied = 2 * source.nbytes / fastest(lambda: target.copy_(source))
    multiplied = 2 * n**3 / fastest(lambda: a @ b)
    return {"row": {"copies TB/s": f"{copied / 1e12:.2f}", "multiplies TFLOP/s": f"{multiplied / 1e12:.0f}"}}
