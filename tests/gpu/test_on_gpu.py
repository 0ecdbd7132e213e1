"""Where there is a GPU: the rules and the model compute there what they compute on the CPU, and training runs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="this machine has no NVIDIA GPU")


def run(environment, *command):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_computes_what_the_cpu_computes(gpu_environment):
    assert "all agree" in run(gpu_environment, "tests/gpu/check.py", "cuda")


@pytest.mark.parametrize("flags", [[], ["--bf16"], ["--bf16", "--mixer", "gla"]], ids=" ".join)
def test_trains(gpu_environment, flags):
    mock = "--mock-data --tokenizer-type NullTokenizer --vocab-size 511 --train-iters 20 --transformer-impl local"
    output = run(
        gpu_environment, "examples/pretrain.py", "--config", "examples/configs/tiny.yaml", *mock.split(), *flags
    )
    losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", output)]
    assert losses[-1] < losses[0]
