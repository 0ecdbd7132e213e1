"""Everything that a first visit to a GPU should tell, in minutes: see docs/kernels.md, "On a GPU"."""

import os
import random
import signal
import sys
import time
from contextlib import closing, contextmanager
from importlib.util import find_spec

import torch

from linear_moe.ops.triton.launch import architecture

from . import plan as plans
from .machine import heading, require_gpu
from .peers import load
from .pool import run as run_tasks
from .written import Report

# By which share of the budget each part has to end; what ends early leaves its time to those behind it
ENDS = {"checks and compiling": 0.55, "times": 0.75, "layer": 0.86, "train": 0.96, "decode": 1.0}
PRELOAD = (plans.__name__,)
SPARE = 5  # seconds of the budget for the way out


def run(minutes=8.0, only=None, peer=None, output="gpu_report", device="cuda", plan=None, seed=None):
    """Writes report.md and report.json into the folder `output`, prints a summary; returns how many tasks went wrong.

    minutes: the whole budget. only: one of plans.PARTS. peer: "fla" or None. device, plan, seed: for a test; else
    inputs are drawn fresh. Raises NoGPU, ImportError for a peer that is not installed, ValueError for other arguments.
    """
    began = time.monotonic()
    budget = 60 * minutes - SPARE
    if budget <= 0:
        raise ValueError(f"minutes ({minutes:g}) must be more than {SPARE / 60:.2f}")
    require_gpu(device)
    if peer and find_spec(peer) is None:
        load(f"{peer}:ops", peer)
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    plan = plan or plans.gpu(device, architecture(torch.device(device)), peer, seed)
    report = Report(output, f"{heading(device)}, seed {seed}", " ".join(sys.argv))
    with _ends_by_exception():
        for phase, tasks, workers in phases(plan, only):
            share = 1.0 if phase in (only, "checks") else ENDS[phase]
            with closing(run_tasks(tasks, workers, began + share * budget, PRELOAD)) as outcomes:
                for outcome in outcomes:
                    report.add(outcome)
                    if outcome.bad:
                        print(f"{outcome.status}: {outcome.task.name}: {outcome.text}", flush=True)
            print(f"{phase}: done after {time.monotonic() - began:.0f} s", flush=True)
    result, *tables = report.summary()
    print("\n\n".join([*tables, result]), flush=True)  # where only the end of the output is kept, the result is in it
    return len(report.bad)


def phases(plan, only):
    """(name, tasks, how many at once): on all cores what compiles, checks among it; then, alone, what is timed."""
    if only == "checks":
        yield "checks", plan.checks, len(os.sched_getaffinity(0))
        return
    parts = [only] if only else list(plan.timed)
    compiling = [task for part in parts for task in plan.compiling.get(part, [])]
    checks, half = ([], 0) if only else (plan.checks, len(plan.checks) // 2)
    # Of the checks the more important half comes before what is compiled for the times
    first = [*checks[:half], *compiling, *checks[half:]]
    yield "checks and compiling", first, len(os.sched_getaffinity(0))
    for part in parts:
        yield part, plan.timed[part], 1


@contextmanager
def _ends_by_exception():
    """So that whoever ends this process, politely, ends its children too."""

    def leave(*_):
        sys.exit("ended from outside")

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
