"""What patterns alone can say trains alike in every layout, multi-token prediction too; checkpoints of before go on."""

import pytest

from tests.parallel import harness
from tests.parallel.launch import Case, run_cases
from tests.parallel.test_layouts import DIST, EP2, MOE, PP2, SP, TP2, last_iterations

# Two mixers, one after the other and without a feed-forward, the first by its depth; a depth or two ahead.
PATTERN = (
    '--mixer {"G":"lightning","M":"mamba2"} --mixer-args {"G":{},"M":{}} --mom-memories 2 --mom-topk 1 '
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 1e-2 --hybrid-layer-pattern "
)
MTP = PATTERN + "GM*E/ME/ME"
LAYOUTS = {  # name: (processes, flags)
    "pattern": (1, f"{PATTERN}GM-*ME"),
    "pattern-tp2-sp": (2, f"{PATTERN}GM-*ME {TP2} {SP}"),
    "pattern-pp2": (2, f"{PATTERN}GM|-*ME {PP2}"),
    "pattern-vpp": (2, f"{PATTERN}GM|-|*|ME {PP2}"),  # experts on one rank only
    "pattern-ep2-dist": (2, f"{PATTERN}GM-*ME {EP2} {DIST}"),
    "mtp": (1, MTP),
    "mtp-tp2-sp": (2, f"{MTP} {TP2} {SP}"),
    "mtp-pp2": (2, f"{PATTERN}GM|*E/ME/ME {PP2}"),  # a stage without experts
    "mtp-recompute": (1, f"{MTP} --mixer-recompute --recompute-granularity full --recompute-method uniform "
                         "--recompute-num-layers 1"),
    "mtp-repeated": (1, f"{MTP} --mtp-use-repeated-layer"),
}  # fmt: skip
BEFORE = {  # of GPTModel: what wrote it, what reads it
    "one": ("moe", MOE, "moe", MOE),
    "stages": ("moe", MOE, "moe-pp2", f"{MOE} {PP2}"),
    "distributed": ("moe-dist", f"{MOE} {DIST}", "moe-ep2", f"{MOE} {EP2}"),
}


def train_gpt(data, flags, save):
    """As `test_layouts.train`, of GPTModel."""
    from tests import gpt
    from tests.parallel import test_layouts

    with gpt.as_before():
        return test_layouts.train(data, flags, save)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hybrid")


@pytest.fixture(scope="module")
def runs(folder, data):
    outcomes = {}
    for size in (1, 2):
        cases = [
            Case(name, "tests.parallel.test_layouts:train", {"data": data, "flags": flags, "save": str(folder / name)})
            for name, (processes, flags) in LAYOUTS.items()
            if processes == size
        ]
        outcomes |= run_cases(size, cases)
    return outcomes


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ("pattern", "mtp", "mtp-repeated")])
def test_layouts_agree(runs, name):
    one = runs[name.split("-")[0]].result
    assert not harness.differences(runs[name].result, one)


def test_depths_have_tensors_of_their_own_or_share_them(runs):
    names = {name: runs[name].result.tensors for name in ("mtp", "mtp-repeated")}
    blocks = {name: {key.split(".")[2] for key in keys if key.startswith("mtp.")} for name, keys in names.items()}
    assert blocks == {"mtp": {"0", "1"}, "mtp-repeated": {"0"}}


@pytest.fixture(scope="module")
def before(folder, data):
    written = {writer: flags for writer, flags, _, _ in BEFORE.values()}
    function = "tests.parallel.test_hybrid:train_gpt"
    cases = [
        Case(name, function, {"data": data, "flags": flags, "save": str(folder / f"gpt-{name}")})
        for name, flags in written.items()
    ]
    return run_cases(1, cases)


@pytest.mark.parametrize("name", BEFORE)
def test_checkpoints_of_gpt_models_go_on(before, folder, data, name):
    """With their optimizer's state: the next steps are those that the GPTModel took."""
    from tests.gpt import gpt_name

    writer, _, reader, flags = BEFORE[name]
    case = {"data": data, "flags": flags, "save": str(folder / f"{name}-on"), "load": str(folder / f"gpt-{writer}")}
    processes = 2 if reader != "moe" else 1
    found = run_cases(processes, [Case(name, "tests.parallel.test_layouts:train", case)])[name].result
    found.tensors = {gpt_name(key): tensor for key, tensor in found.tensors.items()}
    found.figures = []  # count the pattern's places, not layers
    expected = last_iterations(before[writer].result)
    expected.figures = []
    assert found.iterations == [3, 4] and not harness.differences(found, expected)
