"""The fused combination, norm and gate against torch: outputs and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from linear_moe.ops import routing
from linear_moe.ops.norm import rms_norm
from linear_moe.ops.triton import combine as module
from linear_moe.ops.triton.combine import combine, combine_norm
from tests.helpers import fresh_seed, rel_err

DTYPES = {torch.float32: (1e-5, 1e-4), torch.float16: (1e-2, 1e-2)}
EPS = 1e-5
SHAPES = {"heads": (3, 16), "odd": (2, 20), "wide": (1, 128)}  # HV, V


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that a few tokens are many programs."""
    small, tuned = {"TILE": 64, "BD": 32}, module.configure
    monkeypatch.setattr(module, "configure", lambda *args: tuned(*args) | small)


def routes_of(tokens, J):
    row = torch.randperm(tokens * J).view(J, tokens).mT
    return routing.Routes(None, row, torch.rand(J, tokens).mT, None, None, 0)


def leaves(dtype, **tensors):
    """Tensors of that dtype, and the same values in float64; gradients wanted of both."""
    low = {name: x.to(dtype, copy=True).requires_grad_() for name, x in tensors.items()}
    return low, {name: x.detach().double().requires_grad_() for name, x in low.items()}


def compare(actual, expected, low, high, dtype):
    forward, backward = DTYPES[dtype]
    assert actual.dtype == dtype
    assert rel_err(actual, expected) < forward
    grad = torch.randn_like(actual)
    actual.backward(grad)
    expected.backward(grad.double())
    for name in low:
        assert low[name].grad.dtype == low[name].dtype
        assert rel_err(low[name].grad, high[name].grad) < backward, name


def torch_norm(o, gate, norm, activation, eps=EPS):
    o = rms_norm(o, norm, eps)
    return o if gate is None else o * getattr(F, activation)(gate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((3, 16), (200,)), ids=str)
@pytest.mark.parametrize("tokens, J", ((0, 2), (1, 1), (37, 3)))
def test_combine(tokens, J, shape, dtype):
    fresh_seed()
    routes = routes_of(tokens, J)
    low, high = leaves(dtype, rows=torch.randn(tokens * J, *shape), weights=routes.weights)
    expected = routing.combine(high["rows"], routing.Routes(None, routes.row, high["weights"], None, None, 0))
    compare(combine(low["rows"], routes.row, low["weights"]), expected, low, high, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ("silu", "sigmoid", None))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens, J", ((0, 2), (21, 3), (9, 1)))
def test_combine_norm(tokens, J, shape, activation, dtype):
    fresh_seed()
    heads, routes = SHAPES[shape], routes_of(tokens, J)
    tensors = {"rows": torch.randn(tokens * J, *heads), "weights": routes.weights, "norm": torch.randn(heads[1])}
    if activation is not None:
        tensors["gate"] = torch.randn(tokens, *heads)
    low, high = leaves(dtype, **tensors)
    o = routing.combine(high["rows"], routing.Routes(None, routes.row, high["weights"], None, None, 0))
    eps = 0.3 if J == 1 else EPS  # a norm of a single row forgets its weight, so that only eps gives that a gradient
    expected = torch_norm(o, high.get("gate"), high["norm"], activation, eps)
    options = {"eps": eps, "activation": activation or "silu"}
    actual = combine_norm(low["rows"], routes.row, low["weights"], low.get("gate"), low["norm"], **options)
    compare(actual, expected, low, high, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation, eps", (("silu", EPS), (None, EPS), ("silu", 0.0)))
@pytest.mark.parametrize("shape", SHAPES)
def test_without_routes(shape, activation, eps, dtype):
    """The last block of tokens is not full: without eps the norm of those that are not there is 1 / 0."""
    fresh_seed()
    tensors = {"rows": torch.randn(30, *SHAPES[shape]), "norm": torch.randn(SHAPES[shape][1])}
    if activation is not None:
        tensors["gate"] = torch.randn(30, *SHAPES[shape])
    low, high = leaves(dtype, **tensors)
    expected = torch_norm(high["rows"], high.get("gate"), high["norm"], activation, eps)
    actual = combine_norm(low["rows"], None, None, low.get("gate"), low["norm"], eps=eps, activation="silu")
    compare(actual, expected, low, high, dtype)


def test_gate_in_a_projection_and_float_parameters():
    fresh_seed()
    routes = routes_of(20, 3)
    rows, wide = torch.randn(60, 2, 16).half(), torch.randn(20, 90).half().requires_grad_()
    weights, norm = routes.weights.requires_grad_(), torch.randn(16, requires_grad=True)
    gates = (wide[:, 33:65].unflatten(-1, (2, 16)), wide[:, 33:65].unflatten(-1, (2, 16)).contiguous())
    outputs = [combine_norm(rows, routes.row, weights, g, norm, eps=EPS, activation="silu") for g in gates]
    assert torch.equal(*outputs)
    grad = torch.randn_like(outputs[0])
    for sliced, copied in zip(*(torch.autograd.grad(o, (wide, weights, norm), grad) for o in outputs)):
        assert torch.equal(sliced, copied)
        assert sliced.dtype == (torch.float16 if sliced.shape == wide.shape else torch.float32)


def test_only_the_gradients_that_are_wanted():
    fresh_seed()
    rows, routes, norm = torch.randn(12, 2, 16), routes_of(6, 2), torch.ones(16)
    weights = routes.weights.clone().requires_grad_()
    y = combine_norm(rows, routes.row, weights, torch.randn(6, 2, 16), norm, eps=EPS, activation="sigmoid")
    y.sum().backward()
    assert weights.grad.shape == (6, 2)


def test_on_meta_tensors():
    def empty(*shape):
        return torch.empty(shape, device="meta", requires_grad=True)

    operands = empty(30, 2, 16), empty(10, 3), empty(10, 2, 16), empty(16)
    row = torch.empty(10, 3, dtype=torch.int64, device="meta")
    y = combine_norm(operands[0], row, *operands[1:], eps=EPS, activation="silu")
    assert y.shape == (10, 2, 16)
    assert [g.shape for g in torch.autograd.grad(y.sum(), operands)] == [x.shape for x in operands]
