"""What the benchmarks share: times, memory and the least that an H200 needs.

Times are medians of runs taken in turns over inputs that together do not fit in the L2 cache. Each is the GPU's own: it
works off a short delay while the host already queues the run, unless the run makes the host wait.
"""

import importlib
import os
import shutil
import statistics
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from .triton.report import BANDWIDTH, FLOPS

MODES = ("forward", "backward", "both")
TOLERANCE = 1e-2  # relative error of bf16 results
DELAY = 20_000_000  # GPU clock cycles, about ten milliseconds


class NoGPU(OSError):
    """This machine has no GPU to measure."""


def require_gpu(device):
    """Raises NoGPU for a CUDA device that is not there."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise NoGPU("this benchmark measures a GPU, and torch.cuda.is_available() is False on this machine")


def load(path, peer):
    """The peer's function "module:name"; ImportError that names the extra when it is not installed."""
    module, name = path.split(":")
    if peer == "fla":  # itself, not what else it finds installed
        os.environ |= {"FLA_FLASH_QLA": "0", "FLA_FLASH_KDA": "0", "FLA_TILELANG": "0"}
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        extra = "gpu-peers" if peer == "flash-qla" else "peers"
        raise ImportError(f"--peer {peer} needs it installed: pip install 'linear-moe[{extra}]' ({error})") from error


def heading(device="cuda"):
    """The machine and the commit that a table belongs to."""
    import triton

    name = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "CPU (Triton's interpreter)"
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    changed = " with changes" if _git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{name}, commit {commit}{changed}, torch {torch.__version__}, triton {triton.__version__}"


def _git(*command):
    """What git says of this repository; nothing where there is no git."""
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip()


def gradients(o, inputs, do):
    """Of every input that wants one."""
    return torch.autograd.grad(o, [x for x in inputs if x.requires_grad], do)


def relative(x, reference):
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


def measure(sides, device, repeats, modes=MODES):
    """{mode: milliseconds of every side}; a side is (function, sets of (inputs, gradient of the output) in turns)."""
    warm_up = 3 if torch.device(device).type == "cuda" else 0
    times = {mode: [[] for _ in sides] for mode in modes}
    for turn in range(-warm_up, repeats):
        for mode in modes:
            for (function, draws), found in zip(sides, times[mode]):
                before, timed = _steps(function, *draws[turn % len(draws)])[mode]
                elapsed = milliseconds(device, before, timed)
                if turn >= 0:
                    found.append(elapsed)
    return {mode: [statistics.median(t) for t in found] for mode, found in times.items()}


def _steps(function, inputs, do):
    """(what comes before, what is timed, given its result) for every mode."""

    def forward(_=None):
        return function(*inputs)

    def backward(o):
        return gradients(o, inputs, do)

    return {
        "forward": (lambda: None, forward),
        "backward": (forward, backward),
        "both": (lambda: None, lambda _: backward(forward())),
    }


def milliseconds(device, before, timed):
    """Of timed(before())."""
    return (_gpu_time if torch.device(device).type == "cuda" else _cpu_time)(before, timed)


def _gpu_time(before, timed):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    prepared = before()
    torch.cuda._sleep(DELAY)
    start.record()
    timed(prepared)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _cpu_time(before, timed):
    prepared = before()
    start = time.perf_counter()
    timed(prepared)
    return 1e3 * (time.perf_counter() - start)


def peak(function, inputs, do):
    """MiB that forward and backward allocate at most, beyond what is there before; 0 on a CPU."""
    if not do.is_cuda:
        return 0.0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients(function(*inputs), inputs, do)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def sets(make, device):
    """As many draws as do not fit in the L2 cache together: 2 to 8."""
    first = make()
    if torch.device(device).type != "cuda":
        return [first]
    inputs, do = first
    size = sum(x.nbytes for x in (*inputs, do))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return [first, *(make() for _ in range(min(7, max(1, 2 * cache // size))))]


def floor(inputs, do, flops):
    """{mode: least milliseconds on an H200}. flops: {mode: FLOPs}.

    Forward reads the inputs and writes the output; backward reads the inputs and the output's gradient and writes the
    inputs' gradients. FLOPs are those that our kernels execute (flops.py).
    """
    read = sum(x.nbytes for x in inputs)
    moved = {
        "forward": read + do.nbytes,
        "backward": read + do.nbytes + sum(x.nbytes for x in inputs if x.requires_grad),
    }
    moved["both"] = moved["forward"] + moved["backward"]
    return {mode: 1e3 * max(moved[mode] / BANDWIDTH, flops[mode] / FLOPS) for mode in MODES}


@contextmanager
def graph_of(function):
    """`function` as a captured CUDA graph: gives what replays it, and what it returned, which replays fill anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # first compile and allocate, outside the graph
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    yield graph.replay, result
