"""The launch scripts hand torchrun a command that the training program takes; torchrun and Slurm only say it here."""

import os
import subprocess
from pathlib import Path

import pytest

from linear_moe.mcore.arguments import expand_argv
from tests.mcore.test_arguments import parse

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROGRAMS = {"torchrun": 'printf "%s\\n" "$@"', "srun": 'shift; exec "$@"', "scontrol": "echo node7"}
SLURM = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "5"}


@pytest.mark.parametrize(
    ("script", "where"),
    [
        ("train_one_node.sh", "--standalone --nproc-per-node 8"),
        (
            "train_slurm.sbatch",
            "--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node7:29500 --rdzv-id 5",
        ),
    ],
)
def test_command(script, where, tmp_path):
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | SLURM | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GPUS": "8"}
    command = ["bash", EXAMPLES / script, "data/train", "data/bpe", "out", "--mixer", "gla"]
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    words = said.stdout.splitlines()
    start = words.index("-m")
    assert words[:start] == where.split() and words[start : start + 3] == ["-m", "linear_moe", "pretrain"]
    args = parse(expand_argv(words[start + 3 :]))
    assert (args.num_layers, args.mom_memories, args.mixer, args.load) == (24, 4, "gla", "out/checkpoints")
