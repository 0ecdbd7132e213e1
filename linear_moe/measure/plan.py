"""What a report runs, most important first: the tasks of each part, and what they need compiled."""

import itertools
import zlib
from dataclasses import dataclass, replace

import torch

from linear_moe.ops import online
from linear_moe.ops.check_step import OPERANDS
from linear_moe.ops.triton import tuning
from linear_moe.ssm.registry import MIXERS

from . import capture, kernel_benchmark, layer_benchmark, layers, model, parts, rules, timed_tasks, training
from .kernel_benchmark import RULES, Size
from .pool import Task

PARTS = ("checks", "times", "layer", "train", "decode")
LENGTHS = (70, 0, 1, 130)  # of the packed sequences that are checked
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
RAGGED = (256, 200)  # widths that fill no tile
OPS = ("dplr", "rwkv6", "gsa", "ttt", "titans", "route", "conv of reads", "conv of writes", "combine, norm and gate")
OPS += ("grouped projections", "conv", "norm and gate")  # of workload.CASES, beside the rules of kernel_benchmark
ONLINE = ("ttt", "titans")
WIDTHS = ((128, 128), (256, 256))
DECODED = ("gated_deltanet", "gla", "linear_attention", "deltanet", "kda")
CONTEXTS = (1024, 262144)
SHARES = 4  # processes that compile a peer's configurations of one rule
TRAINING = "llama3/340m_pure_mom.yaml"
FLAGS = "--micro-batch-size 4 --global-batch-size 4 --lr-warmup-iters 1 --vocab-size 31999 --log-interval 1"
REPEATS = {"times": 20, "layer": 12, "decode": 5}


@dataclass(frozen=True)
class Plan:
    """checks; timed: {part: tasks that are run alone}; compiling: {part: tasks that fill Triton's cache for it}."""

    checks: list[Task]
    timed: dict[str, list[Task]]
    compiling: dict[str, list[Task]]


def gpu(device, architecture, peer, seed):
    """Everything that a visit to a GPU should tell. architecture: of the tuning table, or nearest to one there."""
    timed, compiling = {}, {}
    timed["times"], compiling["times"] = kernel_times(device, peer)
    timed["layer"], compiling["layer"] = layer_times(device, peer)
    timed["train"], compiling["train"] = training_times(device)
    timed["decode"], compiling["decode"] = decoding_times(device)
    return Plan(all_checks(device, architecture, seed), timed, compiling)


def all_checks(device, architecture, seed):
    """Graphs and models; then all at square widths, bfloat16 first; then rules at the other widths."""
    found = [
        Task("checks", f"capture: {name}", capture.check_capture, (name, device, seed), 60, alone=True)
        for name in capture.SUBJECTS
    ]
    found += [Task("checks", f"model {kind}", model.check_model, (kind, seed), 240, alone=True) for kind in model.KINDS]
    found.append(Task("checks", "routing", parts.check_routing, (device, LENGTHS, seed)))
    for dtype in DTYPES:
        found += part_checks(dtype, device, seed)
        for rule in rules.KERNELS:
            for K, V in (w for w in rules.widths(rule, architecture) if w[0] == w[1]):
                found += rule_checks(rule, K, V, dtype, device, seed)
    for dtype in DTYPES:
        for rule in rules.KERNELS:
            ragged = [] if rule in ("ttt_linear", "titans_linear", "step") else [RAGGED]
            for K, V in [*(w for w in rules.widths(rule, architecture) if w[0] != w[1]), *ragged]:
                found += rule_checks(rule, K, V, dtype, device, seed)
    return found


def rule_checks(rule, K, V, dtype, device, seed, lengths=LENGTHS):
    """The checks of one rule at one width: a task a decay."""
    name, heads = f"{K}x{V} {label(dtype)}", (2, 4) if K != V else (2, 2)  # grouped heads where K is not V
    if rule == "step":
        return [
            Task("checks", f"step {one} {name}", rules.check_steps, (one, (2, 2), K, V, dtype, device, seed))
            for one in OPERANDS
            if rules.takes_step(one, K, V)
        ]
    decays = rules.DECAYS if rule in ("linear_attention", "delta_rule") else ("",)
    return [
        Task("checks", f"{rule} {decay} {name}".replace("  ", " "), rules.check_rule,
             (rule, decay, heads, K, V, dtype, device, lengths, seed_of(seed, rule, decay, K, V)))
        for decay in decays
    ]  # fmt: skip


