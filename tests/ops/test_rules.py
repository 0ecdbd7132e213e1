"""Both rules, chunk by chunk, against the loop over tokens: outputs, final states and every gradient."""

from functools import partial

import pytest
import torch

from linear_moe import ops
from linear_moe.ops import chunk
from tests.helpers import fresh_seed, rel_err
from tests.ops import cases

LAYOUTS = cases.layouts()


@pytest.fixture(params=["linear_attention", "delta_rule"])
def rule(request):
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decay", cases.DECAYS)
def test_matches_loop(rule, decay, layout):
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS[layout]
    cases.assert_matches_loop(rule, cases.inputs(rule, decay, B, T, cu_seqlens), cu_seqlens)


@pytest.mark.parametrize("decay", cases.DECAYS)
def test_longest_chunks(rule, decay):
    fresh_seed()
    cases.assert_matches_loop(rule, cases.inputs(rule, decay, 1, 4 * chunk.MAX_CHUNK + 1, heads=cases.H))


@pytest.mark.parametrize("layout", cases.PACKED)
@pytest.mark.parametrize("decay", ("none", "channel"))
def test_packed_without_reading_lengths(rule, monkeypatch, decay, layout):
    """The layout of a GPU, where lengths stay on the device."""
    monkeypatch.setattr(chunk, "Layout", partial(chunk.Layout, read_lengths=False))
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS[layout]
    cases.assert_matches_loop(rule, cases.inputs(rule, decay, B, T, cu_seqlens), cu_seqlens)


@pytest.mark.parametrize("decay", cases.DECAYS)
def test_bf16(rule, decay):
    fresh_seed()
    cases.assert_bf16(rule, cases.inputs(rule, decay, 2, 100, heads=8 * cases.H))


@pytest.mark.parametrize("decay", ("constant", "scalar", "channel"))
def test_every_decay_strong(rule, decay):
    fresh_seed()
    x = cases.inputs(rule, decay, 2, 40)
    cases.assert_matches_loop(rule, x | {"g": torch.full_like(x["g"], -50)})


@pytest.mark.parametrize("decay", cases.DECAYS)
def test_gradcheck(rule, decay):
    fresh_seed()
    cu_seqlens = torch.tensor([0, 0, 3, 4, 21], dtype=torch.int32)
    x = cases.inputs(rule, decay, 1, 21, cu_seqlens, heads=cases.H, strong=False)
    cases.gradcheck(rule, x, cu_seqlens)


@pytest.mark.parametrize("decay", cases.DECAYS)
def test_exactly_causal(rule, decay):
    fresh_seed()
    cases.assert_rule_causal(rule, decay)


def test_state_carries_over(rule):
    fresh_seed()
    x = cases.inputs(rule, "scalar", 2, 70)
    state = x.pop("initial_state")
    whole, last = getattr(ops, rule)(**x, initial_state=state, return_state=True)
    parts = []
    for cut in (slice(0, 1), slice(1, 34), slice(34, 70)):
        part = {name: tensor[:, cut] for name, tensor in x.items()}
        o, state = getattr(ops, rule)(**part, initial_state=state, return_state=True)
        parts.append(o)
    assert rel_err(torch.cat(parts, 1), whole) < 1e-12
    assert rel_err(state, last) < 1e-12


def test_long_keys():
    """Keys far from unit length: the triangular system is then badly conditioned, and so is the loop."""
    fresh_seed()
    x = cases.inputs("delta_rule", "scalar", 1, 48, strong=False)
    x["k"] = 1.4 * x["k"]
    cases.assert_matches_loop("delta_rule", x)
