"""What a segment does to a state, chunk by chunk, against the loop over tokens: both results and every gradient."""

import re
from functools import partial

import pytest
import torch

from linear_moe import ops
from linear_moe.ops import chunk
from tests.helpers import fresh_seed, rel_err
from tests.ops import cases
from tests.ops.summaries import every_rule, inputs, one_state, results, summary_by_loop, summary_of

LAYOUTS = cases.layouts((0, 1, 100), {name: ends for name, ends in cases.PACKED.items() if name != "packed"})


def compare(rule, x, cu_seqlens=None, dtypes=(torch.float64, torch.float32), scales=None, **options):
    """The op against the definition in float64; scales as in cases.assert_close."""
    expected = results(summary_by_loop, rule, x, cu_seqlens=cu_seqlens)
    for dtype in dtypes:
        found = results(summary_of, rule, x, dtype, cu_seqlens=cu_seqlens, **options)
        limits = (1e-12, 1e-12) if dtype == torch.float64 else (1e-5, 1e-4)
        cases.assert_close(found, expected, *limits, scales)


@pytest.mark.parametrize("layout", LAYOUTS)
@every_rule
def test_matches_loop(rule, decay, layout):
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS[layout]
    compare(rule, inputs(rule, decay, B, T, cu_seqlens), cu_seqlens)


@every_rule
def test_packed_without_reading_lengths(rule, decay, monkeypatch):
    """The layout of a GPU, where lengths stay on the device."""
    monkeypatch.setattr(chunk, "Layout", partial(chunk.Layout, read_lengths=False))
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS["packed-empty-sequences"]
    compare(rule, inputs(rule, decay, B, T, cu_seqlens), cu_seqlens)


@every_rule
def test_strong_decay(rule, decay):
    """Some tokens forget all. What is left of a state, next to nothing, is measured against the state itself."""
    fresh_seed()
    x = inputs(rule, decay, 2, 70, strong=True)
    compare(rule, x, scales={"transition": torch.ones(2, x["v"].shape[2], x["k"].shape[-1])})


@pytest.mark.parametrize(
    "rule, decay", [("linear_attention", "channel"), ("delta_rule", "scalar"), ("dplr", "channel")]
)
def test_specification(rule, decay):
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS["packed-empty-sequences"]
    x = inputs(rule, decay, B, T, cu_seqlens)
    compare(rule, x, cu_seqlens, (torch.float64,), backend="reference")


@every_rule
def test_moves_a_state(rule, decay):
    """Over a segment, and over two segments as over both at once."""
    fresh_seed()
    x = inputs(rule, decay, 2, 70)
    initial = x.pop("initial_state")
    if rule == "gsa":
        initial = initial.split([x["k"].shape[-1], x["v"].shape[-1]], -1)
    whole = summary_of(rule, x)
    _, expected = getattr(ops, rule)(**x, initial_state=initial, return_state=True, backend="reference")
    assert rel_err(one_state(ops.apply_summary(*whole, initial)), one_state(expected)) < 1e-12
    first, second = (
        summary_of(rule, {name: t[:, cut] if t.ndim > 2 else t for name, t in x.items()})
        for cut in (slice(0, 37), slice(37, 70))
    )
    transition, state = ops.compose_summaries(second, first)
    assert rel_err(transition, whole[0]) < 1e-12
    assert rel_err(one_state(state), one_state(whole[1])) < 1e-12


@pytest.mark.parametrize("backend", ("torch", "reference"))
@every_rule
def test_queries_do_not_matter(rule, decay, backend):
    fresh_seed()
    x = inputs(rule, decay, 1, 20)
    given, left_out = (
        summary_of(rule, {n: t for n, t in x.items() if n not in without}, backend=backend)
        for without in ((), ("q", "u"))
    )
    assert torch.equal(given[0], left_out[0]) and torch.equal(one_state(given[1]), one_state(left_out[1]))


@pytest.mark.parametrize("packed", (False, True), ids=("dense", "packed"))
@every_rule
def test_nothing_is_read_back(rule, decay, packed):
    """Meta tensors have no values: reading one raises."""
    with torch.device("meta"):
        cu_seqlens = torch.zeros(5, dtype=torch.int32) if packed else None
        x = inputs(rule, decay, 1 if packed else 2, 50, cu_seqlens)
        x["v"].requires_grad_()
        transition, state = summary_of(rule, x, cu_seqlens=cu_seqlens)
        torch.autograd.grad(one_state(state).sum() + transition.sum(), x["v"])


@pytest.mark.parametrize(
    "rule, operands, message",
    [
        ("ttt_linear", (), "ttt_linear: a state is no affine function of the one before"),
        ("titans_linear", (), "titans_linear: a state is no affine function of the one before"),
        ("softmax", (), "summary: rule ('softmax') must be one of ['delta_rule', 'dplr', 'gsa', 'linear"),
        ("dplr", ("q", "k", "v"), "dplr: summary takes 6 to 6 operands (q, k, v, a, b, g), not 3"),
        ("linear_attention", ("q", "k", "v", "g", "g"), "linear_attention: summary takes 3 to 4 operands (q, k, v, g)"),
        ("linear_attention", ("v", "k", "v"), "linear_attention: q must be [B, T, H, K] = [1, 4, 2, 8], not [1, 4, 4"),
        ("delta_rule", ("q", "k", "v", "g"), "delta_rule: beta must be [B, T, HV] = [1, 4, 4], not [1, 4, 4, 8]"),
        ("rwkv6", ("q", "k", "v", "g"), "rwkv6: k must be [B, T, H, K] = [1, 4, 4, 8], not [1, 4, 2, 8]"),
    ],
)
def test_refuses(rule, operands, message):
    x = inputs("linear_attention", "channel", 1, 4)
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.summary(rule, *(x[name] for name in operands))


def test_refuses_lengths_that_leave_tokens_out():
    x = inputs("linear_attention", "none", 1, 4)
    with pytest.raises(ValueError, match=re.escape("cu_seqlens must run from 0 to T (4) and not decrease")):
        summary_of("linear_attention", x, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32))