def part_checks(dtype, device, seed):
    """The checks of what Mixture-of-Memories is made of, and of its layers, in one dtype."""
    functions, found = {"projections": parts.check_grouped, "convolution": parts.check_conv}, []
    functions |= {"norm and gate": parts.check_norm}
    for (name, function), width in itertools.product(functions.items(), tuning.WIDTHS):
        arguments = (width, dtype, device, LENGTHS, seed)
        found.append(Task("checks", f"{name} {width} {label(dtype)}", function, arguments))
    for name, width in itertools.product(MIXERS, tuning.WIDTHS):
        if width == tuning.WIDTHS[0] or name in ("gated_deltanet", "gla"):
            arguments = (name, width, dtype, device, LENGTHS, seed)
            found.append(Task("checks", f"MoM over {name} {width} {label(dtype)}", layers.check_layer, arguments))
    return found


def ahead(name, function, arguments, alone=False):
    """A task that fills Triton's cache; alone where it takes a share of a peer's tuning, which changes its process."""
    return Task("compiling", name, function, arguments, 240, alone)


def kernel_times(device, peer):
    """(tasks, tasks that compile for them): rules beside the peer, then every other op."""
    first, *sizes = kernel_benchmark.SIZES
    wanted = [(rule.name, first) for rule in RULES] + [("gated_deltanet", size) for size in sizes]
    wanted += [(rule.name, sizes[-1]) for rule in RULES if rule.name != "gated_deltanet"]
    wanted += [(name, size) for size in sizes if size.D == 256 for name in ("gla", "kda", "mamba2")]
    timed = [Task("times", "this device", timed_tasks.time_machine, (device,), 30)]
    for name, size in wanted:
        arguments = (name, size, device, peer, REPEATS["times"])
        timed.append(Task("times", f"{name} {size}", timed_tasks.time_rule, arguments, 60))
    compiling, shares = [], SHARES if peer else 1
    for name, size in dict.fromkeys((name, replace(size, B=1, T=timed_tasks.WARM_TOKENS)) for name, size in wanted):
        for share in range(shares):
            arguments = (name, size, device, peer, share, shares)
            compiling.append(ahead(f"{name} {size} {share}", timed_tasks.compile_rule, arguments, alone=bool(peer)))
    for widths, op in itertools.product(WIDTHS, OPS):
        if op in ONLINE and max(widths) > online.MAX_WIDTH:
            continue
        compiling.append(ahead(f"{op} {widths}", timed_tasks.compile_case, (op, widths, device)))
        timed.append(Task("times", f"{op} {widths}", timed_tasks.time_case, (op, widths, device, REPEATS["times"]), 60))
    return timed, compiling


def layer_times(device, peer):
    """The same, of the layer."""
    timed, compiling, shares = [], [], SHARES if peer else 1
    for size in layer_benchmark.SIZES:
        timed.append(Task("layer", str(size), timed_tasks.time_layer, (size, device, peer, REPEATS["layer"]), 90))
        for share in range(shares):
            arguments = (size, device, peer, share, shares)
            compiling.append(ahead(f"layer {size} {share}", timed_tasks.compile_layer, arguments, alone=bool(peer)))
    return timed, compiling


def training_times(device):
    """The same, of training steps; lengths are nothing that kernels are compiled for."""
    short = (TRAINING, f"{FLAGS} --seq-length 256", device, 1, 1, 1)
    compiling = [ahead(TRAINING, training.train, short, alone=True)]
    return [Task("train", TRAINING, training.train, (TRAINING, FLAGS, device), 200, alone=True)], compiling


def decoding_times(device):
    """The same, of decoding."""
    timed, compiling, size = [], [], Size(0, 0, 16, 128)
    for sequences, rule in itertools.product((1, 64), DECODED):
        arguments = (rule, sequences, size, CONTEXTS, device, REPEATS["decode"])
        timed.append(Task("decode", f"{rule}, {sequences} sequences", timed_tasks.time_decoding, arguments, 60))
    for rule in DECODED:
        arguments = (rule, 1, size, (timed_tasks.WARM_TOKENS,), device, 1)
        compiling.append(ahead(f"decoding {rule}", timed_tasks.time_decoding, arguments))
    return timed, compiling


def label(dtype):
    return str(dtype).removeprefix("torch.")


def seed_of(seed, *what):
    """A check draws the same inputs in every dtype, and others than its neighbour."""
    return seed + zlib.crc32(repr(what).encode()) % 2**20
