"""Tasks in child processes: whatever goes wrong costs one task."""

import os
import time

from linear_moe.measure.pool import Task, run
from tests.measure import broken

PRELOAD = ["linear_moe.measure.plan"]


def alive(pid):
    """Whether there is such a process, one that nobody has waited for not counted."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid, patience=5):
    end = time.monotonic() + patience
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


def test_goes_on_after_everything(tmp_path):
    file = tmp_path / "pid"
    tasks = [
        Task("checks", "first", broken.number),
        Task("checks", "fails", broken.fails),
        Task("checks", "loses its context", broken.loses_context),
        Task("checks", "next", broken.number),
        Task("checks", "crashes", broken.crashes),
        Task("checks", "hangs", broken.hangs, (file,), seconds=3),
        Task("checks", "alone", broken.number, alone=True),
        Task("checks", "last", broken.number),
    ]
    found = {o.task.name: o for o in run(tasks, 1, time.monotonic() + 120, PRELOAD)}
    assert [o.status for o in found.values()] == ["ok", "failed", "failed", "ok", "crashed", "late", "ok", "ok"]
    assert found["fails"].text == "RuntimeError: no such kernel" and "broken.py" in found["fails"].details
    assert found["loses its context"].text == "RuntimeError: CUDA error: an illegal memory access"
    assert found["crashes"].text == "the process died (exit code -6) about to die"
    assert found["hangs"].text == "took longer than 3 s"
    assert gone(int(file.read_text())), "what a task started outlived it"
    processes = {name: int(o.result["row"]["process"]) for name, o in found.items() if o.result}
    assert len({*processes.values()}) == 4
    assert all(gone(pid) for pid in processes.values())
    assert os.getpid() not in processes.values()


def test_ends_at_the_deadline(tmp_path):
    list(run([Task("checks", "first", broken.number)], 1, time.monotonic() + 120, PRELOAD))  # what starts children
    file = tmp_path / "pid"
    tasks = [Task("checks", "hangs", broken.hangs, (file,)), Task("checks", "never begun", broken.number)]
    began = time.monotonic()
    found = [(o.task.name, o.status) for o in run(tasks, 1, began + 3, PRELOAD)]
    assert found == [("hangs", "no time"), ("never begun", "no time")]
    assert time.monotonic() - began < 10 and gone(int(file.read_text()))
