"""Megatron's own GPT on CPU: every layout trains like one process, checkpoints reshard, resume is bitwise."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from linear_moe.mcore import checkpoint, cpu
from tests.parallel import harness
from tests.parallel.launch import ROOT, Case, run_cases


class Numbers(torch.utils.data.Dataset):
    """Sample i is a function of i alone."""

    def __init__(self, samples: int, length: int, vocabulary: int):
        self.samples, self.length, self.vocabulary = samples, length, vocabulary

    def __len__(self):
        return self.samples

    def __getitem__(self, i):
        # Multiples of a small step, so that there is something to learn.
        start, step = torch.randint(self.vocabulary, (2,), generator=torch.Generator().manual_seed(int(i)))
        tokens = (start + (step % 4 + 1) * torch.arange(self.length + 1)) % self.vocabulary
        return {"tokens": tokens[:-1], "labels": tokens[1:]}


def pretrain(argv):
    """A user's Megatron script at its smallest."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain as megatron_pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    sys.argv = ["pretrain", *argv]
    args = parse_and_validate_args(extra_args_provider=harness.set_defaults)
    config = gpt_config_from_args(args)
    config.pre_wrap_hooks.append(_reinitialize)

    def datasets(samples, vp_stage=None):
        return [Numbers(max(n or 0, 1), args.seq_length, args.vocab_size) for n in samples]

    datasets.is_distributed = True
    checkpoint.check_checkpoint(args)
    cfg = pretrain_cfg_container_from_args(args, config)
    megatron_pretrain(cfg, datasets, ModelType.encoder_or_decoder, forward_step)


def _reinitialize(chunks):
    from linear_moe.mcore.init import reinitialize

    for chunk in chunks:
        reinitialize(chunk, seed=1234)
    return chunks


def forward_step(data_iterator, model):
    batch = next(data_iterator)
    tokens, labels = batch["tokens"].cuda(), batch["labels"].cuda()
    length = tokens.shape[1]
    positions = torch.arange(length, device="cuda").expand_as(tokens)
    mask = torch.ones(length, length, device="cuda").triu(1).bool()[None, None]
    return model(tokens, positions, mask, labels=labels), _loss


def _loss(output):
    # A sum and a count: Megatron adds them up over microbatches and data-parallel ranks. A mean it takes as it is.
    report = torch.stack([output.detach().float().sum(), torch.tensor(float(output.numel()))])
    return output.float().mean(), {"lm loss": report}


def train(flags=(), save=None, load=None):
    """A case: 5 iterations, checkpoints at 2, 4 and 5; or from iteration 2 of `load` to 5."""
    go_on = ["--load", load, "--ckpt-step", "2"] if load else []
    return harness.train(pretrain, [*harness.TINY, "--save-interval", "2", *flags, *go_on], save)


