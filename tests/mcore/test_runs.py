"""Runs of the training program as their users see them: what they print, and what breaks them."""

import argparse
import contextlib
import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed.checkpoint import FileSystemReader

from linear_moe.mcore.checkpoint import check_checkpoint
from linear_moe.mcore.damage import TRACKER, _why, damage
from linear_moe.mcore.folder import _take, release_folder
from linear_moe.mcore.quiet import Megatron, in_brief
from tests.mcore.test_pretrain import MOCK, ROOT, TINY, pretrain

STEPS = [*MOCK, "--num-layers", "1", "--layer-pattern", "L", "--eval-iters", "0", "--log-interval", "1"]
STEPS += ["--lr-warmup-iters", "0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 2 iterations with a checkpoint of each, in the folder `out` below its own."""
    folder = tmp_path_factory.mktemp("run")
    run = pretrain(*STEPS, "--train-iters", "2", "--save", "out", "--load", "out", "--save-interval", "1", cwd=folder)
    assert run.returncode == 0, run.stderr[-3000:]
    run.folder = folder
    return run


def test_a_run_prints_what_a_person_reads(run):
    lines = run.stdout.splitlines()
    assert len(lines) < 16 and not run.stderr, run.stderr
    text = run.stdout
    assert "model: 2 layers LE, GatedDeltaNet, MoM of 4 memories (top-2, a shared one), hidden 64" in text
    assert "layout: 1 process on CPU, float32" in text and "schedule: 2 steps, lr 0.001 cosine" in text
    assert "no checkpoint in out yet: starting with random weights" in text and "parameters on the first" in text
    assert "saved checkpoint of iteration 1 to out" in text and "saved checkpoint of iteration 2 to out" in text
    steps = re.findall(
        r"iteration (\d)/2 \|.* lm loss: [\d.]+ .*grad norm: [\d.]+ \| ETA 0:00:\d\d \| tokens/s: \d+", text
    )
    assert steps == ["1", "2"] and "router entropy" in text


def test_a_verbose_run_prints_all(run):
    said = pretrain(*STEPS, "--train-iters", "1", "--verbose", cwd=run.folder).stdout
    assert said.count("\n") > 800 and "end of arguments" in said and "iteration        1/       1 |" in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[Rank 0] (after 10 iterations) memory (MB) | allocated: 1.0", " (after 10 iterations) memory (MB)"),
        ("[Rank 0] (after 10 iterations) memory (MB) | allocated: 0.00", None),
        ("torch.OutOfMemoryError: CUDA out of memory.", "torch.OutOfMemoryError"),
        ("Getting RerunStateMachine state from checkpoint, which cannot be", "Getting RerunStateMachine"),
        (
            "WARNING: TensorBoard writing requested but is not available",
            "WARNING: TensorBoard writing requested but is",
        ),
        ("could not load the checkpoint", "could not load"),
        ("[exiting program after 2.0 minutes] datetime: 2026-11-27", " exiting program after 2.0 minutes"),
        (
            "  successfully saved checkpoint from iteration      10 to a b [ t 1/1 ]",
            " saved checkpoint of iteration 10 to a b",
        ),
        (
            " validation loss at iteration 1 | lm loss value: 1.0 |",
            " validation loss at iteration 1 | lm loss value: 1.0 |",
        ),
        ("  exit_interval ................... None", None),
        ("training ...", None),
    ],
)
def test_lines_that_matter(line, said):
    assert in_brief(line).startswith(said) if said else not in_brief(line)


def test_what_went_wrong_is_said_whole(capsys):
    said = Megatron()
    said.print("training ...\ncould not load the checkpoint\n  because of this")
    said.print(OSError("and of that"))
    said.print("training ...\nnothing else")
    assert capsys.readouterr().out == "training ...\ncould not load the checkpoint\n  because of this\nand of that\n"


def test_what_flags_ask_for_is_shown(tmp_path):
    run = pretrain(*STEPS, "--train-iters", "1", "--timing-log-level", "2", cwd=tmp_path)
    assert run.returncode == 0 and "forward-compute" in run.stdout + run.stderr


def resumed(folder, *flags, **options):
    return pretrain(*STEPS, "--train-iters", "3", "--override-opt-param-scheduler", *flags, cwd=folder, **options)


