"""Every base model in every form is the GPTModel that it was: the same weights, the same loss and gradients."""

import pytest
import torch

import linear_moe
from tests import gpt
from tests.helpers import rel_err
from tests.parallel.matrix import BASES, FORMS

SCALED = {"use_rope_scaling": True, "rotary_percent": 0.5}
SCALED |= {"seq_length": 64, "max_position_embeddings": 64}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", BASES)
def test_same_as_gpt_model(base, form, seed):
    check(f"{base}/{form}", seed)


@pytest.mark.parametrize(
    "options", [SCALED, {"rotary_interleaved": True}, {"no_rope_freq": [1, 0, 0, 1]}], ids="+".join
)
def test_same_positions_as_gpt_model(options, seed):
    check("llama3/tiny_hybrid", seed, layer_pattern="N", **options)


def check(config, seed, **options):
    sizes = {"vocab_size": 128, "make_vocab_size_divisible_by": 32, "init_method_std": 0.1} | options
    model = linear_moe.build_model(config, seed=seed, **sizes)
    other = gpt.build(model, config, **sizes)
    tokens = torch.randint(128, (2, 32))
    positions = torch.arange(32).expand_as(tokens)
    losses = [each(tokens, positions, None, labels=tokens) for each in (model, other)]
    assert rel_err(*losses) < 1e-6
    for loss in losses:
        loss.mean().backward()
    found = {gpt.gpt_name(name): parameter.grad for name, parameter in model.named_parameters()}
    expected = {name: parameter.grad for name, parameter in other.named_parameters()}
    assert found.keys() == expected.keys()
    assert all(rel_err(found[name], grad) < 1e-6 for name, grad in expected.items())
