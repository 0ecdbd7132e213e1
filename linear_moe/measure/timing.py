"""Times and memory of functions, taken in turns.

Times are medians of runs taken in turns over inputs that together do not fit in the L2 cache. Each is the GPU's own: it
works off a short delay while the host already queues the run, unless the run makes the host wait.
"""

import statistics
import time
from contextlib import contextmanager

import torch

MODES = ("forward", "backward", "both")
DELAY = 20_000_000  # GPU clock cycles, about ten milliseconds


def gradients(o, inputs, do):
    """Of every input that wants one."""
    return torch.autograd.grad(o, [x for x in inputs if x.requires_grad], do)


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
