"""Both commands say what is needed where Python is too old, before they make anything."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("target", ["demo", "test"])
@pytest.mark.parametrize("given", [True, False], ids=["named", "found"])
def test_old_python(target, given, tmp_path):
    for name in ("python3.12", "python3", "python"):
        old = tmp_path / name
        old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit 0\nexit 1\n')
        old.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["make", target, f"VENV={tmp_path / 'venv'}", *([f"PYTHON={tmp_path / 'python3'}"] if given else [])]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30)
    assert run.returncode != 0 and not (tmp_path / "venv").exists()
    assert "linear_moe needs Python 3.12 or newer" in run.stdout and "3.9.1" in run.stdout
