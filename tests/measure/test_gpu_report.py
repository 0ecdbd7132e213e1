"""The whole report in small on the CPU, kernels interpreted: it goes on after what goes wrong, and says it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from linear_moe.measure import gpu_report, parts, plan, rules, timed_tasks, training
from linear_moe.measure.kernel_benchmark import Size
from linear_moe.measure.plan import Plan
from linear_moe.measure.pool import Task
from tests.helpers import fresh_seed
from tests.measure import broken
from tests.measure.test_pool import gone

TOOL = Path(__file__).resolve().parents[2] / "tools" / "gpu_report.py"
LENGTHS, WIDTH = (5, 0, 1, 12), 16
SIZE = Size(1, 16, 1, 64)
FLAGS = "--micro-batch-size 2 --global-batch-size 2 --seq-length 32 --vocab-size 511 --log-interval 1"


def small_plan(seed):
    """Something of everything, what is wrong on purpose among it."""
    arguments = (WIDTH, WIDTH, torch.float32, "cpu", seed)
    rule = ("linear_attention", "scalar", (2, 2), *arguments[:4], LENGTHS, seed)
    checks = [
        *plan.rule_checks("linear_attention", *arguments[:4], seed, lengths=LENGTHS)[1:2],
        Task("checks", "wrong on purpose 16x16 float32", broken.wrong_gradient, rule),
        Task("checks", "crashes on purpose", broken.crashes),
        Task("checks", "hangs on purpose", broken.hangs, (Path("/dev/null"),), seconds=3),
        Task("checks", "step 16x16 float32", rules.check_steps, ("delta_rule", (1, 1), *arguments)),
        Task("checks", "norm and gate 16 float32", parts.check_norm, (WIDTH, torch.float32, "cpu", LENGTHS, seed)),
    ]
    ahead = Task("compiling", "retention ahead", timed_tasks.compile_rule, ("retention", SIZE, "cpu", None, 0, 1))
    timed = {
        "times": [
            Task("times", "this device", timed_tasks.time_machine, ("cpu",)),
            Task("times", "retention", timed_tasks.time_rule, ("retention", SIZE, "cpu", None, 1)),
            Task("times", "route", timed_tasks.time_case, ("route", (64, 64), "cpu", 1, 16)),
            Task("times", "fails on purpose", broken.fails),
        ],
        "layer": [Task("layer", str(SIZE), timed_tasks.time_layer, (SIZE, "cpu", None, 1))],
        "train": [Task("train", "tiny", training.train, ("tiny.yaml", FLAGS, "cpu", 1, 1, 1), alone=True)],
        "decode": [Task("decode", "gla", timed_tasks.time_decoding, ("gla", 1, SIZE, (4,), "cpu", 1))],
    }
    return Plan(checks, timed, {"times": [ahead]})


def test_everything(tmp_path, capsys):
    bad = gpu_report.run(20, output=tmp_path, device="cpu", plan=small_plan(fresh_seed()), seed=1)
    text, found = (tmp_path / "report.md").read_text(), json.loads((tmp_path / "report.json").read_text())
    status = {o["name"]: o["status"] for o in found["outcomes"]}
    expected = {"wrong": "wrong", "crashes": "crashed", "hangs": "late", "fails": "failed"}
    assert bad == len(expected)
    for name, word in status.items():
        assert word == (expected[name.split()[0]] if "on purpose" in name else "ok"), (name, word, text)
    assert len(status) == 6 + 1 + 4 + 3
    # What is wrong is named with its error and limit, in the report and at once
    for said in (text, capsys.readouterr().out):
        assert "wrong on purpose 16x16 float32: dg 1.0e-02 (limit 1e-04)" in said
        assert "the process died (exit code -6) about to die" in said
    # Tables: a check's row by dtype, times, parts of a step and profiles
    (row,) = (line for line in text.splitlines() if line.startswith("| linear_attention constant 16x16"))
    assert 0 < float(row.split("|")[2].split()[-1]) < 1e-4
    assert "| retention | 1/16/1/64 |" in text and "| ours MoM, recompute |" in text
    assert "| part of a step |" in text and "### retention 1/16/1/64 ours:" in text
    (step,) = (o["row"] for o in found["outcomes"] if o["part"] == "train")
    assert float(step["tokens/s"]) > 0 and float(step["kernels ms"]) > 0
    (decoding,) = (o["row"] for o in found["outcomes"] if o["part"] == "decode")
    assert float(decoding["after 4"]) > 0


def test_says_what_it_had_no_time_for(tmp_path):
    tasks = [Task("decode", "hangs", broken.hangs, (Path("/dev/null"),)), Task("decode", "next", broken.number)]
    bad = gpu_report.run(0.1, "decode", output=tmp_path, device="cpu", plan=Plan([], {"decode": tasks}, {}))
    assert bad == 0
    assert "## No time was left for\n\n- decode: hangs\n- decode: next" in (tmp_path / "report.md").read_text()


def test_ended_from_outside(tmp_path):
    """What was found until then is written, and no child stays."""
    file = tmp_path / "pid"
    tasks = [Task("decode", "first", broken.number), Task("decode", "hangs", broken.hangs, (file,))]
    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=end_when_there, args=(file,)).start()
    with pytest.raises(SystemExit, match="ended from outside"):
        gpu_report.run(5, "decode", output=tmp_path, device="cpu", plan=Plan([], {"decode": tasks}, {}))
    assert gone(int(file.read_text())) and signal.getsignal(signal.SIGTERM) == before
    assert [o["status"] for o in json.loads((tmp_path / "report.json").read_text())["outcomes"]] == ["ok"]


def end_when_there(file):
    while not (file.exists() and file.read_text()):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


def test_phases_of_the_whole_plan():
    """Checks are first, and every part can be had alone."""
    whole = plan.gpu("cuda", "sm_90", None, 1)
    names = [name for name, _, _ in gpu_report.phases(whole, None)]
    assert names == list(gpu_report.ENDS) and {"checks", *names[1:]} == {*plan.PARTS}
    for part in plan.PARTS:
        tasks = [task for name, some, _ in gpu_report.phases(whole, part) for task in some]
        assert {task.part for task in tasks} - {"compiling"} == {part}
    beside = plan.gpu("cuda", "sm_90", "fla", 1)
    assert all(task.alone for part in ("times", "layer") for task in beside.compiling[part] if "fla" in task.arguments)
    checked = {task.name for task in whole.checks}
    assert len(checked) == len(whole.checks)
    for dtype in ("bfloat16", "float16", "float32"):
        assert {f"delta_rule channel 256x64 {dtype}", f"titans_linear 128x128 {dtype}"} <= checked
        assert {f"MoM over rwkv7 64 {dtype}", f"convolution 128 {dtype}", f"gsa 256x200 {dtype}"} <= checked


def test_refuses_in_one_line(tmp_path):
    done = subprocess.run([sys.executable, TOOL], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: this benchmark measures a GPU")
    assert done.stderr.count("\n") == 1 and not [*tmp_path.iterdir()]
    with pytest.raises(ValueError, match=r"minutes \(0\) must be more than 0.08"):
        gpu_report.run(0)
    with pytest.raises(ImportError, match=r"linear-moe\[peers\]"):
        gpu_report.run(peer="no_such_peer", device="cpu")
