"""The check of a whole model sees a mixer that computes nothing."""

import torch

from linear_moe.measure import model
from linear_moe.measure.compare import verdict
from linear_moe.ssm.core import MixerCore
from tests.helpers import fresh_seed


def test_sees_a_model_without_mixers(monkeypatch):
    seed = fresh_seed()
    limits = model.KINDS["float32"][1]
    state, expected = model.run_model("float32", torch.float32, seed)
    assert verdict(model.run_model("float32", torch.float32, seed, state)[1], expected, limits)["ok"]
    forward = MixerCore.forward
    monkeypatch.setattr(MixerCore, "forward", lambda *given, **options: 0 * forward(*given, **options))
    _, broken = model.run_model("float32", torch.float32, seed, state)
    found = verdict(broken, expected, limits)
    assert not found["ok"] and "logits" in found["text"] and "core.tokens.weight" in found["text"]
