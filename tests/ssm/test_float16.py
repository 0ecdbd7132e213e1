"""float16: what is summed over all tokens must not leave its range, which nothing would say."""

import pytest
import torch

from linear_moe.ops.sequences import Sequences
from linear_moe.ssm import mixer_class
from linear_moe.ssm.core import MixerCore
from linear_moe.ssm.linear_attention import normalized_attention
from linear_moe.ssm.scan import Plain
from tests.helpers import fresh_seed, rel_err

OPTIONS = {
    "linear_attention": {},
    "linear_attention-normalized": {"normalize": True},
    "based": {"head_dim": 16},
    "rebased": {"head_dim": 16},
}


def test_the_quotient_of_ones_is_one():
    """q . (sum of k) is 64 t at token t: infinite in float16 from t = 1024 on."""
    ones = torch.ones(1, 1500, 1, 64, dtype=torch.float16)
    o = normalized_attention(Plain(Sequences.of(ones)), ones, ones, ones, eps=1e-6)
    assert o.dtype == torch.float16 and torch.equal(o, ones)


def test_a_sum_beyond_the_range_is_normalized():
    T = 9000  # K^1/2 T is 72000
    mixer_type = mixer_class("linear_attention")
    mixer = mixer_type(mixer_type.make_config(64, 1, {"feature_map": "identity"}))
    core = MixerCore(mixer, 64, dtype=torch.float16)
    with torch.no_grad():
        core.tokens.weight.copy_(torch.eye(64).repeat(3, 1))
        y = core(torch.ones(1, T, 64, dtype=torch.float16))
    assert y.dtype == torch.float16 and rel_err(y, torch.ones_like(y)) < 1e-3


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_float32s(name):
    fresh_seed()
    T, results = 1536, []
    mixer_type = mixer_class(name.partition("-")[0])
    core = MixerCore(mixer_type(mixer_type.make_config(32, 2, OPTIONS[name])), 32)
    core.initialize(lambda w: torch.nn.init.normal_(w, std=0.5))
    core.half().float()  # the same values in both
    x, towards = (torch.randn(1, T, 32).half().float() for _ in range(2))
    for dtype in (torch.float16, torch.float32):
        core.to(dtype)
        inputs = [x.to(dtype).requires_grad_(), *core.parameters()]
        y = core(inputs[0])
        assert y.dtype == dtype
        results.append([y, *torch.autograd.grad(y, inputs, towards.to(dtype))])
    for ours, expected in zip(*results):
        assert rel_err(ours, expected) < 2e-2
