"""The base models as shipped in linear_moe/configs, in all their forms: each trains, and goes on under pipeline
parallelism as in one process. (Tensor, sequence and expert parallelism: test_matrix.py.)
"""

import pytest

from tests.parallel import harness, matrix
from tests.parallel.matrix import BASES, FORMS, PP2, part

MODELS = [(base, form) for base in BASES for form in FORMS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Model -> (a run of 2 iterations in one process, a run under PP2 from the checkpoint between them)."""
    folder = tmp_path_factory.mktemp("bases")
    matrix.corpus(folder)

    def models(*flags):
        return {model: (matrix.config_file(*model), ["--micro-batch-size", "1", *flags]) for model in MODELS}

    one = matrix.run_all(1, "one", models(), folder)
    pp2 = matrix.run_all(2, "pp2", models(*PP2), folder, load="one")
    return {model: (one[model].result, pp2[model].result) for model in MODELS}


@pytest.mark.parametrize(("base", "form"), MODELS)
def test_pipeline_goes_on_like_one_process(runs, base, form):
    one, pp2 = runs[base, form]
    assert one.losses[1] < one.losses[0] - 0.05 and pp2.iterations == [2]
    assert not harness.differences(part(pp2, 2, first=2), part(one, 2, first=2))


def test_expert_bias_moves_and_is_kept(runs):
    """DeepSeek-V3 balances its experts by a bias that no gradient moves: it is in checkpoints, and loaded from them."""
    for form in FORMS:
        one, pp2 = (run.tensors for run in runs["deepseek_v3", form])
        biases = [name for name in one if name.endswith("router.expert_bias")]
        assert len(biases) == 3 and all(one[name].equal(pp2[name]) for name in biases)
        assert any(one[name].any() for name in biases)  # one may be back where it was
