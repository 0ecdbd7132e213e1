"""Which tile sizes, warps and stages a kernel runs with: a table in the repository, never a search at start.

`tuning.json` holds {architecture: {kernel: {key: options}}}, where a key is "KxV", the key and value widths of a head
rounded up to 64, 128 or 256, or "*" for any, perhaps followed by " float32". `linear-moe benchmark --tune` remakes
the entries of the GPU it runs on.
"""

import json
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("tuning.json")
WIDTHS = (64, 128, 256)
target = "sm_90"  # the architecture assumed for tensors that are on no GPU (interpreter, meta tensors)


@cache
def table():
    return json.loads(TABLE.read_text())


@cache
def lookup(name, K, V, architecture, wide=False):
    """The options of kernel `name`; an architecture that is not in the table takes the nearest older of its vendor.

    `wide`: for products in float32, whose tiles are twice as large. Widths without an entry take that of the next
    square.
    """
    kernels = table()[nearest(architecture)]
    if name not in kernels:
        raise ValueError(f"kernel {name!r} is not in the tuning table of {nearest(architecture)}")
    K, V = (next(w for w in WIDTHS if d <= w) for d in (K, V))
    square = f"{max(K, V)}x{max(K, V)}"
    keys = [f"{K}x{V}", square, "*"]
    keys = [f"{key} float32" for key in keys] + keys if wide else keys
    return kernels[name][next(key for key in keys if key in kernels[name])]


def nearest(architecture):
    """The architecture of the table whose options serve this one."""
    if architecture in table():
        return architecture
    if architecture.startswith("gfx"):
        return "gfx942"
    number = int(architecture.removeprefix("sm_"))
    # 12.x has far less shared memory than 10.0; what serves sm_80 here fits that, and 8.6 and 8.9 (99 KiB a program)
    older = [a for a in table() if a.startswith("sm_") and int(a.removeprefix("sm_")) <= number]
    return max(older, key=lambda a: int(a.removeprefix("sm_"))) if older and number < 120 else "sm_80"
