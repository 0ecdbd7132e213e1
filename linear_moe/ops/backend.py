"""Which code runs an op: Triton kernels on a GPU, torch elsewhere; `backend=` overrides."""

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

BACKENDS = ("auto", "triton", "torch", "reference")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_WIDTH = 256  # of the heads of a rule's kernels


def choose_backend(op, backend, x, *widths, obstacle=None):
    """What runs an op on x, whose heads have those widths: "triton", "torch" or "reference".

    `obstacle`: why the op's kernels cannot run this, where the caller knows. "auto" takes Triton for CUDA tensors;
    where it cannot, it warns once and says why. Raises ValueError for an unknown backend, or for "triton" where it
    cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend ({backend!r}) must be one of {list(BACKENDS)}")
    if backend == "auto":
        if x.device.type != "cuda":
            return "torch"
        reason = obstacle or _obstacle(x, widths)
        if reason:
            _warn_once(f"{op} falls back to torch, which is slower and needs more memory: {reason}")
        return "torch" if reason else "triton"
    if backend == "triton" and (reason := obstacle or _obstacle(x, widths)):
        raise ValueError(f"{op}: backend 'triton' cannot run: {reason}")
    return backend


def kernels(name):
    """The module linear_moe.ops.triton.<name>, imported when a kernel is first wanted."""
    return import_module(f"linear_moe.ops.triton.{name}")


def _obstacle(x, widths):
    """Why Triton cannot run this, or None."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if x.dtype not in DTYPES:
        return f"its kernels take {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, not {x.dtype}"
    if max(widths, default=0) > MAX_WIDTH:
        return f"its kernels take heads of at most {MAX_WIDTH} channels, not {max(widths)}"
    if x.device.type == "cpu" and not kernels("launch").INTERPRETED:
        return "the tensors are on the CPU (set TRITON_INTERPRET=1 before importing triton to run kernels there)"
    return None


@cache
def _warn_once(message):
    warnings.warn(message, stacklevel=4)
