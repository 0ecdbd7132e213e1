"""RWKV-7's rule, chunk by chunk, against the loop over tokens: outputs, final states and every gradient."""

import re
from functools import partial

import pytest
import torch

from linear_moe import ops
from linear_moe.ops import chunk
from tests.helpers import fresh_seed, rel_err
from tests.ops import cases

LAYOUTS = cases.layouts()


def inputs(B, T, cu_seqlens=None, **options):
    return cases.inputs("dplr", "channel", B, T, cu_seqlens, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_loop(layout):
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS[layout]
    cases.assert_matches_loop("dplr", inputs(B, T, cu_seqlens), cu_seqlens)


def test_loop_is_the_definition():
    """S_t = (Diag(e^g_t) + b_t a_t^T) S_{t-1} + k_t v_t^T as products of matrices."""
    fresh_seed()
    x = inputs(1, 5)
    o, state = ops.dplr(**x, scale=0.3, return_state=True, backend="reference")
    for h in range(cases.H):
        q, k, v, a, b, g = (x[name][0, :, h] for name in ("q", "k", "v", "a", "b", "g"))
        S = x["initial_state"][0, h]
        for t in range(5):
            S = (torch.diag(g[t].exp()) + torch.outer(b[t], a[t])) @ S + torch.outer(k[t], v[t])
            assert rel_err(o[0, t, h], 0.3 * S.mT @ q[t]) < 1e-12
        assert rel_err(state[0, h], S) < 1e-12


def test_longest_chunks():
    fresh_seed()
    cases.assert_matches_loop("dplr", inputs(1, 4 * chunk.MAX_CHUNK + 1))


@pytest.mark.parametrize("layout", cases.PACKED)
def test_packed_without_reading_lengths(monkeypatch, layout):
    """The layout of a GPU, where lengths stay on the device."""
    monkeypatch.setattr(chunk, "Layout", partial(chunk.Layout, read_lengths=False))
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS[layout]
    cases.assert_matches_loop("dplr", inputs(B, T, cu_seqlens), cu_seqlens)


def test_bf16():
    fresh_seed()
    cases.assert_bf16("dplr", inputs(2, 100))


@pytest.mark.parametrize("widths", ((1, 1), (1, 5), (24, 8)))
def test_widths(monkeypatch, widths):
    """A single key channel too, whose decay is a head's."""
    for name, width in zip("KV", widths):
        monkeypatch.setattr(cases, name, width)
    fresh_seed()
    cases.assert_matches_loop("dplr", inputs(2, 70))


def test_every_decay_strong():
    fresh_seed()
    x = inputs(2, 40)
    cases.assert_matches_loop("dplr", x | {"g": torch.full_like(x["g"], -50)})


def test_without_decay():
    fresh_seed()
    x = inputs(2, 70)
    cases.assert_matches_loop("dplr", x | {"g": torch.zeros_like(x["g"])})


def test_equals_the_delta_rule():
    """With a = k and b = -beta k, no decay and values times beta it is DeltaNet."""
    fresh_seed()
    x = cases.inputs("delta_rule", "none", 2, 70, heads=cases.H)
    q, k, v, beta, state = (x[name] for name in ("q", "k", "v", "beta", "initial_state"))
    beta = beta.unsqueeze(-1)
    o, _ = ops.dplr(q, k, beta * v, k, -beta * k, torch.zeros_like(k), initial_state=state)
    assert rel_err(o, ops.delta_rule(**x)[0]) < 1e-12


def test_gradcheck():
    fresh_seed()
    cu_seqlens = torch.tensor([0, 0, 3, 4, 21], dtype=torch.int32)
    cases.gradcheck("dplr", inputs(1, 21, cu_seqlens, strong=False), cu_seqlens)


def test_exactly_causal():
    fresh_seed()
    cases.assert_rule_causal("dplr", "channel")


def test_state_carries_over():
    fresh_seed()
    x = inputs(2, 70)
    state = x.pop("initial_state")
    whole, last = ops.dplr(**x, initial_state=state, return_state=True)
    parts = []
    for cut in (slice(0, 1), slice(1, 34), slice(34, 70)):
        o, state = ops.dplr(**{name: y[:, cut] for name, y in x.items()}, initial_state=state, return_state=True)
        parts.append(o)
    assert rel_err(torch.cat(parts, 1), whole) < 1e-12
    assert rel_err(state, last) < 1e-12


@pytest.mark.parametrize("packed", (False, True), ids=("dense", "packed"))
def test_reads_no_value(packed):
    """Meta tensors take the path of a GPU and have no values: reading one raises."""
    with torch.device("meta"):
        cu_seqlens = torch.zeros(5, dtype=torch.int32) if packed else None
        x = inputs(1 if packed else 2, 100, cu_seqlens)
        leaves = [y.requires_grad_() for y in x.values()]
        o, state = ops.dplr(**x, return_state=True, cu_seqlens=cu_seqlens)
        torch.autograd.grad(o.sum() + state.sum(), leaves)


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


BAD = {
    "heads": (
        {"v": zeros(1, 6, 4, 12), "g": zeros(1, 6, 4, 8), "initial_state": None},
        "k must be [B, T, H, K] = [1, 6, 4, 8], not [1, 6, 2, 8]",
    ),
    "a-shape": ({"a": zeros(1, 6, 2, 7)}, "a must be [B, T, H, K] = [1, 6, 2, 8], not [1, 6, 2, 7]"),
    "b-missing": ({"b": None}, "b must be a tensor, not NoneType"),
    "g-missing": ({"g": None}, "g must be a tensor, not NoneType"),
    "g-scalar": ({"g": zeros(1, 6, 2)}, "g must be [B, T, H, K] = [1, 6, 2, 8], not [1, 6, 2]"),
    "dtype": ({"b": torch.zeros(1, 6, 2, 8)}, "a, b, v must share a dtype, not torch.float64, torch.float32"),
    "state": ({"initial_state": zeros(1, 2, 8, 8)}, "state must be [N, HV, K, V] = [1, 2, 8, 12]"),
}


@pytest.mark.parametrize("bad", BAD)
def test_refuses(bad):
    change, message = BAD[bad]
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.dplr(**(inputs(1, 6) | change))
