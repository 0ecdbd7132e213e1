"""Every base model in every form is the GPTModel that it was: the same weights, the same loss and gradients."""

import pytest
import torch

import linear_moe
from tests import gpt
from tests.helpers import rel_err
from tests.parallel.matrix import BASES, FORMS


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", BASES)
def test_same_as_gpt_model(base, form, seed):
    sizes = {"vocab_size": 128, "make_vocab_size_divisible_by": 32, "init_method_std": 0.1}
    model = linear_moe.build_model(f"{base}/{form}", seed=seed, **sizes)
    other = gpt.build(model, f"{base}/{form}", **sizes)
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