@pytest.fixture
def copied(run, tmp_path):
    shutil.copytree(run.folder / "out", tmp_path / "out")
    return tmp_path / "out"


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("name", "break_", "message"),
    [
        ("metadata.json", lambda path: path.write_text(""), "damaged: metadata.json is not what Megatron wrote"),
        ("metadata.json", lambda path: path.write_text("[1]"), "damaged: metadata.json is not what Megatron wrote"),
        ("metadata.json", Path.unlink, "incomplete: its save was interrupted"),
        (".metadata", lambda path: path.write_text(""), r"damaged: .metadata cannot be read \(EOFError"),
        (".metadata", lambda path: path.write_text("garbage"), r"damaged: .metadata cannot be read \(Unpickling"),
        (".metadata", Path.unlink, "incomplete: .metadata is missing"),
        ("__0_0.distcp", truncate, r"damaged: __0_0.distcp has 1000 bytes, not \d+ or more"),
        ("__0_0.distcp", Path.unlink, "damaged: __0_0.distcp is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named(copied, name, break_, message):
    last = copied / "iter_0000002"
    assert damage(last) is None
    break_(last / name)
    with pytest.raises(ValueError, match=rf"{last} is {message}.*; whole: iter_0000001 \(--ckpt-step 1 loads") as error:
        check_checkpoint(arguments(copied))
    assert "\n" not in str(error.value)


def arguments(folder):
    return argparse.Namespace(load=str(folder), save=None, skip_train=False, pretrained_checkpoint=None, finetune=False)


def test_common_state_that_is_garbage(copied):
    last = copied / "iter_0000002"
    (last / "common.pt").write_text("garbage")  # where older versions of Megatron keep it
    with pytest.raises(ValueError, match=rf"{last} is damaged: what it says of itself cannot be read .*--ckpt-step 1"):
        check_checkpoint(arguments(copied))


def test_a_run_refuses_what_it_would_overwrite_or_disturb(copied):
    over = resumed(copied.parent, "--save", "out")
    assert over.returncode == 1 and "error: out has checkpoints (iteration 2), which this run" in over.stderr
    assert _take(copied) is None
    try:
        second = resumed(copied.parent, "--load", "out", "--save", "out")
    finally:
        release_folder()
    assert second.returncode == 1 and "Traceback" not in second.stderr
    assert f"error: --save out belongs to a run that goes on (process {os.getpid()} on" in second.stderr


def test_a_checkpoint_of_another_folder_is_checked_too(copied):
    args = arguments(copied)
    args.load, args.pretrained_checkpoint = None, args.load
    truncate(copied / "iter_0000002" / "__0_0.distcp")
    with pytest.raises(ValueError, match=r"damaged: __0_0\.distcp has 1000 bytes"):
        check_checkpoint(args)
    args.pretrained_checkpoint = "nowhere"
    with pytest.raises(ValueError, match="--pretrained-checkpoint nowhere has no checkpoint"):
        check_checkpoint(args)


@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
def test_garbage_that_only_reading_shows(copied, flag):
    last = copied / "iter_0000002"
    parts = FileSystemReader(last).read_metadata().storage_data.items()
    part = next(part for index, part in parts if "word_embeddings" in index.fqn)
    with open(last / part.relative_path, "r+b") as file:
        file.seek(part.offset)
        file.write(bytes(part.length))
    run = resumed(copied.parent, flag, "out")
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr[-2000:]
    assert re.search(
        r"error: out/iter_0000002 is damaged: it cannot be read \(.*\); whole: iter_0000001 \(--ckpt-step 1", run.stderr
    )


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    assert _why(tmp_path, ValueError()) is None
    assert _why(tmp_path, OSError(errno.ENOSPC, "")).startswith(f"the disk of {tmp_path} is full (")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: argparse.Namespace(free=1000))
    assert _why(tmp_path, RuntimeError()) == f"the disk of {tmp_path} is full (0.0 MiB free)"


def test_a_save_that_cannot_be_written(copied):
    """For a limit on the size of files; torch's error does not say why, Python's does."""
    limit = 2**19
    run = resumed(
        copied.parent, "--load", "out", "--save", "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr[-3000:]
    assert re.search(r"error: iteration 3 could not be saved: writing to out failed \((Runtime|OS)Error: ", run.stderr)
    assert "iter_0000003 is incomplete and can go" in run.stderr
    assert "whole: iter_0000001, iter_0000002" in run.stderr
    assert (copied / TRACKER).read_text() == "2" and damage(copied / "iter_0000002") is None


@pytest.mark.parametrize(
    "flags", [[], "--async-save --use-persistent-ckpt-worker --async-strategy mcore".split()], ids=["sync", "async"]
)
def test_a_killed_run_leaves_no_process(flags, tmp_path):
    """kill -9 after the first save, which starts no process unless it is told to save beside the training."""
    command = [
        sys.executable,
        str(ROOT / "examples" / "pretrain.py"),
        "--config",
        TINY,
        *STEPS,
        "--train-iters",
        "99999",
    ]
    command += ["--save", "out", "--save-interval", "1", *flags]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out" / TRACKER).exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert run.poll() is None and (tmp_path / "out" / TRACKER).exists(), (tmp_path / "log").read_text()[-3000:]
        children = psutil.Process(run.pid).children(recursive=True)
        assert bool(children) == bool(flags)
        run.kill()
        run.wait()
        assert not psutil.wait_procs(children, timeout=10)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
