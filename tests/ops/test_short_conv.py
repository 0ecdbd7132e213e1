"""short_conv, vectorised, against the loop over tokens: outputs, states and every gradient."""

import pytest
import torch

from linear_moe.ops import short_conv
from tests.helpers import fresh_seed, rel_err
from tests.ops import cases

LAYOUTS = cases.layouts((0, 1, 2, 3, 4, 17), cases.PACKED | {"packed": [0, 1, 1, 3, 6, 20, 20]})


def inputs(B, T, cu_seqlens=None, width=4, channels=6):
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    shapes = {"x": (B, T, channels), "weight": (channels, width), "initial_state": (N, channels, width - 1)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def run(x, dtype=torch.float64, **options):
    return cases.results(short_conv, {name: tensor.to(dtype) for name, tensor in x.items()}, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", (1, 2, 4))
@pytest.mark.parametrize("activation", ("silu", None))
def test_matches_loop(activation, width, layout):
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS[layout]
    x, options = inputs(B, T, cu_seqlens, width), {"activation": activation, "cu_seqlens": cu_seqlens}
    reference = run(x, backend="reference", **options)
    cases.assert_close(run(x, **options), reference, 1e-12, 1e-12)
    cases.assert_close(run(x, torch.float32, **options), reference, 1e-5, 1e-4)


@pytest.mark.parametrize("layout", ("T17", "packed"))
def test_without_initial_state(layout):
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS[layout]
    x = inputs(B, T, cu_seqlens)
    zeros = torch.zeros_like(x.pop("initial_state"))
    for backend in ("torch", "reference"):
        y, state = short_conv(**x, return_state=True, cu_seqlens=cu_seqlens, backend=backend)
        expected = short_conv(**x, initial_state=zeros, return_state=True, cu_seqlens=cu_seqlens)
        assert rel_err(y, expected[0]) < 1e-12
        assert torch.equal(state, expected[1])


def test_bf16():
    fresh_seed()
    x = {name: tensor.bfloat16().double() for name, tensor in inputs(2, 50).items()}
    cases.assert_close(run(x, torch.bfloat16), run(x, backend="reference"), 1e-2, 1e-2)


@pytest.mark.parametrize("layout", ("T4", "packed"))
def test_gradcheck(layout):
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS[layout]
    x = inputs(B, T, cu_seqlens, channels=2)

    def function(x, weight, state):
        return short_conv(x, weight, initial_state=state, return_state=True, cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in x.values()], fast_mode=True)


def test_exactly_causal():
    fresh_seed()
    cuts = [(slice(0, t), slice(t, None)) for t in range(1, 9)]
    cases.assert_causal(lambda **x: short_conv(**x)[0], inputs(2, 9), {"x"}, cuts)
    cu_seqlens = torch.tensor([0, 2, 2, 7, 12], dtype=torch.int32)
    cuts = [(slice(2, 7), slice(0, 2)), (slice(2, 5), slice(5, None)), (slice(0, 7), slice(7, None))]
    x = inputs(1, 12, cu_seqlens)
    cases.assert_causal(lambda **x: short_conv(**x, cu_seqlens=cu_seqlens)[0], x, {"x"}, cuts)


def test_state_carries_over():
    fresh_seed()
    x = inputs(2, 12)
    state = x["initial_state"]
    whole, last = short_conv(**x, return_state=True)
    parts = []
    for part in x["x"].split([1, 2, 1, 8], 1):
        y, state = short_conv(part, x["weight"], initial_state=state, return_state=True)
        parts.append(y)
    assert rel_err(torch.cat(parts, 1), whole) < 1e-12
    assert torch.equal(state, last)
