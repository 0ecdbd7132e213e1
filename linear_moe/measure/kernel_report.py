"""Every kernel, compiled for every architecture of the tuning table without a GPU, and what an H200 could make of it.

`workload.CASES` run on meta tensors, where launches are only recorded; every distinct launch is compiled. What a kernel
must move and compute gives the least time that it can take on an H200.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass

import torch

from . import count_flops
from .binary import SHARED, TARGETS, Build, compile_all
from .h200 import BANDWIDTH, FLOPS, least_seconds
from .tables import table
from .workload import CASES, Shape, record, title

MAX_SPILLS = 64  # bytes a thread
WIDTHS = [(64, 64), (128, 128), (256, 256), (64, 128), (128, 64), (128, 256)]
QUICK = ("attention scalar", "delta scalar packed", "conv of reads", "grouped projections", "route")


@dataclass(frozen=True)
class Floor:
    """What one kernel must do for one token of a case, and how long that takes an H200 at least."""

    case: str
    width: str
    kernel: str
    launches: int
    bytes_per_token: float
    flops_per_token: float
    nanoseconds_per_token: float

    def row(self):
        bound = "products" if self.flops_per_token / FLOPS > self.bytes_per_token / BANDWIDTH else "memory"
        numbers = (round(self.bytes_per_token), round(self.flops_per_token), f"{self.nanoseconds_per_token:.2f}")
        return self.case, self.width, self.kernel, self.launches, *numbers, bound


@dataclass(frozen=True)
class Part:
    """What is compiled: these cases, for one architecture, one size of heads and one dtype."""

    architecture: str
    K: int
    V: int
    dtype: torch.dtype
    cases: tuple[str, ...]

    @property
    def label(self):
        return f"{self.K}x{self.V} {str(self.dtype).removeprefix('torch.')}"


def parts(quick=False):
    """The parts of a report: of all, or of what CI can afford."""
    names = tuple(case.name for case in CASES)
    if quick:
        dense = tuple(name for name in names if not any(word in name for word in ("packed", "constant", "heads")))
        return [
            Part("sm_90", 128, 128, torch.bfloat16, dense),
            Part("sm_90", 64, 64, torch.float32, ("delta scalar", "grouped projections")),
            Part("gfx942", 128, 128, torch.bfloat16, QUICK),
            Part("sm_80", 64, 64, torch.float16, QUICK),
            Part("sm_100", 128, 128, torch.bfloat16, QUICK),
        ]
    found = [Part(a, K, V, torch.bfloat16, names) for a in TARGETS for K, V in WIDTHS]
    return found + [Part(a, 64, 64, dtype, names) for a in TARGETS for dtype in (torch.float16, torch.float32)]


def collect(wanted):
    """Distinct builds of all parts, each with a `label` and the `case` that first needs it."""
    builds = {}
    for part in wanted:
        for case in CASES:
            if case.name in part.cases:
                for recorded in record(case, Shape(part.K, part.V, part.dtype), part.architecture):
                    build = Build(recorded, part.architecture)
                    build.label, build.case, build.dtype = part.label, case.name, part.dtype
                    builds.setdefault(build.key, build)
    return [*builds.values()]


def problems(build, binary, max_spills=MAX_SPILLS):
    """What makes the report fail, as sentences."""
    if binary.error:
        return [f"does not compile: {binary.error}"]
    found, limit = [], SHARED[build.architecture]
    if binary.spills > max_spills:
        found.append(f"spills {binary.spills} bytes a thread, more than {max_spills}")
    if binary.shared > limit * 1024:
        found.append(f"wants {binary.shared / 1024:.0f} KiB of shared memory, and a block has {limit}")
    if binary.matrix and not binary.tensor_cores and build.dtype == torch.bfloat16:
        found.append("multiplies matrices without tensor cores")
    if binary.transposed:
        found.append(f"multiplies the transpose of another product: {', '.join(binary.transposed)}")
    if build.fixed_integers:
        found.append(f"would be compiled anew for values of {', '.join(build.fixed_integers)}")
    return found


def launches_of(widths, names, kernels=""):
    """{(case, (K, V), kernel): bytes a token of every launch}, in bfloat16 and with the tiles of sm_90.

    Tokens are those of `Shape`, with its 8 heads. Bytes: every tensor argument once.
    """
    moved = {}
    for width in widths:
        shape = Shape(*width)
        for case in (case for case in CASES if case.name in names):
            for kernel, _, args, _ in record(case, shape, "sm_90"):
                if kernels in title(kernel):
                    moved.setdefault((case.name, width, title(kernel)), []).append(_bytes(args) / case.tokens(shape))
    return moved


def floors(moved, flops):
    """What every kernel of every case must do, forward and backward: rows of Floor's fields.

    moved: of `launches_of`; flops: of count_flops.count_flops. The least time is that of the bytes or of the FLOPs, the
    longer of the two, on an H200.
    """
    for (case, (K, V), kernel), sizes in moved.items():
        size = sum(sizes)
        work = flops[f"{K}x{V}"][case][kernel] if flops else 0
        yield Floor(case, f"{K}x{V}", kernel, len(sizes), size, work, 1e9 * least_seconds(size, work))


def _bytes(args):
    """Bytes of the tensors among args, each counted once however often it is given."""
    tensors = {id(x): x for x in args if isinstance(x, torch.Tensor)}.values()
    return sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors)


def run(quick=False, json_path=None, architectures=None, kernels="", max_spills=MAX_SPILLS, processes=2):
    """Prints both tables and what is wrong; returns the number of things that are.

    architectures: those to compile for (all); kernels: only those whose name holds this text.
    """
    wanted = [part for part in parts(quick) if not architectures or part.architecture in architectures]
    builds = [build for build in collect(wanted) if kernels in title(build.kernel)]
    halves = [part for part in wanted if part.dtype == torch.bfloat16]
    widths = sorted({(part.K, part.V) for part in halves})
    moved = launches_of(widths, {name for part in halves for name in part.cases}, kernels)
    counting = count_flops.start_counting(sorted({case for case, *_ in moved}), widths)
    done = []

    def progress(i):
        done.append(i)
        if len(done) % 10 == 0 or len(done) == len(builds):
            print(f"{len(done)} of {len(builds)} kernels compiled", file=sys.stderr)

    binaries = compile_all(builds, processes, progress=progress)
    print(table(*_binaries_table(builds, binaries)), flush=True)
    found = [*floors(moved, count_flops.finish_counting(counting))]
    print(f"\nLeast time on an H200 ({BANDWIDTH / 1e12} TB/s, {FLOPS / 1e12:.0f} TFLOP/s), a token of 8 heads, bf16\n")
    header = ("case", "KxV", "kernel", "launches", "bytes", "FLOPs", "ns", "bound by")
    print(table(header, [floor.row() for floor in found]))
    wrong = [(build, problem) for build, b in zip(builds, binaries) for problem in problems(build, b, max_spills)]
    print(f"\n{len(builds)} kernels, {len(wrong)} problems")
    grouped = {}
    for build, problem in wrong:
        grouped.setdefault((build.architecture, title(build.kernel), problem), []).append(f"{build.label} {build.case}")
    for (architecture, kernel, problem), where in grouped.items():
        print(f"{architecture} {kernel}: {problem} ({where[0]}{f' and {len(where) - 1} more' if where[1:] else ''})")
    if json_path:
        with open(json_path, "w") as file:
            json.dump(_json(builds, binaries, found, max_spills), file, indent=1)
    return len(wrong)


def _binaries_table(builds, binaries):
    header = ("arch", "KxV dtype", "kernel", "first used by", "warps", "stages", "registers", "spills", "shared KiB")
    header = (*header, "tensor cores", "remark")
    rows = []
    for build, b in zip(builds, binaries):
        what = (build.architecture, build.label, title(build.kernel), build.case)
        numbers = (build.options.num_warps, build.options.num_stages, b.registers, b.spills, round(b.shared / 1024))
        cores = " ".join(b.tensor_cores) or ("NONE" if b.matrix else "-")
        rows.append((*what, *numbers, cores, "ERROR" if b.error else b.remark))
    return header, rows


def _json(builds, binaries, found, max_spills):
    compiled = [
        {
            "architecture": build.architecture,
            "variant": build.label,
            "kernel": title(build.kernel),
            "case": build.case,
            "constants": {name: str(value) for name, value in build.constants.items()},
            "num_warps": build.options.num_warps,
            "num_stages": build.options.num_stages,
            **dataclasses.asdict(b),
            "problems": problems(build, b, max_spills),
        }
        for build, b in zip(builds, binaries)
    ]
    return {"binaries": compiled, "floors": [dataclasses.asdict(floor) for floor in found]}