DIST = "--use-distributed-optimizer"
TP2 = "--tensor-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
VPP = f"{PP2} --num-virtual-stages-per-pipeline-rank 2"
EP2 = "--expert-model-parallel-size 2"
MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 "
    "--moe-token-dispatcher-type alltoall --moe-layer-freq ([0]*2+[1]*2)"  # experts on the second stage only
)
DENSE_LAYOUTS = {
    "one": (1, ""),
    "one-dist": (1, DIST),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "vpp2": (2, VPP),
    "dp2": (2, ""),
    "dp2-dist": (2, DIST),
    "tp2-pp2": (4, f"{TP2} {PP2}"),
    "tp2-dp2-dist": (4, f"{TP2} {DIST}"),
}
MOE_LAYOUTS = {
    "moe": (1, MOE),
    "moe-pp2": (2, f"{MOE} {PP2}"),
    "moe-pp2-dist": (2, f"{MOE} {PP2} {DIST}"),
    "moe-ep2": (2, f"{MOE} {EP2}"),
    "moe-ep2-dist": (2, f"{MOE} {EP2} {DIST}"),
    "moe-dp2-dist": (2, f"{MOE} {DIST}"),
    "moe-pp2-ep2-dist": (4, f"{MOE} {PP2} {EP2} {DIST}"),
    "moe-vpp2-ep2": (4, f"{MOE} {VPP} {EP2}"),
}
# Random numbers in training: only a resumed run can be held to them, other layouts draw others.
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
DROPOUT_LAYOUTS = {"one-dropout": (1, DROPOUT), "tp2-pp2-dropout": (4, f"{TP2} {PP2} {DROPOUT}")}
BF16_LAYOUTS = {"bf16": (1, "--bf16"), "bf16-dist": (1, f"--bf16 {DIST}"), "bf16-dp2-dist": (2, f"--bf16 {DIST}")}
LAYOUTS = DENSE_LAYOUTS | MOE_LAYOUTS | BF16_LAYOUTS | DROPOUT_LAYOUTS
# A ring through each family: every layout saves once and loads once, and every neighbour differs in something else.
RESHARD = [
    (source, target)
    for family in (list(DENSE_LAYOUTS), list(MOE_LAYOUTS), list(BF16_LAYOUTS))
    for source, target in zip(family, family[1:] + family[:1], strict=True)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vanilla")


def run_all(cases: dict[str, tuple[str, dict]]):
    """{name: (layout, more arguments of `train`)}, one set of processes per world size."""
    outcomes = {}
    for size in (1, 2, 4):
        ours = {name: case for name, case in cases.items() if LAYOUTS[case[0]][0] == size}
        function = "tests.parallel.test_vanilla:train"
        flags = {name: LAYOUTS[layout][1].split() for name, (layout, _) in ours.items()}
        outcomes |= run_cases(size, [Case(n, function, {"flags": flags[n], **more}) for n, (_, more) in ours.items()])
    return outcomes


@pytest.fixture(scope="module")
def straight(folder):
    return run_all({name: (name, {"save": str(folder / name)}) for name in LAYOUTS})


@pytest.fixture(scope="module")
def resumed(straight, folder):
    pairs = [(name, name) for name in LAYOUTS] + RESHARD
    names = {pair: "-from-".join(pair[::-1]) for pair in pairs}
    cases = {names[s, t]: (t, {"save": str(folder / names[s, t]), "load": str(folder / s)}) for s, t in pairs}
    outcomes = run_all(cases)
    return {pair: outcomes[name] for pair, name in names.items()}


@pytest.mark.parametrize("layout", DENSE_LAYOUTS | MOE_LAYOUTS)
def test_trains_like_one_process(straight, layout):
    reference = straight["moe" if layout in MOE_LAYOUTS else "one"].result
    for run in straight[layout].results:
        assert not harness.differences(run, reference)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_is_bitwise(straight, resumed, layout):
    before, after = straight[layout].result, resumed[layout, layout].result
    assert after.iterations == [3, 4, 5]
    assert after.losses == before.losses[2:]
    assert after.grad_norms == before.grad_norms[2:]
    assert after.learning_rates == before.learning_rates[2:]
    assert not harness.same_tensors(after, before)


@pytest.mark.parametrize(("source", "target"), RESHARD, ids=lambda name: name)
def test_reshard(straight, resumed, source, target):
    before, after = straight[source].result, resumed[source, target].result
    before = replace(before, losses=before.losses[2:], grad_norms=before.grad_norms[2:])
    assert not harness.differences(after, before)


# --- bad checkpoints, in one process without torchrun ---------------------------------------------------------------


def test_killed_while_saving(straight, folder, tmp_path):
    """kill -9 in the middle of the third save: the second is whole, loads, and training goes on as if nothing was."""
    assert straight["one"].result
    program = "import sys; from tests.parallel import test_vanilla; test_vanilla.alone(sys.argv[1:])"
    command = [sys.executable, "-c", program, "--save", str(tmp_path), "--load", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}

    def start():
        return subprocess.Popen(
            [*command, "--save-interval", "1"], cwd=ROOT, env=environment, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    child, third, deadline = start(), tmp_path / "iter_0000003", time.monotonic() + 120
    threading.Thread(target=child.stdout.read, daemon=True).start()  # so that it never waits for a reader
    while not third.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert third.exists() and not (third / "metadata.json").exists(), "the kill came too early or too late"
    assert (tmp_path / checkpoint.TRACKER).read_text() == "2"
    (tmp_path / checkpoint.TRACKER).write_text("")  # as if killed one write later, in the tracker itself
    child = start()
    output = child.communicate(timeout=120)[0]
    assert child.returncode == 0, output[-3000:]
    resumed, whole = harness.read_checkpoint(tmp_path), straight["one"].result.tensors
    assert all(resumed[name].equal(whole[name]) for name in whole)


def alone(argv):
    """What a script does: no harness, no torchrun."""
    cpu.enable_cpu()
    checkpoint.patch_megatron()
    pretrain([*harness.TINY, *argv])


def saved_arguments(folder, **changes):
    """The arguments under which straight["one"] was saved, as a later run would have them."""
    from megatron.core.dist_checkpointing import load_common_state_dict

    cpu.enable_cpu()
    args = load_common_state_dict(str(harness.latest(folder)))["args"]
    args.load = str(folder)
    for name, value in changes.items():
        setattr(args, name, value)
    return args


def test_another_architecture_is_refused(straight, folder):
    assert straight["one"].result
    checkpoint.check_checkpoint(saved_arguments(folder / "one"))
    changes = {"hidden_size": 64, "num_layers": 6, "layer_pattern": "LLLN", "mixer": "gla", "mom_memories": 4}
    with pytest.raises(ValueError, match="another architecture") as error:
        checkpoint.check_checkpoint(saved_arguments(folder / "one", **changes))
    for name, value in changes.items():
        assert name in str(error.value) and str(value) in str(error.value)


def test_optimizer_of_another_precision_is_refused(straight, folder):
    assert straight["one"].result
    changes = {"params_dtype": torch.bfloat16, "bf16": True}
    with pytest.raises(ValueError, match="--no-load-optim"):
        checkpoint.check_checkpoint(saved_arguments(folder / "one", **changes))
    checkpoint.check_checkpoint(saved_arguments(folder / "one", **changes, no_load_optim=True))


def test_incomplete_checkpoint_is_refused(straight, folder, tmp_path):
    assert straight["one"].result
    shutil.copytree(folder / "one", tmp_path / "one")
    args = saved_arguments(tmp_path / "one")
    (tmp_path / "one" / "iter_0000005" / "metadata.json").unlink()
    with pytest.raises(ValueError, match=r"iter_0000005 is incomplete.*iter_0000002, iter_0000004"):
        checkpoint.check_checkpoint(args)
    args.ckpt_step = 4
    checkpoint.check_checkpoint(args)


def test_nothing_to_load_is_fine(tmp_path):
    checkpoint.check_checkpoint(argparse.Namespace(load=str(tmp_path)))
    checkpoint.check_checkpoint(argparse.Namespace(load=None))
