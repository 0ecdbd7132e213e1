"""Tasks in child processes: one that fails, crashes, kills its CUDA context or hangs costs one task, not the rest."""

import multiprocessing
import os
import re
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait

import torch

GOOD, WRONG, FAILED, CRASHED, LATE, CUT = "ok", "wrong", "failed", "crashed", "late", "no time"


@dataclass(frozen=True)
class Task:
    """function(*arguments), importable by name, returns a dictionary, with "ok": False if a check went wrong."""

    part: str  # of the report
    name: str
    function: Callable
    arguments: tuple = ()
    seconds: float = 150  # what takes longer is ended
    alone: bool = False  # in a process of its own, which nothing ran in before


@dataclass
class Outcome:
    """status: one of the words above. text: one line on what went wrong. details: where, for the reader of a log."""

    task: Task
    status: str
    result: dict = field(default_factory=dict)
    text: str = ""
    details: str = ""
    seconds: float = 0.0

    @property
    def bad(self):
        return self.status not in (GOOD, CUT)


def run(tasks, workers, deadline, preload=()):
    """Outcomes of the tasks, as they end, `workers` at a time; of what has not ended by `deadline` as CUT.

    deadline: of time.monotonic(). preload: modules that all processes share from the start. Every process is gone when
    this returns, also by an exception.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    waiting, children = list(tasks)[::-1], []
    try:
        while waiting or any(child.task for child in children):
            if time.monotonic() >= deadline:
                break
            while waiting and (child := _free(children, waiting[-1], workers, context)):
                child.start(waiting.pop())
            busy = [child for child in children if child.task]
            end = min([deadline, *(child.end for child in busy)])
            ready = wait([child.connection for child in busy], max(0.0, end - time.monotonic()))
            for child in busy:
                if child.connection in ready or time.monotonic() >= child.end:
                    yield child.finish(child.connection in ready)
            children = [child for child in children if child.process]
        for task in [*(child.task for child in children if child.task), *waiting[::-1]]:
            yield Outcome(task, CUT)
    finally:
        for child in children:
            child.stop()


def _free(children, task, workers, context):
    """A child that can take the task, or None."""
    idle = [child for child in children if not child.task]
    if idle and not task.alone:
        return idle[0]
    if len(children) >= workers:
        if not idle:
            return None
        idle[0].stop()
        children.remove(idle[0])
    children.append(_Child(context))
    return children[-1]


class _Child:
    """One process, and the task that it works on."""

    def __init__(self, context):
        self.log = tempfile.NamedTemporaryFile(prefix="gpu_report_")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.log.name), daemon=True)
        self.process.start()
        theirs.close()
        self.task = None

    def start(self, task):
        self.task, self.began = task, time.monotonic()
        self.end = self.began + task.seconds
        self.printed = os.path.getsize(self.log.name)
        with suppress(OSError):  # where it died meanwhile, finish() finds out
            self.connection.send(task)

    def finish(self, answered):
        """The Outcome of the task; afterwards the child is free, or gone."""
        task, self.task = self.task, None
        seconds = time.monotonic() - self.began
        if not answered:
            self.stop()
            return Outcome(task, LATE, {}, f"took longer than {task.seconds:g} s", self.output(), seconds)
        try:
            status, result, text, details, usable = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code, output = self.process.exitcode, self.output()
            self.stop()
            last = output.strip().splitlines()[-1:] or [""]
            return Outcome(task, CRASHED, {}, f"the process died (exit code {code}) {last[0][:200]}", output, seconds)
        if task.alone or not usable:
            self.stop()
        return Outcome(task, status, result, text, details, seconds)

    def output(self):
        """What the task has printed: the end of it."""
        with open(self.log.name, errors="replace") as log:
            log.seek(self.printed)
            return log.read()[-4000:]

    def stop(self):
        """Ends the process and what it started."""
        if self.process:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


def _serve(connection, log):
    """The child: works on tasks until nobody sends any."""
    os.setpgrp()
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(_answer(task))


def _answer(task):
    """(status, result, text, details, whether this process can go on)."""
    try:
        result = task.function(*task.arguments)
        _synchronize()
    except BaseException as error:
        return FAILED, {}, one_line(error), traceback.format_exc()[-4000:], _usable()
    return GOOD if result.get("ok", True) else WRONG, result, result.get("text", ""), "", True


def one_line(error):
    """Of an exception's first cause: its type and message, without the kernel that Triton's messages quote."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")] or [""]
    quoted = re.fullmatch(r"at \d+:\d+:", lines[0])
    return f"{type(error).__name__}: {f'{lines[0]} {lines[-1]}' if quoted else lines[0]}"[:300]


def _synchronize():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _usable():
    """An illegal memory access ends a CUDA context: every later call fails."""
    try:
        _synchronize()
    except RuntimeError:
        return False
    return True
