"""linear_attention, chunk by chunk, against the loop over tokens: outputs, final states and every gradient."""

from functools import partial

import pytest
import torch

from linear_moe.ops import chunk, linear_attention
from tests.helpers import fresh_seed, rel_err
from tests.ops import cases

RULE = "linear_attention"
LAYOUTS = cases.layouts()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decay", cases.DECAYS)
def test_matches_loop(decay, layout):
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS[layout]
    cases.assert_matches_loop(RULE, cases.inputs(RULE, decay, B, T, cu_seqlens), cu_seqlens)


@pytest.mark.parametrize("decay", cases.DECAYS)
def test_longest_chunks(decay):
    fresh_seed()
    cases.assert_matches_loop(RULE, cases.inputs(RULE, decay, 1, 4 * chunk.MAX_CHUNK + 1, heads=cases.H))


@pytest.mark.parametrize("layout", cases.PACKED)
@pytest.mark.parametrize("decay", ("none", "channel"))
def test_packed_without_reading_lengths(monkeypatch, decay, layout):
    """The layout of a GPU, where lengths stay on the device."""
    monkeypatch.setattr(chunk, "Layout", partial(chunk.Layout, read_lengths=False))
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS[layout]
    cases.assert_matches_loop(RULE, cases.inputs(RULE, decay, B, T, cu_seqlens), cu_seqlens)


@pytest.mark.parametrize("decay", cases.DECAYS)
def test_bf16(decay):
    fresh_seed()
    cases.assert_bf16(RULE, cases.inputs(RULE, decay, 2, 100))


@pytest.mark.parametrize("decay", ("constant", "scalar", "channel"))
def test_every_decay_strong(decay):
    fresh_seed()
    x = cases.inputs(RULE, decay, 2, 40)
    cases.assert_matches_loop(RULE, x | {"g": torch.full_like(x["g"], -50)})


@pytest.mark.parametrize("decay", cases.DECAYS)
def test_gradcheck(decay):
    fresh_seed()
    cu_seqlens = torch.tensor([0, 0, 3, 4, 21], dtype=torch.int32)
    x = cases.inputs(RULE, decay, 1, 21, cu_seqlens, heads=cases.H, strong=False)
    cases.gradcheck(RULE, x, cu_seqlens)


@pytest.mark.parametrize("decay", cases.DECAYS)
def test_exactly_causal(decay):
    fresh_seed()
    cases.assert_rule_causal(RULE, decay)


def test_state_carries_over():
    fresh_seed()
    x = cases.inputs(RULE, "scalar", 2, 70)
    state = x.pop("initial_state")
    whole, last = linear_attention(**x, initial_state=state, return_state=True)
    parts = []
    for cut in (slice(0, 1), slice(1, 34), slice(34, 70)):
        part = {name: tensor[:, cut] for name, tensor in x.items()}
        o, state = linear_attention(**part, initial_state=state, return_state=True)
        parts.append(o)
    assert rel_err(torch.cat(parts, 1), whole) < 1e-12
    assert rel_err(state, last) < 1e-12
