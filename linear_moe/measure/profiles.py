"""Where the time goes, kernel by kernel, and which part of ours or of torch each kernel is."""

import importlib
import pkgutil
import re
from functools import cache

import torch
from torch.profiler import ProfilerActivity, profile

from linear_moe.ops import triton as ours

PARTS = [  # of what is not ours, by the first pattern that a kernel's name has
    ("matrix products", r"nvjet|gemm|cutlass|cublas|splitK"),
    ("attention", r"flash|fmha|attention"),
    ("optimizer", r"adam|multi_tensor|foreach|lamb|l2norm"),
    ("communication", r"nccl"),
    ("copies", r"memcpy|memset|copy"),
    ("softmax, loss", r"softmax|nll|cross_entropy"),
    ("sums", r"reduce|sum|norm"),
    ("elementwise", r"elementwise|vectorized|index|scatter|gather|cat|fill|pointwise"),
]


def profile_of(run, device, repeats=3):
    """[[kernel, microseconds, launches] of one run], the longest first. On a CPU operations take kernels' place."""
    cuda = torch.device(device).type == "cuda"
    run()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as measured:
        for _ in range(repeats):
            run()
        if cuda:
            torch.cuda.synchronize()
    return rows_of(measured, device, repeats)


def rows_of(measured, device, repeats):
    """The same, of a finished torch profile of that many runs."""
    attribute = "self_device_time_total" if torch.device(device).type == "cuda" else "self_cpu_time_total"
    rows = [[e.key[:100], getattr(e, attribute) / repeats, e.count / repeats] for e in measured.key_averages()]
    return sorted((row for row in rows if row[1] > 0), key=lambda row: -row[1])


def by_part(rows):
    """[[part, microseconds, launches]], of profile rows: ours by the file of the kernel, torch's by PARTS."""
    found = {}
    for name, microseconds, launches in rows:
        total = found.setdefault(part_of(name), [0.0, 0.0])
        total[0] += microseconds
        total[1] += launches
    return sorted(([part, *total] for part, total in found.items()), key=lambda row: -row[1])


def part_of(kernel):
    if kernel in own_kernels():
        return f"ours: {own_kernels()[kernel]}"
    return next((part for part, pattern in PARTS if re.search(pattern, kernel, re.IGNORECASE)), "other")


@cache
def own_kernels():
    """{name of a Triton kernel of ours: its file, or files where several have a kernel of that name}."""
    files = {}
    for module in pkgutil.iter_modules(ours.__path__):
        loaded = importlib.import_module(f"{ours.__name__}.{module.name}")
        functions = [getattr(value, "fn", None) for value in vars(loaded).values()]  # of what triton.jit made
        for function in functions:
            if getattr(function, "__module__", None) == loaded.__name__:
                files.setdefault(function.__name__, []).append(module.name)
    return {name: ", ".join(places) for name, places in files.items()}
