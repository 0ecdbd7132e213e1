"""Megatron's own engine drives our models, and ours and theirs write the same, also in several processes."""

import pytest
import torch
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts import BaseInferenceContext

import linear_moe
from linear_moe.inference import generate
from tests.inference.engine import LENGTHS, MODELS, STEPS, build, engine_tokens
from tests.parallel.launch import Case, run_cases

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
TP2_SP = TP2 | {"sequence_parallel": True}
CASES = {  # name: (model, who writes, layout)
    "tp-sp-mom": ("mom", "generate", TP2_SP),
    "tp-engine": ("hybrid", "engine", TP2),
    "pp-mom-engine": ("mom", "engine", PP2),
}


@pytest.fixture(scope="module")
def prompts():
    return [torch.randint(1, 128, (length,)).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def alone(prompts):
    """Model -> (the model, what it writes in one process)."""
    models = {name: build(name) for name in MODELS}
    return {name: (model, generate(model, prompts, STEPS)) for name, model in models.items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_writes_the_same(alone, prompts, name):
    model, expected = alone[name]
    assert engine_tokens(model, prompts) == expected
    assert engine_tokens(model, prompts) == expected  # nothing is left of the first batch


@pytest.fixture(scope="module")
def together(prompts):
    cases = [
        Case(case, "tests.inference.engine:written", {"name": name, "prompts": prompts, "by": by, **layout})
        for case, (name, by, layout) in CASES.items()
    ]
    return run_cases(2, cases)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_write_the_same(alone, together, case):
    assert together[case].results == [alone[CASES[case][0]][1]] * 2


def test_generate_refuses_pipelines(alone, prompts, monkeypatch):
    model = alone["hybrid"][0]
    monkeypatch.setattr(model.config, "pipeline_model_parallel_size", 2)
    with pytest.raises(ValueError, match="pipeline_model_parallel_size is 2: use Megatron's static engine"):
        generate(model, prompts, STEPS)


class Dynamic(BaseInferenceContext):
    def is_static_batching(self):
        return False


def test_dynamic_batching_is_refused():
    model = linear_moe.build_model(MODELS["mom"])
    context = Dynamic(InferenceConfig())
    message = r"linear layers cannot use dynamic batching: .* Megatron's static engine"
    with pytest.raises(ValueError, match=message):
        model.decoder.layers[0].self_attention(torch.zeros(4, 1, 32), inference_context=context)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):  # before a softmax layer asks more of the context
        model(tokens, tokens, None, inference_context=context)
