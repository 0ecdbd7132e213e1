"""What the benchmarks say where they cannot run."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark.py"


@pytest.mark.parametrize("command", ("kernels --peer fla", "kernels --peer flash-qla", "mom", "--tune"))
def test_without_a_gpu(command):
    done = subprocess.run([sys.executable, str(TOOL), *command.split()], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: this benchmark measures a GPU")


def test_nothing_to_do():
    done = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True)
    assert done.returncode == 2 and "give a subcommand" in done.stderr
