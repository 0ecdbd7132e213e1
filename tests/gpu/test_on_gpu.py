"""Where there is a GPU: what tools/gpu_report.py checks holds there, all of it, and training runs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="this machine has no NVIDIA GPU")
MINUTES = 20  # mostly for compiling, on all cores


def run(environment, *command, timeout=300):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_computes_what_the_cpu_computes(gpu_environment, tmp_path):
    command = f"tools/gpu_report.py --only checks --minutes {MINUTES} --output {tmp_path}"
    run(gpu_environment, *command.split(), timeout=60 * MINUTES + 60)
    outcomes = json.loads((tmp_path / "report.json").read_text())["outcomes"]
    assert outcomes and {o["status"] for o in outcomes} == {"ok"}, "there was no time for all checks"


@pytest.mark.parametrize("flags", [[], ["--bf16"], ["--bf16", "--mixer", "gla"]], ids=" ".join)
def test_trains(gpu_environment, flags):
    mock = "--mock-data --tokenizer-type NullTokenizer --vocab-size 511 --train-iters 20 --transformer-impl local"
    output = run(gpu_environment, "examples/pretrain.py", "--config", "tiny", *mock.split(), *flags)
    losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", output)]
    assert losses[-1] < losses[0]
