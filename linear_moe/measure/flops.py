"""Floating-point operations of our kernels, from a table: counting them takes Triton's interpreter, which not every
machine with a GPU runs.

`python -m linear_moe.measure.flops` counts anew and writes flops.json, for `CASES` and heads as wide as `WIDTHS`: five
minutes.
"""

import json
from functools import cache
from pathlib import Path

from .tables import save

TABLE = Path(__file__).with_name("flops.json")
CASES = ("attention no decay", "attention constant", "attention scalar", "attention channel")
CASES += ("delta no decay", "delta scalar", "delta channel")
WIDTHS = (64, 128, 256)


@cache
def table():
    """{case: {"DxD": {"forward" or "both": {kernel: FLOPs a token and value head}}}}."""
    return json.loads(TABLE.read_text())


def of_kernels(case, D):
    """{kernel: FLOPs a token and value head}, forward and backward together."""
    return table()[case][f"{D}x{D}"]["both"]


def of_modes(case, D):
    """{mode: FLOPs a token and value head}; modes of `timing.MODES`."""
    found = table()[case][f"{D}x{D}"]
    forward, both = (sum(found[mode].values()) for mode in ("forward", "both"))
    return {"forward": forward, "backward": both - forward, "both": both}


def count():
    """The table, counted under the interpreter."""
    from .count_flops import count_flops
    from .workload import Shape

    pairs, found = [(D, D) for D in WIDTHS], {case: {} for case in CASES}
    for mode in ("forward", "both"):
        for width, cases in count_flops(CASES, pairs, backward=mode == "both").items():
            for case, kernels in cases.items():
                per_head = {name: flops / Shape.H for name, flops in kernels.items()}
                found[case].setdefault(width, {})[mode] = per_head
    return found


if __name__ == "__main__":
    save(TABLE, count())
