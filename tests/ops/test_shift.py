"""token_shift against its loop: exactly, with every gradient."""

import re

import pytest
import torch

from linear_moe import ops
from linear_moe.ops import reference
from tests.helpers import fresh_seed
from tests.ops import cases

LAYOUTS = cases.layouts((0, 1, 7), cases.PACKED | {"packed-last-empty": [0, 3, 4, 4, 4]})
D = 5


def inputs(B, T, cu_seqlens):
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    return {"x": torch.randn(B, T, D, dtype=torch.float64), "initial_state": torch.randn(N, D, dtype=torch.float64)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_loop(layout):
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS[layout]
    x = inputs(B, T, cu_seqlens)
    ours, expected = (cases.results(f, x, cu_seqlens=cu_seqlens) for f in (ops.token_shift, reference.token_shift))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    ours = ops.token_shift(x["x"], return_state=True, cu_seqlens=cu_seqlens)
    zeros = torch.zeros_like(x["initial_state"])
    expected = reference.token_shift(x["x"], initial_state=zeros, return_state=True, cu_seqlens=cu_seqlens)
    assert all(torch.equal(y, z) for y, z in zip(ours, expected))


def test_borders():
    """Two tokens of one sequence, none of the next, one of the last."""
    x = torch.tensor([[[1.0], [2.0], [3.0]]])
    state, cu_seqlens = torch.tensor([[-1.0], [-2.0], [-3.0]]), torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    shifted, last = ops.token_shift(x, initial_state=state, return_state=True, cu_seqlens=cu_seqlens)
    assert shifted.flatten().tolist() == [-1, 1, -3] and last.flatten().tolist() == [2, -2, 3]
    shifted, last = ops.token_shift(x, cu_seqlens=cu_seqlens)
    assert shifted.flatten().tolist() == [0, 1, 0] and last is None


def test_state_carries_over():
    fresh_seed()
    x = inputs(2, 9, None)
    whole, last = ops.token_shift(**x, return_state=True)
    state, parts = x["initial_state"], []
    for cut in (slice(0, 1), slice(1, 1), slice(1, 9)):
        part, state = ops.token_shift(x["x"][:, cut], initial_state=state, return_state=True)
        parts.append(part)
    assert torch.equal(torch.cat(parts, 1), whole) and torch.equal(state, last)


def test_gradcheck():
    fresh_seed()
    _, T, cu_seqlens = LAYOUTS["packed-last-empty"]
    x = [tensor.requires_grad_() for tensor in inputs(1, T, cu_seqlens).values()]
    options = {"return_state": True, "cu_seqlens": cu_seqlens}
    assert torch.autograd.gradcheck(lambda x, state: ops.token_shift(x, initial_state=state, **options), x)


def test_exactly_causal():
    fresh_seed()
    _, T, cu_seqlens = LAYOUTS["packed"]
    cuts = [(slice(63, 64), slice(0, 63)), (slice(64, 129), slice(0, 64)), (slice(0, 64), slice(63, None))]

    def function(**x):
        return ops.token_shift(**x, cu_seqlens=cu_seqlens)[0]

    cases.assert_causal(function, inputs(1, T, cu_seqlens), {"x"}, cuts)


@pytest.mark.parametrize("packed", (False, True), ids=("dense", "packed"))
def test_nothing_is_read_back(packed):
    """Meta tensors take a GPU's path and have no values."""
    with torch.device("meta"):
        cu_seqlens = torch.zeros(5, dtype=torch.int32) if packed else None
        x, state = torch.zeros(1 if packed else 4, 50, D, requires_grad=True), torch.zeros(4, D, requires_grad=True)
        y, last = ops.token_shift(x, initial_state=state, return_state=True, cu_seqlens=cu_seqlens)
        torch.autograd.grad(y.sum() + last.sum(), (x, state))


BAD = {
    "x": ({"x": torch.zeros(2, 6)}, "x must be a tensor [B, T, D]"),
    "state": ({"initial_state": torch.zeros(2, 4)}, "initial_state must be [N, D] = [2, 5], not [2, 4]"),
    "batch": ({"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)}, "with cu_seqlens the batch size (2) must be 1"),
}


@pytest.mark.parametrize("bad", BAD)
def test_refuses(bad):
    change, message = BAD[bad]
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.token_shift(**{"x": torch.zeros(2, 6, D)} | change)
