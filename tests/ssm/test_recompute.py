"""Recomputation changes what is kept for the backward, and nothing else."""

import weakref

import pytest
import torch

from linear_moe.mom import MoMConfig, Router, make_routes
from linear_moe.ops import api
from linear_moe.ssm import core as core_module
from linear_moe.ssm.core import MixerCore
from linear_moe.ssm.recompute import Recompute
from linear_moe.ssm.registry import mixer_class

D, B, T = 32, 2, 40


@pytest.fixture
def kept(monkeypatch):
    """{storage: bytes} of what autograd keeps, inside and outside of Recompute."""
    sizes = {}

    def count(x):
        if isinstance(x, torch.Tensor):
            sizes[x.untyped_storage()._cdata] = x.untyped_storage()  # alive, so that no address comes twice
        return x

    class Counting(Recompute):
        def __init__(self, made):
            super().__init__(made)
            pack = self.pack_hook
            self.pack_hook = lambda x: count(pack(x))

    monkeypatch.setattr(core_module, "Recompute", Counting)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        yield sizes


def layer(name, memories, device="cpu", dtype=torch.float32, **options):
    mixer = mixer_class(name)
    config = mixer.make_config(D, 2, {"num_heads": 2, "conv_size": 4} | options)
    mom = MoMConfig(memories=memories) if memories else None
    router = Router(D, memories, 2, dtype=dtype, device=device) if mom else None
    factory = {"dtype": dtype, "device": device}
    core = MixerCore(mixer(config, 0, 2), D, memories=mom.projections if mom else 0, **factory)

    def forward(x):
        routes = make_routes(router(x.flatten(0, 1), lambda p: p), mom, x.shape[:2], None, 1.0) if mom else None
        return core(x, routes=routes)

    return core, router, forward


@pytest.mark.parametrize("memories", (0, 3), ids=("plain", "mom"))
@pytest.mark.parametrize("name", ("gated_deltanet", "gla", "mamba2"))
def test_same_gradients(name, memories, seed):
    core, router, forward = layer(name, memories)
    core.initialize(lambda w: w.normal_(std=0.2))
    if memories:
        torch.nn.init.normal_(router.weight)
    x, results = torch.randn(B, T, D, requires_grad=True), []
    for core.recompute in (False, True):
        y = forward(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *core.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_keeps_less(kept, monkeypatch):
    """On the kernels' path, whose launches meta tensors skip: q of the tokens and k, v of the rows instead of both."""
    monkeypatch.setattr(api, "choose_backend", lambda *args, **options: "triton")
    with torch.device("meta"):
        core, _, forward = layer("gated_deltanet", 4, "meta", torch.bfloat16)
        x, sizes = torch.zeros(1, 4096, D, dtype=torch.bfloat16, requires_grad=True), []
        for core.recompute in (False, True):
            kept.clear()
            y = forward(x)
            sizes.append(sum(storage.nbytes() for storage in kept.values()) / 4096)
            del y
    rows, operands = 3, 3 * D * 2
    assert sizes[0] - sizes[1] == rows * operands  # q, k, v of three rows a token


@pytest.mark.parametrize("name", ("gated_deltanet", "gla"))
def test_a_graph_without_backward_is_freed(name):
    core, _, forward = layer(name, 0)
    core.recompute = True
    x = torch.randn(B, T, D, requires_grad=True)
    hidden = x * 2
    alive = weakref.ref(hidden)
    forward(hidden)
    del hidden
    assert alive() is None


def test_saves_what_it_was_made_from():
    x = torch.randn(5, 4, requires_grad=True)
    calls = []

    def again():
        calls.append(None)
        return x.exp()

    y = x.exp()
    with Recompute([(y, again)]):
        z = (y.view(20) * y.view(20)).sum()
    assert not calls
    (grad,) = torch.autograd.grad(z, x)
    assert calls and torch.allclose(grad, 2 * (2 * x).exp())
