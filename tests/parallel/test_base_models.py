"""The base models as shipped in examples/configs, in all their forms: every layout trains as one process does."""

import pytest

from tests.parallel import harness, matrix
from tests.parallel.matrix import BASES, FORMS, PP2, part

MODELS = [(base, form) for base in BASES for form in FORMS]
TWO_MICROBATCHES = ["--micro-batch-size", "1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Model -> name -> Outcome: 4 iterations in one process, 2 under TP2 (SP, EP2), and from there 2 under PP2."""
    folder = tmp_path_factory.mktemp("bases")
    data = matrix.corpus(folder / "corpus")

    def cases(name, iterations, layout=lambda base: [], load=None):
        return {
            (name, base, form): {
                "config": matrix.config_file(base, form),
                "flags": TWO_MICROBATCHES + layout(base),
                "data": data,
                "save": f"{folder}/{name}-{base}-{form}",
                "saves": 2,
                "iterations": iterations,
                "load": f"{folder}/{load}-{base}-{form}" if load else None,
            }
            for base, form in MODELS
        }

    outcomes = matrix.run_all(1, cases("one", 4)) | matrix.run_all(2, cases("tp2", 2, matrix.tp2))
    outcomes |= matrix.run_all(2, cases("pp2", 4, lambda base: PP2, load="tp2"))
    return {model: {name: outcomes[name, *model].result for name in ("one", "tp2", "pp2")} for model in MODELS}


@pytest.mark.parametrize(("base", "form"), MODELS)
def test_layouts_train_like_one_process(runs, base, form):
    """Tensor and expert parallelism from the start; pipeline parallelism from its checkpoint on."""
    one, tp2, pp2 = (runs[base, form][name] for name in ("one", "tp2", "pp2"))
    assert one.losses[3] < one.losses[0] - 0.1 and pp2.iterations == [3, 4]
    assert not harness.differences(part(tp2, 2), part(one, 2))
    assert not harness.differences(part(pp2, 4, first=3), part(one, 4, first=3))


def test_expert_bias_moves_and_is_kept(runs):
    """DeepSeek-V3 balances its experts by a bias that no gradient moves: it is in checkpoints, and loaded from them."""
    for form in FORMS:
        for run in runs["deepseek_v3", form].values():
            found = {k: v for k, v in run.tensors.items() if k.endswith("router.expert_bias")}
            assert len(found) == 3 and all(v.abs().max() > 5e-4 for v in found.values())
