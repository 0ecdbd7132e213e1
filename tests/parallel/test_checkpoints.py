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

from linear_moe.mcore import checkpoint, optimizer_state
from tests.parallel import harness, test_layouts
from tests.parallel.launch import Case, run_cases

ROOT = Path(__file__).resolve().parents[2]
DENSE = f"{test_layouts.DENSE} --train-iters 5"


LONGER = "--train-iters 7 --lr-decay-iters 7 --lr-warmup-iters 1 --lr 4e-2 --min-lr 2e-3 --lr-decay-style linear"
RESUMED = {  # name: flags of a run that goes on from iteration 2
    "new": f"{LONGER} --override-opt-param-scheduler",
    "new-dist": f"{LONGER} --override-opt-param-scheduler --use-distributed-optimizer",
    "kept": f"{LONGER} --use-checkpoint-opt-param-scheduler",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """The run "one", which saves at iterations 2, 4 and 5, and those that go on from it."""
    folder, function = str(tmp_path_factory.mktemp("saved") / "one"), "tests.parallel.test_layouts:train"
    cases = [Case("one", function, {"data": data, "flags": DENSE, "save": folder})]
    for name, flags in RESUMED.items():
        cases.append(Case(name, function, {"data": data, "flags": f"{DENSE} {flags}", "load": folder}))
    return run_cases(1, cases)


@pytest.fixture(scope="module")
def saved(runs):
    """A folder with checkpoints of iterations 2, 4 and 5."""
    assert runs["one"].result.iterations == [1, 2, 3, 4, 5]
    return Path(runs["one"].result.save)


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
        output = child.communicate(timeout=400)[0]
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
    changes = {"hidden_size": 64, "layers": "G-*-G-*-", "mixer": "gla", "mom_memories": 2, "mom_single_kv": True}
    changes |= {"attention_output_gate": True, "kv_lora_rank": 8, "moe_router_topk_scaling_factor": 2.5}
    with pytest.raises(ValueError, match="another architecture") as error:
        checkpoint.check_checkpoint(arguments(saved, **changes))
    for name, value in changes.items():
        assert name in str(error.value) and str(value) in str(error.value)
    with pytest.raises(ValueError, match="mixer_args"):
        checkpoint.check_checkpoint(arguments(saved, mixer_args={"conv_size": 3}))
    checkpoint.check_checkpoint(arguments(saved, mixer_args={"conv_size": 4}))  # the default, written out
    checkpoint.check_checkpoint(arguments(saved, mixer_args={"even_decays": False}))  # only how weights start


def test_another_padding_of_the_vocabulary_is_refused(saved):
    """As Megatron's own under TP 2."""
    with pytest.raises(ValueError, match=r"padded to 384 rows, not 512: .* --padded-vocab-size 384 loads it"):
        checkpoint.check_checkpoint(arguments(saved, padded_vocab_size=512))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_iters": 9}, r"wd_incr_steps 20 -> 36"),
        ({"lr": 0.02, "min_lr": 0.0}, r"max_lr 0\.01 -> 0\.02, min_lr 0\.001 -> 0\.0"),
        ({"global_batch_size": 8}, r"lr_warmup_steps 8 -> 16, lr_decay_steps 40 -> 80, wd_incr_steps 20 -> 40"),
        ({"lr_warmup_fraction": 0.5}, r"lr_warmup_steps 8 -> 20\.0"),
        ({"lr_decay_iters": None}, r"lr_decay_steps 40 -> 20"),
        (
            {"end_weight_decay": 0.2, "lr_decay_style": "linear"},
            r"lr_decay_style cosine -> linear, end_wd 0\.1 -> 0\.2",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_another_schedule_is_refused(saved, changes, message):
    with pytest.raises(ValueError, match=rf"another schedule \({message}; .*--override-opt-param-scheduler") as error:
        checkpoint.check_checkpoint(arguments(saved, **changes))
    assert "\n" not in str(error.value)
    for switch in ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler", "no_load_optim", "finetune"):
        checkpoint.check_checkpoint(arguments(saved, **changes, **{switch: True}))


@pytest.mark.parametrize("name", ["new", "new-dist"])
def test_a_new_schedule_goes_on_from_a_checkpoint(runs, name):
    """Falling from 4e-2 after 1 iteration to 2e-3 after 7; the scheduler steps before the logged rate is taken."""
    run = runs[name].result
    assert run.iterations == [3, 4, 5, 6, 7]
    assert run.learning_rates == pytest.approx([2e-3 + 3.8e-2 * (7 - done) / 6 for done in run.iterations])


def test_groups_are_paired_by_what_they_are_for():
    """A new --lr that happens to be the old --decoupled-lr is still that of everything else."""

    def groups(lr, decoupled):
        rates = [(lr, True), (decoupled, False)]
        return [{"max_lr": rate, "min_lr": 0.0, "wd_mult": 1.0, "default_config": default} for rate, default in rates]

    saved = groups(1e-2, 1e-3)
    assert [optimizer_state._match(group, saved) for group in groups(1e-3, 1e-4)] == saved
    with pytest.raises(ValueError, match=r"no one parameter group for \(.*3\.0.*the order is .*wd_mult.*max_lr"):
        optimizer_state._match({**saved[0], "max_lr": 3.0}, [*saved, {**saved[0], "max_lr": 4.0}])


def test_a_checkpoint_keeps_its_schedule(runs):
    before, after = runs["one"].result, runs["kept"].result
    assert after.learning_rates[:3] == before.learning_rates[2:]
    assert after.losses[:3] == before.losses[2:]


def test_the_command_line_says_so(saved, data):
    """A user's view: one line that names what differs, no traceback, and an exit code."""
    command = [sys.executable, "examples/pretrain.py", *harness.TINY, "--data-path", data, *DENSE.split()]
    command += ["--load", str(saved), "--mom-memories", "3"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
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


def test_random_weights_are_for_the_start_of_training(tmp_path):
    def check(load, save, skip_train=False):
        args = argparse.Namespace(load=load, save=save, skip_train=skip_train, pretrained_checkpoint=None)
        checkpoint.check_checkpoint(args)

    folder = str(tmp_path)
    check(None, None)
    check(None, folder)
    check(folder, f"{folder}/")
    with pytest.raises(ValueError, match=rf"--load {folder} has no checkpoint .*or give the folder of --save"):
        check(folder, None)
    with pytest.raises(ValueError, match=rf"--skip-train evaluates a checkpoint, but {folder} has no checkpoint"):
        check(folder, folder, skip_train=True)
    with pytest.raises(ValueError, match="--skip-train evaluates a checkpoint, but no --load"):
        check(None, None, skip_train=True)
