"""All mixers in one dense model, where the matrix does not go: TP without SP, and one set of write projections."""

import pytest

from linear_moe.mcore.arguments import config_argv
from linear_moe.ssm import MIXERS
from tests.parallel import harness, matrix
from tests.parallel.matrix import TP2_SP, layer_of, mixed

BASE = "llama3"
CASES = {  # name: (form, flags, flags of two processes)
    "plain": ("tiny_hybrid", [], TP2_SP[:2]),
    "mom": ("tiny_mom", [], TP2_SP[:2]),
    "single-kv": ("tiny_mom", ["--mom-single-kv"], TP2_SP),
}


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """Case -> what differs between one process and two after a step."""
    folder = tmp_path_factory.mktemp("mixers")
    data = matrix.corpus(folder / "corpus")

    def runs(processes):
        return matrix.run_all(
            processes,
            {
                name: {
                    "config": matrix.config_file(BASE, form),
                    "flags": config_argv(mixed(BASE, form)) + flags + (in_two if processes == 2 else []),
                    "data": data,
                    "save": f"{folder}/{name}-{processes}",
                    "saves": 1,
                    "iterations": 1,
                }
                for name, (form, flags, in_two) in CASES.items()
            },
        )

    one, two = runs(1), runs(2)
    return {name: harness.differences(two[name].result, one[name].result) for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_what_mixers_share(differences, case):
    layers = [f"decoder.layers.{layer_of(mixer, BASE)}." for mixer in MIXERS]
    assert not [line for line in differences[case] if not any(layer in line for layer in layers)]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("case", CASES)
def test_mixer_under_tensor_parallelism(differences, mixer, case):
    assert not [line for line in differences[case] if f"decoder.layers.{layer_of(mixer, BASE)}." in line]
