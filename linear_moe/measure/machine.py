"""The machine that is measured: whether it has a GPU, and how a table names it."""

import shutil
import subprocess
from pathlib import Path

import torch


class NoGPU(OSError):
    """This machine has no GPU to measure."""


def require_gpu(device):
    """Raises NoGPU for a CUDA device that is not there."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise NoGPU("this benchmark measures a GPU, and torch.cuda.is_available() is False on this machine")


def heading(device="cuda"):
    """The machine and the commit that a table belongs to."""
    import triton

    name = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "CPU (Triton's interpreter)"
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    changed = " with changes" if _git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{name}, commit {commit}{changed}, torch {torch.__version__}, triton {triton.__version__}"


def _git(*command):
    """What git says of this repository; nothing where there is no git."""
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip()
