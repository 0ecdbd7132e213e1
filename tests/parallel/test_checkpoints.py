"""Checkpoints that were interrupted, or that belong to another model: what is refused, and what still loads."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from linear_moe.mcore import checkpoint
from tests.parallel import harness
from tests.parallel.launch import Case, run_cases
from tests.parallel.test_layouts import DENSE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, data):
    """A folder with checkpoints of iterations 2, 4 and 5."""
    folder = str(tmp_path_factory.mktemp("saved") / "one")
    case = Case("one", "tests.parallel.test_layouts:train", {"data": data, "flags": DENSE, "save": folder})
    assert run_cases(1, [case])["one"].result.iterations == [1, 2, 3, 4, 5]
    return Path(folder)


def test_killed_while_saving(saved, data, tmp_path):
    """kill -9 in the middle of the third save: the second is whole, loads, and training goes on as if nothing was."""
    command = [sys.executable, "examples/pretrain.py", *harness.TINY, "--data-path", data, *DENSE.split()]
    command += ["--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "1"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}

    def start():
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    child, third, deadline = start(), tmp_path / "iter_0000003", time.monotonic() + 180
    threading.Thread(target=child.stdout.read, daemon=True).start()  # so that it never waits for a reader
    while not third.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert third.exists() and not (third / "metadata.json").exists(), "the kill came too early or too late"
    assert (tmp_path / checkpoint.TRACKER).read_text() == "2"
    (tmp_path / checkpoint.TRACKER).write_text("")  # as if killed one write later, in the tracker itself
    child = start()
    try:
        output = child.communicate(timeout=180)[0]
    finally:
        child.kill()
    assert child.returncode == 0, output[-3000:]
    resumed, whole = harness.read_checkpoint(tmp_path), harness.read_checkpoint(saved)
    assert all(resumed[name].equal(whole[name]) for name in whole)


def arguments(folder, **changes):
    """The arguments under which the checkpoints were saved, as a later run would have them."""
    from megatron.core.dist_checkpointing import load_common_state_dict

    args = load_common_state_dict(str(harness.latest(folder)))["args"]
    args.load = str(folder)
    for name, value in changes.items():
        setattr(args, name, value)
    return args


def test_another_architecture_is_refused(saved):
    checkpoint.check_checkpoint(arguments(saved))
    changes = {"hidden_size": 64, "layer_pattern": "LN", "mixer": "gla", "mom_memories": 2, "mom_single_kv": True}
    changes |= {"attention_output_gate": True, "kv_lora_rank": 8, "moe_router_topk_scaling_factor": 2.5}
    with pytest.raises(ValueError, match="another architecture") as error:
        checkpoint.check_checkpoint(arguments(saved, **changes))
    for name, value in changes.items():
        assert name in str(error.value) and str(value) in str(error.value)
    with pytest.raises(ValueError, match="mixer_args"):
        checkpoint.check_checkpoint(arguments(saved, mixer_args={"conv_size": 3}))
    checkpoint.check_checkpoint(arguments(saved, mixer_args={"conv_size": 4}))  # the default, written out


def test_the_command_line_says_so(saved, data):
    """A user's view: one line that names what differs, no traceback, and an exit code."""
    command = [sys.executable, "examples/pretrain.py", *harness.TINY, "--data-path", data, *DENSE.split()]
    command += ["--load", str(saved), "--mom-memories", "3"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert run.returncode == 1
    assert "error: the checkpoint" in run.stderr and "mom_memories: 4 in the checkpoint, 3 now" in run.stderr
    assert "Traceback" not in run.stderr


def test_optimizer_of_another_precision_is_refused(saved):
    changes = {"params_dtype": torch.bfloat16, "bf16": True}
    with pytest.raises(ValueError, match="--no-load-optim"):
        checkpoint.check_checkpoint(arguments(saved, **changes))
    checkpoint.check_checkpoint(arguments(saved, **changes, no_load_optim=True))


def test_optimizer_state_that_cannot_move_is_refused(saved):
    """Megatron's own default format, which another script may have written, is bound to its TP, PP and EP."""
    args = arguments(saved, tensor_model_parallel_size=2)
    stored = {"distrib_optim_sharding_type": "dp_reshardable"}
    with pytest.raises(ValueError, match=r"tensor_model_parallel_size: 1 -> 2.*load the weights only: --no-load-optim"):
        checkpoint._check_optimizer(saved, arguments(saved), args, stored)
    checkpoint._check_optimizer(saved, arguments(saved), arguments(saved), stored)


def test_incomplete_checkpoint_is_refused(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "one")
    args = arguments(tmp_path / "one")
    (tmp_path / "one" / "iter_0000005" / "metadata.json").unlink()
    with pytest.raises(ValueError, match=r"iter_0000005 is incomplete.*iter_0000002, iter_0000004"):
        checkpoint.check_checkpoint(args)
    args.ckpt_step = 4
    checkpoint.check_checkpoint(args)


def test_nothing_to_load_is_fine(tmp_path):
    checkpoint.check_checkpoint(argparse.Namespace(load=str(tmp_path)))
    checkpoint.check_checkpoint(argparse.Namespace(load=None))
