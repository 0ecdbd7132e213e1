"""Every mixer in every base model, hybrid and MoM: it trains, shards, moves its checkpoint and is causal.

A base model holds all mixers at once, one a layer, so that a cell is a layer of a model that runs. What is a base
model's alone (its layouts, its forms as shipped) is in test_base_models.py.
"""

import functools

import pytest

import linear_moe
from linear_moe.mcore.arguments import config_argv
from linear_moe.mcore.configs import read_config
from tests.mcore.test_causality import T, check_causal, packed
from tests.parallel import harness, matrix
from tests.parallel.matrix import BASES, CELLS, MIXED_FORMS, mixed, of_layer, part

MODELS = [(base, form) for base in BASES for form in MIXED_FORMS]
TIMES = (63, 64, 134, T - 1)  # about the border of chunks and of the last packed sequence


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Model -> name -> Run: in one process; under TP2 (SP, EP2); and from the latter's first checkpoint in one."""
    folder = tmp_path_factory.mktemp("matrix")
    matrix.corpus(folder)

    def models(layout=lambda base: []):
        return {(b, form): (matrix.config_file(b, form), config_argv(mixed(b, form)) + layout(b)) for b, form in MODELS}

    outcomes = {
        "one": matrix.run_all(1, "one", models(), folder),
        "tp2": matrix.run_all(2, "tp2", models(matrix.tp2), folder),
        "moved": matrix.run_all(1, "moved", models(), folder, load="tp2"),
    }
    return {model: {name: found[model] for name, found in outcomes.items()} for model in MODELS}


@pytest.fixture(scope="module")
def differences(runs, first_steps):
    """Model -> what differs between one process and two, and between two and one that go on from one checkpoint, by
    more than a bound."""

    @functools.cache
    def find(*model, bound=1e-4):
        tp2, moved = (runs[model][name].result for name in ("tp2", "moved"))
        in_two = harness.differences(part(tp2, 1), first_steps(model), tensors=bound)
        moved = harness.differences(part(moved, 2, first=2), part(tp2, 2, first=2), tensors=bound)
        return in_two + [f"moved: {line}" for line in moved]

    return find


@pytest.fixture(scope="module")
def first_steps(runs):
    """Model -> the first iteration in one process."""
    return functools.cache(lambda model: part(runs[model]["one"].result, 1))


@pytest.mark.parametrize(("base", "form"), MODELS)
def test_model_of_all_mixers(runs, differences, base, form):
    one = runs[base, form]["one"].result
    assert one.iterations == [1, 2] and runs[base, form]["moved"].result.iterations == [2]
    assert one.losses[1] < one.losses[0] - 0.05
    assert not [line for line in differences(base, form) if "decoder.layers." not in line]
    softmax = str(mixed(base, form)["layer-pattern"]).index("N")
    assert not of_layer(differences(base, form), softmax)


@pytest.mark.parametrize(("mixer", "base"), CELLS)
def test_cell_trains_shards_and_moves(first_steps, differences, mixer, base):
    """All parameters of its layer get a gradient, the same in one process and two; its checkpoint moves."""
    layer = matrix.layer_of(mixer, base)
    loose = {"bound": 2e-4} if mixer == "rebased" else {}  # it divides by a sum that nearly cancels
    for form in MIXED_FORMS:
        tensors = first_steps((base, form)).tensors
        moments = [name for name in of_layer(tensors, layer) if name.startswith("optimizer.state.exp_avg.")]
        assert moments and all(tensors[name].isfinite().all() and tensors[name].any() for name in moments)
        assert not of_layer(differences(base, form, **loose), layer)


@functools.cache
def layers(base: str, form: str):
    """A function from hidden states to those behind a layer, for each layer of the mixed model."""
    config = read_config(matrix.config_file(base, form)) | mixed(base, form)
    config |= {"seq-length": T, "max-position-embeddings": T}
    config |= {"mom-balance-coeff": 0.0, "moe-aux-loss-coeff": 0.0}  # their gradients are not the output's
    model = linear_moe.build_model(config)
    rotary = getattr(model, "rotary_pos_emb", None)
    pack = form == "tiny_mom"  # a dense batch for the plain layers, a packed one for MoM

    def run(mixing, feeding, x):
        options = {"rotary_pos_emb": rotary and rotary(T), "packed_seq_params": packed() if pack else None}
        return feeding(mixing(x, None, **options)[0], None)[0]

    found = model.decoder.layers
    return [functools.partial(run, *both) for both in zip(found[::2], found[1::2])], pack, config["hidden-size"]


@pytest.mark.parametrize(("mixer", "base"), CELLS)
def test_cell_is_causal(mixer, base, seed):
    for form in MIXED_FORMS:
        found, pack, hidden = layers(base, form)
        grad = check_causal(found[matrix.layer_of(mixer, base)], hidden, pack, TIMES)
        assert grad[T - 2, 0].any(), "no memory: the last output does not see the input before it"


@pytest.mark.parametrize(("base", "form"), MODELS)
def test_softmax_layer_is_causal(base, form, seed):
    found, pack, hidden = layers(base, form)
    check_causal(found[str(mixed(base, form)["layer-pattern"]).index("N")], hidden, pack, TIMES)


def test_readme_shows_the_cells():
    """python -m tests.parallel.matrix writes the table."""
    assert matrix.readme_parts()[1] == matrix.table()
