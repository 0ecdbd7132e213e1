"""A hybrid MoM + MoE model trains alike in every parallel layout; checkpoints move between them."""

from dataclasses import replace

import pytest

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
    "packed-tp2-sp": (2, f"{PACKED} {TP2} {SP}"),
    "packed-tp2-sp-pp2": (4, f"{PACKED} {TP2} {SP} {PP2}"),
}
BF16_LAYOUTS = {
    "bf16": (1, f"{MOE} --bf16"),
    "bf16-dist": (1, f"{MOE} --bf16 {DIST}"),
    "bf16-ep2-dist": (2, f"{MOE} --bf16 {EP2} {DIST}"),
}
# Random numbers in training: only a resumed run can be held to them, other layouts draw others.
DROPOUT = f"{DENSE} --hidden-dropout 0.1 --attention-dropout 0.1"
DROPOUT_LAYOUTS = {"dropout": (1, DROPOUT), "dropout-tp2-sp-pp2": (4, f"{DROPOUT} {TP2} {SP} {PP2}")}
EXACT = DENSE_LAYOUTS | MOE_LAYOUTS | PACKED_LAYOUTS
LAYOUTS = EXACT | BF16_LAYOUTS | DROPOUT_LAYOUTS
# A ring through each family: every layout's checkpoint is loaded in another layout, and every layout loads another's.
# In bfloat16 only between layouts that compute alike: rounding decides which experts and memories are close calls.
FAMILIES = [list(DENSE_LAYOUTS), list(MOE_LAYOUTS), ["bf16", "bf16-dist"]]
RESHARD = [pair for family in FAMILIES for pair in zip(family, family[1:] + family[:1])]


def one_process(layout: str) -> str:
    return layout.split("-")[0]


def train(data, flags, save=None, load=None):
    """A case: 5 iterations, with checkpoints at 2, 4 and 5; or from iteration 2 of the checkpoints at `load` to 5."""
    from linear_moe.mcore.pretrain import main

    argv = [*harness.TINY, "--data-path", data, "--save-interval", "2", *flags.split()]
    return harness.train(main, argv + (["--load", load, "--ckpt-step", "2"] if load else []), save)


def run_all(cases: dict[str, tuple[int, dict]]):
    """name -> (processes, arguments of `train`): one set of processes for each number."""
    outcomes = {}
    for size in sorted({size for size, _ in cases.values()}):
        function = "tests.parallel.test_layouts:train"
        outcomes |= run_cases(size, [Case(name, function, kw) for name, (n, kw) in cases.items() if n == size])
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
    pairs = [(name, name) for name in LAYOUTS] + RESHARD
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_is_bitwise(straight, resumed, layout):
    before, after = straight[layout].result, resumed[layout, layout].result
    assert after.iterations == [3, 4, 5]
    assert (after.losses, after.grad_norms) == (before.losses[2:], before.grad_norms[2:])
    assert not harness.same_tensors(after, before)


@pytest.mark.parametrize(("source", "target"), RESHARD, ids=lambda name: name)
def test_checkpoint_moves_to_another_layout(straight, resumed, source, target):
    before, after = straight[source].result, resumed[source, target].result
    assert not harness.differences(after, last_iterations(before))
