"""Which code runs an op: Triton kernels on a GPU, torch elsewhere; `backend=` overrides."""

import os
import re
import warnings
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

BACKENDS = ("auto", "triton", "torch", "reference")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_WIDTH = 256  # of the heads of a rule's kernels
# On an H100 3.6 gave gradients off by 39 % and outputs by 52 % where 3.8 was right; others report 3.4 to 3.7.1.
WRONG_ON_HOPPER = ((3, 4), (3, 8))  # the first version of Triton that compiles wrong code, and the first that does not
UNSAFE = "LINEAR_MOE_UNSAFE_TRITON"


def choose_backend(op, backend, x, *widths, obstacle=None):
    """What runs an op on x, whose heads have those widths: "triton", "torch" or "reference".

    `obstacle`: why the op's kernels cannot run this, where the caller knows. "auto" takes Triton for CUDA tensors;
    where it cannot, it warns once and says why. Raises ValueError for an unknown backend, for "triton" where it cannot
    run, and where it would run wrong code (see check_compiler).
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend ({backend!r}) must be one of {list(BACKENDS)}")
    if backend == "auto":
        if x.device.type != "cuda":
            return "torch"
        reason = obstacle or _obstacle(x, widths)
        if reason:
            _warn_once(f"{op} falls back to torch, which is slower and needs more memory: {reason}")
            return "torch"
        backend = "triton"
    elif backend == "triton" and (reason := obstacle or _obstacle(x, widths)):
        raise ValueError(f"{op}: backend 'triton' cannot run: {reason}")
    if backend == "triton" and x.device.type == "cuda":
        check_compiler()
    return backend


@cache
def check_compiler():
    """Raises ValueError where the installed Triton compiles wrong code for the present GPU, unless UNSAFE is set."""
    if find_spec("triton") is None or os.environ.get(UNSAFE) == "1" or torch.version.hip:
        return
    found = import_module("triton").__version__
    first, mended = WRONG_ON_HOPPER
    if not first <= tuple(map(int, re.findall(r"\d+", found)[:2])) < mended:
        return
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        raise ValueError(
            f"Triton {found} compiles wrong code for Hopper GPUs (sm_90), as 3.4 to 3.7 all do: install 3.8 or newer "
            f"(pip install --no-deps 'triton>=3.8'; images with torch 2.11 bring 3.6), or use backend='torch'; "
            f"{UNSAFE}=1 runs it all the same, to measure it"
        )


def kernels(name):
    """The module linear_moe.ops.triton.<name>, imported when a kernel is first wanted."""
    return import_module(f"linear_moe.ops.triton.{name}")


def without_autocast(device_type):
    """The rules choose their own precision; autocast would run their products in bf16."""
    known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else nullcontext()


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
