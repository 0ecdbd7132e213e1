"""Run many cases in ONE set of processes, forked from one that has imported Megatron, which takes seconds.

    outcomes = run_cases(2, [Case("tp2", "tests.parallel.test_vanilla:train", {"flags": [...]}), ...])
    outcomes["tp2"].results[rank]    # what the function returned; raises with every child's traceback if it failed

Every process runs every case in order, with torch.distributed (gloo) up. A case that raises or outlasts `timeout` on
any rank fails alone: its set of processes is killed and a fresh one runs the cases that remain.
"""

import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GRACE = 3.0  # seconds for the other ranks to report too, once one has failed: the first report is not always the cause


@dataclass(frozen=True)
class Case:
    name: str
    function: str  # "package.module:function", importable in a child
    kwargs: dict = field(default_factory=dict)


@dataclass
class Outcome:
    name: str
    values: list  # one a rank
    error: str = ""
    seconds: float = 0.0

    @property
    def results(self) -> list:
        if self.error:
            raise AssertionError(f"case {self.name!r} failed\n{self.error}")
        return self.values

    @property
    def result(self):
        """Rank 0's."""
        return self.results[0]


def run_cases(world_size: int, cases: list[Case], timeout: float = 300.0) -> dict[str, Outcome]:
    """Run `cases` in `world_size` processes, each within `timeout` seconds. What fails raises in its Outcome only."""
    outcomes: dict[str, Outcome] = {}
    while len(outcomes) < len(cases):
        with _Processes(world_size) as processes:
            for case in cases[len(outcomes) :]:
                # The first case may also wait for the imports.
                outcomes[case.name] = outcome = processes.run(case, timeout + (0 if processes.warm else 120))
                if outcome.error:
                    break
    return outcomes


class _Processes:
    """One set of children, each in its own process group so that what they start dies with them."""

    def __init__(self, world_size: int):
        self.warm = False
        self.folder = Path(tempfile.mkdtemp(prefix="linear_moe_ranks_"))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.parallel.imports"])
        self.children, self.pipes = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            # Not daemonic: Megatron's checkpoint writer starts processes of its own.
            child = context.Process(target=_child, args=(rank, world_size, str(self.folder), there))
            child.start()
            there.close()
            self.children.append(child)
            self.pipes.append(here)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for child in self.children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.kill()  # it may not have had time to lead its own group
        for child in self.children:
            child.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, case: Case, timeout: float) -> Outcome:
        start = time.monotonic()
        deadline, missing = start + timeout, dict(enumerate(self.pipes))
        values, errors = [None] * len(self.pipes), {}
        for pipe in self.pipes:
            with contextlib.suppress(OSError):  # a dead child shows as the end of its pipe below
                pipe.send(case)
        while missing and time.monotonic() < deadline:
            ready = multiprocessing.connection.wait(list(missing.values()), max(0.0, deadline - time.monotonic()))
            for rank in [rank for rank, pipe in missing.items() if pipe in ready]:
                try:
                    ok, value = missing[rank].recv()
                except (EOFError, OSError):
                    self.children[rank].join(1)
                    ok, value = False, f"died with exit code {self.children[rank].exitcode}"
                del missing[rank]
                if ok:
                    values[rank] = value
                elif rank not in errors:
                    errors[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE)
        for rank in missing:
            waited = f"not finished after {time.monotonic() - start:.0f} s"
            errors.setdefault(rank, f"{waited}: hanging, or waiting for a rank that failed")
        self.warm = True
        return Outcome(case.name, values, self._report(errors), time.monotonic() - start)

    def _report(self, errors: dict[int, str]) -> str:
        lines = []
        for rank, error in sorted(errors.items()):
            output = (self.folder / f"rank{rank}.log").read_text(errors="replace")[-2000:]
            lines += [f"--- rank {rank}: {error}", f"--- rank {rank}, end of its output:\n{output}"]
        return "\n".join(lines)


def _child(rank: int, world_size: int, folder: str, pipe) -> None:
    os.setsid()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    log = os.open(f"{folder}/rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.path.insert(0, str(ROOT))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # read by Megatron, not used: the store is a file
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo and the CPU, on a machine with GPUs too
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    while True:
        case = pipe.recv()
        try:
            module, function = case.function.split(":")
            pipe.send((True, getattr(importlib.import_module(module), function)(**case.kwargs)))
        except BaseException:  # Megatron leaves by sys.exit when it is unhappy
            pipe.send((False, traceback.format_exc(limit=-20)))
        sys.stdout.flush()


def _die_with_parent() -> None:
    """A parent that was killed cannot kill: its children watch for that."""
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)
