"""All mixers in one dense model, where the matrix does not go: TP without SP, one set of write projections, and options
that add parameters; and a checkpoint that moves with them.
"""

import pytest

from linear_moe.mcore.arguments import config_argv
from tests.parallel import harness, matrix
from tests.parallel.matrix import TP2_SP, mixed, of_layer, part

BASE, TP2 = "llama3", TP2_SP[:2]
OPTIONS = {
    "A": {"feature_map": "hedgehog", "normalize": True},
    "B": {"feature_map": "t2r"},
    "C": {"feature_map": "dpfp", "normalize": True},
    "F": {"value_residual": True},
}
WITH_OPTIONS = {
    "mixer": {letter: "rwkv7" if letter == "F" else "linear_attention" for letter in OPTIONS},
    "mixer-args": OPTIONS,
    "layer-pattern": "FABCF",  # a value residual is one from the first layer
    "num-layers": 5,
}
CASES = {  # name: (configuration, changes, flags of two processes)
    "plain": ("tiny_hybrid", mixed(BASE, "tiny_hybrid"), TP2),
    "mom": ("tiny_mom", mixed(BASE, "tiny_mom"), TP2),
    "single-kv": ("tiny_mom", mixed(BASE, "tiny_mom") | {"mom-single-kv": True}, TP2_SP),
    "options": ("tiny", WITH_OPTIONS, TP2_SP),
}
LAYERS = [(case, layer) for case, (_, changes, _) in CASES.items() for layer in range(changes["num-layers"])]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Case -> name -> Run: in one process, in two, and from the latter's first checkpoint in one."""
    folder = tmp_path_factory.mktemp("mixers")
    matrix.corpus(folder)
    one = {case: (matrix.config_file(BASE, form), config_argv(changes)) for case, (form, changes, _) in CASES.items()}
    two = {case: (config, flags + CASES[case][2]) for case, (config, flags) in one.items()}
    outcomes = {"one": matrix.run_all(1, "one", one, folder), "two": matrix.run_all(2, "two", two, folder)}
    outcomes["moved"] = matrix.run_all(1, "moved", {"options": one["options"]}, folder, load="two")
    return {(case, name): found.result for name, cases in outcomes.items() for case, found in cases.items()}


@pytest.fixture(scope="module")
def differences(runs):
    """Case -> what differs between one process and two after a step."""
    return {case: harness.differences(part(runs[case, "two"], 1), part(runs[case, "one"], 1)) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_what_mixers_share(differences, case):
    assert not [line for line in differences[case] if "decoder.layers." not in line]


@pytest.mark.parametrize(("case", "layer"), LAYERS)
def test_layer_under_tensor_parallelism(runs, differences, case, layer):
    assert any(f".exp_avg.decoder.layers.{2 * layer}.self_attention." in name for name in runs[case, "one"].tensors)
    assert not of_layer(differences[case], layer)


def test_checkpoint_with_options_moves(runs):
    assert not harness.differences(part(runs["options", "moved"], 2, 2), part(runs["options", "two"], 2, 2))
    names = " ".join(runs["options", "one"].tensors)
    assert "q_map_bias" in names and "nu" in names
