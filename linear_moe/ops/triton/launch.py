"""The one place where kernels are declared and launched.

Sizes that change from step to step (tokens, sequences, rows) are run-time integers, named in RUNTIME, and Triton never
specialises on them: nothing is compiled twice because a sequence, a batch or a memory's share got longer. What the
model fixes (heads, widths, options) is constexpr.
"""

import torch
import triton

from . import tuning

# The only integer arguments: tokens, sequences, rows, chunks, blocks; strides from one batch entry to the next.
RUNTIME = ("B", "T", "N", "R", "NC", "NB", "S_Q", "S_K", "S_V", "S_BETA", "S_G")
INTERPRETED = triton.knobs.runtime.interpret  # kernels run in numpy, on CPU tensors (TRITON_INTERPRET=1)

kernel = triton.jit(do_not_specialize=RUNTIME)
recorded = []  # (kernel, grid, arguments, options) of every launch on meta tensors, which have no values to run on


def launch(function, grid, *args, **options):
    """function[grid](*args, **options) on the device of its tensors; nothing for an empty grid.

    On meta tensors the launch is only recorded: so measure/kernel_report.py learns what is compiled, and a test that no
    value is read.
    """
    if 0 in grid:
        return
    device = next(x.device for x in args if isinstance(x, torch.Tensor))
    if device.type == "meta":
        recorded.append((function, grid, args, options))
    elif device.type == "cuda":
        with torch.cuda.device(device):
            function[grid](*args, **options)
    else:
        function[grid](*args, **options)


def configure(name, K, V, device, dtype=None):
    """The tuned tile sizes, warps and stages of kernel `name` for widths K and V on that device.

    dtype: the operands', where products with float32 states follow from it (all but bfloat16 take them in float32).
    """
    return tuning.lookup(name, K, V, architecture(device), dtype in (torch.float32, torch.float16))


def precision(dtype, device):
    """How products of operands of that dtype, or of float32 made from them, use the matrix units."""
    arch = architecture(device)
    if INTERPRETED or (arch.startswith("gfx") and (dtype == torch.float32 or arch != "gfx942")):
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def architecture(device):
    """The name of the device's architecture in the tuning table."""
    if device.type != "cuda":
        return tuning.target
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
