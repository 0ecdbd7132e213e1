"""What the CPU support leaves of torch, and of a model that is copied."""

import copy
import sys

import pytest
import torch
from torch._dynamo.utils import counters

import linear_moe

TINY = "tiny"


def losses_and_gradients(model, tokens):
    model.zero_grad()
    losses = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None, labels=tokens)
    losses.mean().backward()
    return losses.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])  # inductor would need a C++ compiler
def test_torch_compile_works_beside_a_model(backend, seed):
    """And compiles what it is given, nothing of the model."""
    model = linear_moe.build_model(TINY, seed=seed)
    counters.clear()
    losses_and_gradients(model, torch.randint(512, (1, 32)))
    assert not counters["stats"]

    def function(x):
        return (x.sin() * 2 + x.sum()).to("cpu") @ torch.ones(4, 3, device=x.device)

    x = torch.randn(5, 4, requires_grad=True)
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), function(x))
    assert counters["stats"]["unique_graphs"] == 1
    gradients = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, function)]
    torch.testing.assert_close(*gradients)


def test_no_function_stands_for_two_of_torchs(seed):
    """torch.compile refuses to tell them apart."""
    linear_moe.build_model(TINY, seed=seed)
    ours = [value for value in vars(torch.cuda).values() if getattr(value, "__module__", "") == "linear_moe.mcore.cpu"]
    assert len(ours) > 20 and len(set(ours)) == len(ours)
    assert "torch._dynamo" in sys.modules


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_a_copy_is_a_model_of_its_own(used, seed):
    model, tokens = linear_moe.build_model(TINY, seed=seed), torch.randint(512, (2, 48))
    if used:
        losses_and_gradients(model, tokens)
    twin = copy.deepcopy(model)
    (losses, gradients), (same, alike) = losses_and_gradients(model, tokens), losses_and_gradients(twin, tokens)
    assert torch.equal(losses, same) and gradients.keys() == alike.keys()
    assert all(torch.equal(gradients[name], alike[name]) for name in gradients)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(losses_and_gradients(model, tokens)[0], losses)
