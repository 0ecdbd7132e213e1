"""Remakes the tuning table's entries of the GPU at hand: `linear-moe benchmark --tune`.

Coordinate descent from the present entry: every tile size, warps and stages a step up and down, in turns, as long as
the ops that use the kernel get faster. Whole ops are timed, so that a kernel is not tuned at the expense of the next.
What does not compile, does not fit or changes the result is out.
"""

import copy
import itertools
import os
from dataclasses import replace

import torch

from linear_moe.ops.triton import launch, tuning

from .binary import SHARED, TARGETS, Build, compile_all
from .compare import TOLERANCE, relative_error
from .machine import heading, require_gpu
from .tables import save, table
from .timing import measure
from .workload import CASES, Shape, record

WIDTHS = list(itertools.product(tuning.WIDTHS, repeat=2))
RANGES = {"num_warps": (1, 16), "num_stages": (1, 5), "L": (1, 32), "STEPS": (1, 16), "BAND": (1, 32), "BT": (1, 4096)}
TILES, LARGE_TILES = (16, 256), (64, 16384)  # of the sizes that are not in RANGES; TILE counts elements, not rows
TYPICAL = ("delta scalar", "delta channel", "attention scalar", "attention channel", "conv of reads", "conv of writes")
BETTER = 0.98  # a change must win 2 % to be kept


def neighbours(entry):
    """Entries one step from this one in one option: twice and half of it, one more and one less stage."""
    found = []
    for name, value in entry.items():
        low, high = RANGES.get(name, LARGE_TILES if name == "TILE" else TILES)
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        found += [{**entry, name: step} for step in steps if low <= step <= high]
    return found


def key(K, V):
    """The table's key for widths K and V; "*" for kernels that have none."""
    return f"{K}x{V}" if K and V else "*"


def uses(K, V, architecture):
    """{(kernel, key): cases that look it up}, in bfloat16."""
    found, lookup = {}, tuning.lookup

    def noting(name, *widths):
        wanted.add((name, key(*(next((w for w in tuning.WIDTHS if 0 < d <= w), 0) for d in widths[:2]))))
        return lookup(name, *widths)

    for case in CASES:
        wanted, tuning.lookup = set(), noting
        try:
            record(case, Shape(K, V), architecture)
        finally:
            tuning.lookup = lookup
        for use in wanted:
            found.setdefault(use, []).append(case)
    return found


class Trial:
    """The ops that one entry serves, on the GPU."""

    def __init__(self, name, key, cases, shape, architecture, repeats):
        self.name, self.key, self.shape, self.architecture, self.repeats = name, key, shape, architecture, repeats
        self.cases = sorted(cases, key=lambda case: case.name not in TYPICAL)[:3]
        self.prepared = [case.prepare(shape) for case in self.cases]
        self.entry = tuning.lookup(name, shape.K, shape.V, architecture)
        self.expected = self.results()

    def set(self, entry):
        tuning.table()[self.architecture][self.name][self.key] = entry
        tuning.lookup.cache_clear()

    def results(self):
        return [[x.detach() for x in case.run(*given)] for case, given in zip(self.cases, self.prepared)]

    def builds(self, entry):
        """What the entry compiles to."""
        self.set(entry)
        shape = replace(self.shape, device="meta")
        return [Build(one, self.architecture) for case in self.cases for one in record(case, shape, self.architecture)]

    def milliseconds(self, entry):
        """Of all cases together; infinity where it fails or gives something else."""
        self.set(entry)
        try:
            for expected, found in zip(self.expected, self.results()):
                checked = [(a, b) for a, b in zip(expected, found) if a.any()]
                if not all(relative_error(b, a) <= TOLERANCE for a, b in checked):  # nan too
                    return float("inf")
            sides = [
                (lambda case=c, given=g: case.run(*given), [([], None)]) for c, g in zip(self.cases, self.prepared)
            ]
            return sum(measure(sides, self.shape.device, self.repeats, modes=("forward",))["forward"])
        except Exception as error:  # whatever the compiler or the driver raises: the candidate is out
            print(f"  {entry}: {type(error).__name__}")
            return float("inf")

    def search(self, rounds):
        """(best entry, its milliseconds, the present one's)."""
        best = self.entry
        present = fastest = self.milliseconds(best)
        for _ in range(rounds):
            candidates = self.fitting(neighbours(best))
            timed = [(self.milliseconds(entry), i, entry) for i, entry in enumerate(candidates)]
            time, _, entry = min(timed, default=(float("inf"), 0, best))
            if time > BETTER * fastest:
                break
            best, fastest = entry, time
        self.set(best)
        return best, fastest, present

    def fitting(self, entries):
        """Those that compile and fit, compiled at once on all cores, so that timing finds them in triton's cache."""
        if self.architecture not in TARGETS:
            return entries
        builds = [self.builds(entry) for entry in entries]
        binaries = iter(compile_all([b for some in builds for b in some], os.cpu_count()))
        limit = SHARED[self.architecture] * 1024
        good = [[not b.error and b.shared <= limit for b in itertools.islice(binaries, len(some))] for some in builds]
        return [entry for entry, fits in zip(entries, good) if all(fits)]


def run(kernel="", widths=WIDTHS, rounds=3, repeats=10, device="cuda"):
    """Tunes every kernel whose name holds `kernel` at every (K, V), prints what changed and writes tuning.json."""
    require_gpu(device)
    own = launch.architecture(torch.device(device))
    entries = tuning.table()
    architecture = own if own in entries else tuning.nearest(own)
    if own not in entries:
        entries[own] = copy.deepcopy(entries[architecture])
    done, rows = set(), []
    for K, V in widths:
        for (name, where), cases in sorted(uses(K, V, own).items(), key=lambda use: use[0]):
            if kernel not in name or (name, where) in done or where not in ("*", key(K, V)):
                continue
            done.add((name, where))
            trial = Trial(name, where, cases, Shape(K, V, device=device), own, repeats)
            best, after, before = trial.search(rounds)
            rows.append((name, where, str(trial.entry), str(best), f"{before:.3f}", f"{after:.3f}"))
            print(" ".join(rows[-1]), flush=True)
            save(tuning.TABLE, entries, sort_keys=True)
    print(f"\n{heading(device)}\n\n{table(('kernel', 'KxV', 'before', 'after', 'ms', 'ms'), rows)}")
