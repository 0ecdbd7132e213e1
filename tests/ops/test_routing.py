"""Routes, gather and combine against loops; the router's choice."""

from dataclasses import fields

import pytest
import torch

from linear_moe.ops import combine, gather, route, topk_router
from linear_moe.ops.routing import route_reference
from tests.helpers import fresh_seed, rel_err

M, K = 4, 2
LAYOUTS = {
    "dense": (3, 11, None),
    "dense-one": (1, 1, None),
    "dense-no-token": (2, 0, None),
    "packed": (1, 20, [0, 0, 7, 8, 20, 20]),
    "packed-no-token": (1, 0, [0, 0]),
}


def draw(layout):
    B, T, ends = LAYOUTS[layout]
    weights, indices, _ = topk_router(torch.randn(B, T, M, dtype=torch.float64), K)
    return indices, weights, ends and torch.tensor(ends, dtype=torch.int32)


@pytest.mark.parametrize("shared", (False, True), ids=("routed", "shared"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_loop(layout, shared):
    fresh_seed()
    indices, weights, cu_seqlens = draw(layout)
    routes = route(indices, weights, num_memories=M, shared=shared, cu_seqlens=cu_seqlens)
    expected = route_reference(indices, weights, num_memories=M, shared=shared, cu_seqlens=cu_seqlens)
    for field in fields(routes):
        found, wanted = getattr(routes, field.name), getattr(expected, field.name)
        if torch.is_tensor(found):
            assert found.dtype == wanted.dtype, field.name
            assert torch.equal(found, wanted), field.name
        else:
            assert found == wanted, field.name


@pytest.mark.parametrize("shared", (False, True), ids=("routed", "shared"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_and_combine(layout, shared):
    fresh_seed()
    indices, weights, cu_seqlens = draw(layout)
    routes = route(indices, weights.requires_grad_(), num_memories=M, shared=shared, cu_seqlens=cu_seqlens)
    x = torch.randn(indices.shape[0] * indices.shape[1], 3, 2, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(len(routes.token), 1, 1, dtype=torch.float64)
    o, expected = combine(gather(x, routes) * scale, routes), 0 * x
    for row, t in enumerate(routes.token.tolist()):
        weight = routes.weights[t, routes.row[t].tolist().index(row)]
        expected = expected + weight * scale[row] * torch.eye(len(x), dtype=x.dtype)[t].view(-1, 1, 1) * x[t]
    assert rel_err(o, expected) < 1e-14
    do = torch.randn_like(o)
    grads = [torch.autograd.grad((y * do).sum(), (x, weights), materialize_grads=True) for y in (o, expected)]
    for found, wanted in zip(*grads):
        assert rel_err(found, wanted) < 1e-14


def test_gradcheck():
    fresh_seed()
    indices, weights, cu_seqlens = draw("packed")
    x = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)

    def function(x, weights):
        routes = route(indices, weights, num_memories=M, shared=True, cu_seqlens=cu_seqlens)
        return combine(gather(x, routes).sin(), routes)

    arguments = (x, weights.detach().requires_grad_())
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


def test_combine_keeps_the_dtype_of_rows():
    fresh_seed()
    indices, weights, _ = draw("dense")
    routes = route(indices, weights.float(), num_memories=M, shared=True)
    rows = torch.randn(len(routes.token), 5, dtype=torch.bfloat16)
    o = combine(rows, routes)
    assert o.dtype == torch.bfloat16
    assert rel_err(o, combine(rows.double(), routes)) < 1e-2


def test_combine_wants_all_rows():
    indices, weights = torch.zeros(1, 3, 1, dtype=torch.int64), torch.ones(1, 3, 1)
    routes = route(indices, weights, num_memories=2, shared=True)
    with pytest.raises(ValueError, match="the routes have 6 rows, rows has 5"):
        combine(torch.ones(5, 2), routes)


def test_topk_router():
    fresh_seed()
    logits = torch.randn(3, 5, M, dtype=torch.bfloat16)
    weights, indices, probs = topk_router(logits, K)
    assert probs.dtype == weights.dtype == torch.float32
    assert rel_err(probs, logits.double().softmax(-1)) < 1e-6
    top = probs.gather(-1, indices)
    assert torch.equal(top, probs.topk(K).values)
    assert rel_err(weights, top / top.sum(-1, keepdim=True)) < 1e-6
    x = torch.randn(3, M, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: topk_router(x, K)[::2], x)


def test_topk_router_breaks_ties_by_index():
    _, indices, _ = topk_router(torch.zeros(7, M), K)
    assert torch.equal(indices, torch.arange(K).expand(7, K))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weights": torch.ones(1, 3, 1)}, r"indices and weights must both be \[B, T, k\]"),
        ({"indices": torch.zeros(1, 3, 2)}, "indices must be integers"),
        ({"num_memories": 1}, r"k \(2\) must not exceed num_memories \(1\)"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0])}, "cu_seqlens must be int32 or int64"),
    ],
    ids=("shapes", "dtype", "memories", "cu_seqlens"),
)
def test_bad_routes(change, message):
    arguments = {"indices": torch.zeros(1, 3, 2, dtype=torch.int64), "weights": torch.ones(1, 3, 2), "num_memories": M}
    with pytest.raises(ValueError, match=message):
        route(**arguments | change, shared=False)


@pytest.mark.parametrize("k", (0, M + 1))
def test_bad_k(k):
    with pytest.raises(ValueError, match=f"k \\({k}\\) must be between 1 and the number of memories \\({M}\\)"):
        topk_router(torch.zeros(2, M), k)
