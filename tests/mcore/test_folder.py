"""The folder of --save: who may write there."""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from linear_moe.mcore import folder as folders
from linear_moe.mcore.damage import TRACKER
from linear_moe.mcore.folder import check_folder, hold_folder, release_folder
from tests.parallel.launch import Case, run_cases

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import os, pathlib, sys, time
from linear_moe.mcore.folder import _take
print(_take(pathlib.Path(sys.argv[1])), os.getpid(), flush=True)
os.fork()  # as data workers and checkpoint writers are made
time.sleep(300)
"""


def options(save, load=None, skip_train=False, finetune=False):
    return argparse.Namespace(save=str(save), load=load and str(load), skip_train=skip_train, finetune=finetune)


def test_checkpoints_are_not_overwritten(tmp_path):
    check_folder(options(tmp_path))
    (tmp_path / TRACKER).write_text("20")
    check_folder(options(tmp_path, load=f"{tmp_path}/"))
    check_folder(options(tmp_path, skip_train=True))
    for load in (None, tmp_path / "other"):
        with pytest.raises(ValueError, match=rf"has checkpoints \(iteration 20\).*: --load {tmp_path} goes on"):
            check_folder(options(tmp_path, load))
    with pytest.raises(ValueError, match=r"would overwrite: --finetune starts at iteration 0"):
        check_folder(options(tmp_path, tmp_path, finetune=True))


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=rf"--save {tmp_path}/file/out cannot be written to \(Not a directory\)"):
        check_folder(options(tmp_path / "file" / "out"))

    def refuse(dir):
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"cannot be written to \(Read-only file system\): give another folder"):
        check_folder(options(tmp_path))


def test_a_killed_run_leaves_no_lock(tmp_path):
    """Not even while a process lives that it forked."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert child.stdout.readline().split() == ["None", str(child.pid)]
        refusal = folders._take(tmp_path)
        assert f"--save {tmp_path} belongs to a run that goes on (process {child.pid} on " in refusal
        time.sleep(0.5)  # to fork
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        os.killpg(child.pid, 0)  # the forked process lives
        assert folders._take(tmp_path) is None
    finally:
        release_folder()
        os.killpg(child.pid, signal.SIGKILL)


def test_a_lock_of_somebody_else_is_a_refusal(tmp_path):
    (tmp_path / folders.LOCK).mkdir()  # which cannot be opened for writing, not even by root
    assert "cannot be opened (Is a directory)" in folders._take(tmp_path)


def held(save):
    """A process that takes the folder twice, as a model that is built twice does, and one that comes too late."""
    hold_folder(options(save))
    hold_folder(options(save))
    (Path(save) / TRACKER).write_text("5")
    late = refusal(save)
    release_folder()
    return late


def test_the_same_run_may_take_it_twice(tmp_path):
    late = run_cases(1, [Case("twice", "tests.mcore.test_folder:held", {"save": str(tmp_path)})])["twice"].result
    assert "has checkpoints (iteration 5), which this run would overwrite" in late


def refusal(save):
    with pytest.raises(folders.Refused) as error:
        hold_folder(options(save))
    return str(error.value)


def test_all_ranks_are_refused(tmp_path):
    assert folders._take(tmp_path) is None
    try:
        results = run_cases(2, [Case("second", "tests.mcore.test_folder:refusal", {"save": str(tmp_path)})])
        assert results["second"].results == [results["second"].result] * 2
        assert f"process {os.getpid()} on" in results["second"].result
    finally:
        release_folder()
