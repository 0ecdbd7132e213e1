"""A whole layer body on the kernels against the same on torch: what the ops pass to each other fits together."""

import pytest
import torch

from linear_moe.mom import MoMConfig, Router, make_routes
from linear_moe.ops import api
from linear_moe.ops.sequences import Sequences
from linear_moe.ssm.core import MixerCore
from linear_moe.ssm.registry import MIXERS, mixer_class
from tests.helpers import fresh_seed, rel_err

D = 32
LONG = ("gated_deltanet", "gla", "mamba2")


def run(core, router, mom, x, cu_seqlens):
    """{name: tensor} of the layer's output and every gradient."""
    routes = None
    if mom:
        routes = make_routes(router(x.flatten(0, 1), lambda p: p), mom, x.shape[:2], cu_seqlens, 1.0)
    y = core(x, routes=routes, sequences=Sequences.of(x, cu_seqlens))
    leaves = {"x": x} | dict(core.named_parameters()) | (dict(router.named_parameters(prefix="router")) if mom else {})
    grads = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), list(leaves.values()))
    return {"y": y} | dict(zip(leaves, grads))


def check_against_torch(monkeypatch, name, mom, shape, cu_seqlens=None, heads=2):
    """Output and every gradient of a layer on the kernels and on torch."""
    fresh_seed()
    mixer, width = mixer_class(name), 8 if name == "ttt" else 12
    config = mixer.make_config(D, heads, {"head_dim": 8, "value_head_dim": width, "conv_size": 4})
    core = MixerCore(mixer(config, 1, 3), D, memories=mom.projections if mom else 0)
    core.initialize(lambda w: w.normal_(std=0.2))
    router = Router(D, mom.memories, 2, dtype=torch.float32, device="cpu") if mom else None
    if mom:
        torch.nn.init.normal_(router.weight)
    x = torch.randn(*shape, D, requires_grad=True)
    expected = run(core, router, mom, x, cu_seqlens)
    chosen = []

    def triton(op, *args, **options):
        chosen.append(op)
        return "triton"

    monkeypatch.setattr(api, "choose_backend", triton)
    found = run(core, router, mom, x, cu_seqlens)
    assert "short_conv" in chosen and (not mom or {"route", "grouped_linear"} <= set(chosen))
    assert set(chosen) & {*api.PARTS, *api.KERNELS, "ttt_linear", "titans_linear"}
    wrong = {n: rel_err(found[n], expected[n]) for n in expected if not rel_err(found[n], expected[n]) < 1e-4}
    assert not wrong


@pytest.mark.parametrize("packed", (False, True), ids=("dense", "packed"))
@pytest.mark.parametrize("memories", (0, 3), ids=("plain", "mom"))
@pytest.mark.parametrize("name", LONG)
def test_layer_matches_torch(monkeypatch, name, memories, packed):
    """Over more than a chunk."""
    mom = MoMConfig(memories=memories) if memories else None
    cu_seqlens = torch.tensor([0, 20, 20, 75], dtype=torch.int32) if packed else None
    check_against_torch(monkeypatch, name, mom, (1 if packed else 2, 75), cu_seqlens)


@pytest.mark.parametrize("memories", (0, 2), ids=("plain", "mom"))
@pytest.mark.parametrize("name", [name for name in MIXERS if name not in LONG])
def test_every_mixer_matches_torch(monkeypatch, name, memories):
    """The others are small, for the interpreter is slow: what a layer hands to their rules fits, too."""
    mom = MoMConfig(memories=memories) if memories else None
    check_against_torch(monkeypatch, name, mom, (1, 9), heads=1)


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_autocast(monkeypatch, backend):
    """The projections of tokens and of rows come in one dtype."""
    monkeypatch.setattr(api, "choose_backend", lambda *args, **options: backend)
    mixer, mom = mixer_class("gated_deltanet"), MoMConfig(memories=3)
    core = MixerCore(mixer(mixer.make_config(D, 2, {"num_heads": 2}), 0, 2), D, memories=mom.projections)
    core.initialize(lambda w: w.normal_(std=0.2))
    router = Router(D, 3, 2, dtype=torch.float32, device="cpu")
    torch.nn.init.normal_(router.weight)
    x = torch.randn(2, 30, D, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        found = run(core, router, mom, x, None)
    expected = run(core, router, mom, x, None)
    assert rel_err(found["y"], expected["y"]) < 1e-2


@pytest.mark.parametrize("memories", (0, 3), ids=("plain", "mom"))
def test_no_tokens(memories):
    mixer = mixer_class("gated_deltanet")
    mom = MoMConfig(memories=memories) if memories else None
    core = MixerCore(mixer(mixer.make_config(D, 2, {}), 0, 2), D, memories=mom.projections if mom else 0)
    core.initialize(lambda w: w.normal_(std=0.2))
    router = Router(D, 3, 2, dtype=torch.float32, device="cpu") if mom else None
    assert run(core, router, mom, torch.zeros(2, 0, D, requires_grad=True), None)["y"].shape == (2, 0, D)
