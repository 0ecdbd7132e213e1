"""A hybrid MoM + MoE model trains alike in every parallel layout; checkpoints move between them."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.parallel import harness
from tests.parallel.launch import Case, run_cases

DIST = "--use-distributed-optimizer"
TP2 = "--tensor-model-parallel-size 2"
SP = "--sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
VPP2 = f"{PP2} --num-virtual-stages-per-pipeline-rank 2"
EP2 = "--expert-model-parallel-size 2"
DENSE = (
    "--layer-pattern LLLN --mixer gated_deltanet --mom-memories 4 --mom-topk 2 --mom-z-loss-coeff 1e-2 "
    "--mom-balance-coeff 0.1 --group-query-attention --num-query-groups 2"
)
MOE = (
    f"{DENSE} --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --moe-token-dispatcher-type alltoall "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2"
)
DENSE_LAYOUTS = {  # name: (processes, flags)
    "dense": (1, DENSE),
    "dense-tp2": (2, f"{DENSE} {TP2}"),  # Megatron trains MoE feed-forward under TP only with SP
    "dense-pp2": (2, f"{DENSE} {PP2}"),
    "dense-dp2": (2, DENSE),
    "dense-tp2-pp2": (4, f"{DENSE} {TP2} {PP2}"),
    "dense-tp2-dist": (4, f"{DENSE} {TP2} {DIST}"),
    "dense-per-token": (2, f"{DENSE} --calculate-per-token-loss"),  # no token is masked, so nothing changes
}
MOE_LAYOUTS = {
    "moe": (1, MOE),
    "moe-tp2-sp": (2, f"{MOE} {TP2} {SP}"),
    "moe-pp2": (2, f"{MOE} {PP2}"),
    "moe-vpp2": (2, f"{MOE} {VPP2}"),
    "moe-ep2": (2, f"{MOE} {EP2}"),
    "moe-dp2-dist": (2, f"{MOE} {DIST}"),
    "moe-ep2-dist": (2, f"{MOE} {EP2} {DIST}"),
    "moe-dp2-overlap": (2, f"{MOE} {DIST} --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 2000"),
    "moe-tp2-sp-vpp2": (4, f"{MOE} {TP2} {SP} {VPP2}"),
    "moe-tp2-sp-ep2-dist": (4, f"{MOE} {TP2} {SP} {EP2} {DIST}"),
    "moe-pp2-ep2-dist": (4, f"{MOE} {PP2} {EP2} {DIST}"),
}
PACKED = f"{DENSE} --dataloader-inter-document-masking"
PACKED_LAYOUTS = {
    "packed": (1, PACKED),
    "packed-tp2-sp": (2, f"{PACKED} {TP2} {SP} --mixer-recompute"),  # which changes nothing either
    "packed-tp2-sp-pp2": (4, f"{PACKED} {TP2} {SP} {PP2}"),
}
# Batches of `masked_step`; where the loss is one of tokens, microbatches count different numbers of them.
PER_TOKEN = f"{DENSE} --calculate-per-token-loss"
MASKED_LAYOUTS = {
    "masked": (1, PER_TOKEN),
    "masked-tp2": (2, f"{PER_TOKEN} {TP2}"),
    "masked-tp2-sp": (2, f"{PER_TOKEN} {TP2} {SP}"),
    "masked-dp2": (2, PER_TOKEN),
    "padded": (1, DENSE),
    "padded-tp2-sp-pp2": (4, f"{DENSE} {TP2} {SP} {PP2}"),  # a stage's padding mask is cut, the other's is whole
}
# Softmax layers keep documents apart by a mask as by packing them; experts, so that there are routers.
DOCUMENTS = f"--layer-pattern N {MOE.partition(DENSE)[2]}"
DOCUMENT_LAYOUTS = {
    "documents": (1, f"{DOCUMENTS} --dataloader-inter-document-masking"),
    "documents-reset": (1, f"{DOCUMENTS} --reset-attention-mask"),
    "documents-reset-tp2-sp": (2, f"{DOCUMENTS} --reset-attention-mask {TP2} {SP}"),
}
BF16_LAYOUTS = {
    "bf16": (1, f"{MOE} --bf16"),
    "bf16-dist": (1, f"{MOE} --bf16 {DIST}"),
    "bf16-ep2-dist": (2, f"{MOE} --bf16 {EP2} {DIST}"),
}
# Random numbers in training: only a resumed run can be held to them, other layouts draw others.
DROPOUT = f"{DENSE} --hidden-dropout 0.1 --attention-dropout 0.1"
DROPOUT_LAYOUTS = {"dropout": (1, DROPOUT), "dropout-tp2-sp-pp2": (4, f"{DROPOUT} {TP2} {SP} {PP2}")}
RESUMED = DENSE_LAYOUTS | MOE_LAYOUTS | PACKED_LAYOUTS | BF16_LAYOUTS | DROPOUT_LAYOUTS
EXACT = DENSE_LAYOUTS | MOE_LAYOUTS | PACKED_LAYOUTS | MASKED_LAYOUTS | DOCUMENT_LAYOUTS
LAYOUTS = EXACT | RESUMED
# A ring through each family: every layout's checkpoint is loaded in another layout, and every layout loads another's.
# In bfloat16 only between layouts that compute alike: rounding decides which experts and memories are close calls.
FAMILIES = [list(DENSE_LAYOUTS), list(MOE_LAYOUTS), ["bf16", "bf16-dist"]]
RESHARD = [pair for family in FAMILIES for pair in zip(family, family[1:] + family[:1])]


def one_process(layout: str) -> str:
    return layout.split("-")[0]


def train(data, flags, save=None, load=None):
    """A case: 4 iterations, with checkpoints at 2 and 4; or from iteration 2 of the checkpoints at `load` to 4."""
    from linear_moe.mcore.pretrain import main

    argv = [*harness.TINY, "--data-path", data, "--save-interval", "2", *flags.split()]
    return harness.train(main, argv + (["--load", load, "--ckpt-step", "2"] if load else []), save)


def train_masked(data, flags, save):
    """The same with `masked_step`."""
    from linear_moe.mcore import pretrain

    def main(argv):
        pretrain.train(pretrain.prepare(argv), step=masked_step)

    return harness.train(main, [*harness.TINY, "--data-path", data, *flags.split()], save)


def masked_step(data_iterator, model):
    """A forward step whose last 8 tokens are padding, and whose loss counts of the others every third token id."""
    from megatron.core.utils import get_attr_wrapped_model

    from linear_moe.mcore import pretrain

    batch = pretrain.get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    padding = torch.arange(32).expand(1, 32) >= 24
    if batch["loss_mask"] is not None:
        batch["loss_mask"] = (~padding & (batch["labels"] % 3 == 0)).float()
    options = {"labels": batch["labels"], "loss_mask": batch["loss_mask"], "padding_mask": padding}
    output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], **options)
    return output, partial(pretrain.loss_func, batch["loss_mask"])


def run_all(cases: dict[str, tuple[int, dict]]):
    """name -> (processes, arguments of `train`): one set of processes for each number."""

    def case(name, arguments):
        function = "train_masked" if name in MASKED_LAYOUTS else "train"
        return Case(name, f"tests.parallel.test_layouts:{function}", arguments)

    outcomes = {}
    for size in sorted({size for size, _ in cases.values()}):
        outcomes |= run_cases(size, [case(name, kw) for name, (n, kw) in cases.items() if n == size])
    return outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def straight(folder, data):
    return run_all(
        {
            name: (size, {"data": data, "flags": flags, "save": str(folder / name)})
            for name, (size, flags) in LAYOUTS.items()
        }
    )


@pytest.fixture(scope="module")
def resumed(straight, folder, data):
    pairs = [(name, name) for name in RESUMED] + RESHARD
    cases = {}
    for source, target in pairs:
        size, flags = LAYOUTS[target]
        paths = {"save": str(folder / f"{target}-from-{source}"), "load": str(folder / source)}
        cases[f"{target}-from-{source}"] = (size, {"data": data, "flags": flags, **paths})
    outcomes = run_all(cases)
    return {(s, t): outcomes[f"{t}-from-{s}"] for s, t in pairs}


def last_iterations(run):
    """What a run that resumed at iteration 2 must repeat."""
    return replace(run, losses=run.losses[2:], grad_norms=run.grad_norms[2:], figures=run.figures[2:])


@pytest.mark.parametrize("layout", EXACT)
def test_layout_trains_like_one_process(straight, layout):
    reference = straight[one_process(layout)].result
    assert reference.losses[-1] < reference.losses[0]
    assert any("exp_avg" in name and "router" in name for name in reference.tensors)  # MoM's router gradients, too
    for run in straight[layout].results:
        assert not harness.differences(run, reference)


@pytest.mark.parametrize("layout", RESUMED)
def test_resume_is_bitwise(straight, resumed, layout):
    before, after = straight[layout].result, resumed[layout, layout].result
    assert after.iterations == [3, 4]
    assert (after.losses, after.grad_norms) == (before.losses[2:], before.grad_norms[2:])
    assert not harness.same_tensors(after, before)


@pytest.mark.parametrize(("source", "target"), RESHARD, ids=lambda name: name)
def test_checkpoint_moves_to_another_layout(straight, resumed, source, target):
    before, after = straight[source].result, resumed[source, target].result
    assert not harness.differences(after, last_iterations(before))
