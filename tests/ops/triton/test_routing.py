"""Routes from kernels equal those of the torch version, which loops specify."""

from dataclasses import fields

import pytest
import torch

from linear_moe.ops import routing
from linear_moe.ops.triton import launch as launches
from linear_moe.ops.triton.routing import route
from tests.helpers import fresh_seed

LAYOUTS = {  # B, T, cu_seqlens
    "dense": (3, 11, None),
    "dense-blocks": (2, 700, None),
    "dense-one": (1, 1, None),
    "dense-no-token": (2, 0, None),
    "dense-no-batch": (0, 5, None),
    "packed": (1, 20, [0, 0, 7, 8, 20, 20]),
    "packed-blocks": (1, 1024, [0, 1, 255, 256, 257, 257, 512, 1000, 1024]),
    "packed-no-token": (1, 0, [0, 0]),
}
CHOICES = {"2of4": (4, 2), "1of1": (1, 1), "3of5": (5, 3), "16of128": (128, 16)}


def draw(layout, choice, dtype=torch.float32):
    (B, T, ends), (M, k) = LAYOUTS[layout], CHOICES[choice]
    weights, indices, _ = routing.topk_router(torch.randn(B, T, M), k)
    return indices, weights.to(dtype), M, ends and torch.tensor(ends, dtype=torch.int32)


def assert_same(found, wanted):
    for field in fields(wanted):
        x, y = getattr(found, field.name), getattr(wanted, field.name)
        if torch.is_tensor(y):
            assert x.dtype == y.dtype, field.name
            assert torch.equal(x, y), field.name
        else:
            assert x == y, field.name


@pytest.mark.parametrize("shared", (False, True), ids=("routed", "shared"))
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_torch(layout, choice, shared):
    fresh_seed()
    indices, weights, M, cu_seqlens = draw(layout, choice)
    options = {"num_memories": M, "shared": shared, "cu_seqlens": cu_seqlens}
    if not indices.shape[0]:
        wanted = routing.route_reference(indices, weights, **options)
    else:
        wanted = routing.route(indices, weights, **options)
    assert_same(route(indices, weights, **options), wanted)


@pytest.mark.parametrize("dtype", (torch.int32, torch.uint8), ids=str)
def test_dead_memories_and_any_layout_of_indices(dtype):
    fresh_seed()
    indices, weights, M, _ = draw("dense-blocks", "3of5")
    indices = (2 * indices % 5).mT.contiguous().mT.to(dtype)  # distinct still; the choices' stride is T
    options = {"num_memories": 2 * M, "shared": True}
    assert_same(route(indices, weights, **options), routing.route(indices, weights, **options))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_weights_are_differentiable(dtype):
    fresh_seed()
    indices, weights, M, cu_seqlens = draw("packed", "2of4", dtype)
    weights.requires_grad_()
    routes = route(indices, weights, num_memories=M, shared=True, cu_seqlens=cu_seqlens)
    direction = torch.randn_like(routes.weights)
    (gradient,) = torch.autograd.grad((routes.weights * direction).sum(), weights)
    assert torch.equal(gradient, direction[:, :-1].view_as(gradient))


def test_two_launches_whatever_the_lengths():
    launches.recorded.clear()
    indices = torch.empty(2, 3000, 2, dtype=torch.int64, device="meta")
    routes = route(indices, torch.empty(2, 3000, 2, device="meta"), num_memories=4, shared=True)
    other = route(indices[:, :7], torch.empty(2, 7, 2, device="meta"), num_memories=4, shared=True)
    assert routes.token.shape == (2 * 3000 * 3,) and other.token.shape == (2 * 7 * 3,)
    (count, place, *again), options = launches.recorded, [record[3] for record in launches.recorded]
    assert [count[0], place[0]] == [record[0] for record in again]
    assert options[:2] == options[2:]
    launches.recorded.clear()
