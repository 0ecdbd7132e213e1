"""The evaluation tool from outside: a real run of recall, and what it says of bad arguments."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from linear_moe.evaluation import mqar as library
from linear_moe.evaluation.mqar import plan, sweep
from linear_moe.evaluation.mqar_task import Task

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "evaluate.py"
TASK = ["--seq-length", "16", "--pairs", "2", "4", "--vocab-size", "16"]
TINY = "{hidden-size: 32, ffn-hidden-size: 32, num-layers: 1}"


def mqar(*words, timeout=500):
    command = [sys.executable, str(TOOL), "mqar", *map(str, words)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def test_a_small_model_learns_to_recall(tmp_path, monkeypatch):
    """One layer in 150 steps: chance is 1/8. Called again, it shows the result and trains nothing."""
    words = [*TASK, "--models", "gated_deltanet", "--options", TINY, "--seeds", 1, "--steps", 150, "--lrs", 5e-3]
    words += ["--examples", 128, "--output", tmp_path]
    done = mqar(*words)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert result["test"]["recall_of"]["2"] > 0.6 and result["validation"]["recall"] > 0.5
    assert result["loss_curve"][-1][1] < 1.2 < 2 < result["loss_curve"][0][1]
    assert result["state"] == 32 * 32 and result["tail"] == 3 * 3 * 32 and result["seconds"] > 0
    assert "| gated_deltanet | 1,024 | 288 |" in (tmp_path / "mqar.md").read_text()
    assert (tmp_path / "mqar.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(library, "_train", None)  # nothing is trained again
    monkeypatch.setattr(sys, "argv", ["evaluate", "mqar", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert end.value.code is None
    assert (tmp_path / "results.jsonl").read_text() == json.dumps(result) + "\n"


def test_two_processes_train_alike(tmp_path):
    """Under torchrun, data-parallel: the same examples, the same losses and scores."""
    task, found = Task(16, (2, 4), 16), []
    options = {"hidden-size": 16, "ffn-hidden-size": 16, "num-layers": 1, "mom-balance-coeff": 0.0}
    for processes in (1, 2):
        budget = {"steps": 10, "batch_size": 8, "examples": 32, "processes": processes}
        sizes = {"state_sizes": [], "lrs": [1e-3], "seeds": 1, "equal_parameters": False}
        runs = plan(["gla+mom"], task, options=options, **sizes, **budget)
        found += list(sweep(runs, tmp_path))
    for one, two in zip(*(run["loss_curve"] for run in found)):
        assert one[0] == two[0] and one[1] == pytest.approx(two[1], rel=1e-4)
    for split in ("validation", "test"):
        assert found[0][split]["loss"] == pytest.approx(found[1][split]["loss"], rel=1e-4)
        assert found[0][split]["recall"] == pytest.approx(found[1][split]["recall"], abs=0.05)


def test_bad_arguments_are_one_line(tmp_path):
    done = mqar(*TASK, "--models", "glaa", "--output", tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "unknown mixer 'glaa'; did you mean 'gla'" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
