"""The launch scripts: what they need, said in one line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ARGUMENTS = ["data/train", "data/bpe", "out"]


def start(script, *arguments, programs, folder, **variables):
    """Runs a script on a machine that has bash, a few tools, and the programs given as shell text."""
    for name in ("bash", "env", "dirname", "grep"):
        (folder / name).symlink_to(shutil.which(name))
    for name, text in programs.items():
        (folder / name).write_text(f"#!{shutil.which('bash')}\n{text}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": str(folder)} | variables
    return subprocess.run([EXAMPLES / script, *arguments], env=environment, capture_output=True, text=True, timeout=20)


@pytest.mark.parametrize("programs", [{}, {"nvidia-smi": "exit 9"}, {"nvidia-smi": ""}], ids=["no", "fails", "none"])
def test_no_gpu_is_one_line(programs, tmp_path):
    run = start("train_one_node.sh", *ARGUMENTS, programs=programs, folder=tmp_path)
    assert run.returncode == 1 and not run.stdout and run.stderr.count("\n") == 1
    assert "nvidia-smi finds no GPU here; GPUS=N says how many processes" in run.stderr


@pytest.mark.parametrize("variables", [{}, {"GPUS": "3", "CONFIG": "my.yaml"}], ids=["found", "given"])
def test_starts_a_process_a_gpu(variables, tmp_path):
    programs = {"nvidia-smi": "echo GPU 0; echo GPU 1", "torchrun": 'echo "$@"'}
    run = start("train_one_node.sh", *ARGUMENTS, "--bf16", programs=programs, folder=tmp_path, **variables)
    assert run.returncode == 0, run.stderr
    assert f"--nproc-per-node {variables.get('GPUS', 2)} " in run.stdout
    assert f"--config {variables.get('CONFIG', 'llama3/340m_mom')} " in run.stdout
    assert run.stdout.endswith(
        "--save out/checkpoints --load out/checkpoints --tensorboard-dir out/tensorboard --bf16\n"
    )


@pytest.mark.parametrize("script", ["pretrain.py", "demo.py"])
def test_importing_a_script_is_cheap(script):
    """The processes that it starts import it again."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print({'torch', 'megatron'} & {*sys.modules})"
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, "-c", code, EXAMPLES / script]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.stdout == "set()\n", run.stderr


@pytest.mark.parametrize("script", ["train_one_node.sh", "train_slurm.sbatch"])
def test_missing_arguments_are_one_line_of_usage(script, tmp_path):
    if not os.access(EXAMPLES / script, os.X_OK):  # sbatch reads it
        shutil.copy(EXAMPLES / script, tmp_path / "script")
        (tmp_path / "script").chmod(0o755)
        script = tmp_path / "script"
    run = start(script, "data/train", programs={}, folder=tmp_path)
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert "usage: " in run.stderr and "DATA_PREFIX TOKENIZER OUTPUT [any flag of linear-moe pretrain]" in run.stderr
