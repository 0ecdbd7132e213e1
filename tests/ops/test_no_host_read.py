"""On a GPU nothing is read back to the host. Meta tensors take the same path and have no values: reading one raises."""

import pytest
import torch

from linear_moe import ops
from tests.ops import cases


@pytest.fixture
def no_values():
    with torch.device("meta"):
        yield


@pytest.mark.parametrize("packed", (False, True), ids=("dense", "packed"))
@pytest.mark.parametrize("decay", cases.DECAYS)
@pytest.mark.parametrize("rule", ("linear_attention", "delta_rule"))
def test_rules(no_values, rule, decay, packed):
    cu_seqlens = torch.zeros(5, dtype=torch.int32) if packed else None
    x = cases.inputs(rule, decay, 1 if packed else 2, 100, cu_seqlens)
    leaves = [tensor.requires_grad_() for tensor in x.values()]
    o, state = getattr(ops, rule)(**x, return_state=True, cu_seqlens=cu_seqlens)
    torch.autograd.grad(o.sum() + state.sum(), leaves)


@pytest.mark.parametrize("packed", (False, True), ids=("dense", "packed"))
def test_short_conv(no_values, packed):
    cu_seqlens = torch.zeros(5, dtype=torch.int32) if packed else None
    x, weight = torch.zeros(1 if packed else 4, 50, 6, requires_grad=True), torch.zeros(6, 4, requires_grad=True)
    state = torch.zeros(4, 6, 3, requires_grad=True)
    y, last = ops.short_conv(x, weight, initial_state=state, return_state=True, cu_seqlens=cu_seqlens)
    torch.autograd.grad(y.sum() + last.sum(), (x, weight, state))


@pytest.mark.parametrize("packed", (False, True), ids=("dense", "packed"))
def test_routing(no_values, packed):
    cu_seqlens = torch.zeros(5, dtype=torch.int32) if packed else None
    logits = torch.zeros(1 if packed else 2, 50, 4, requires_grad=True)
    x = torch.zeros(len(logits) * 50, 6, requires_grad=True)
    weights, indices, _ = ops.topk_router(logits, 2)
    routes = ops.route(indices, weights, num_memories=4, shared=True, cu_seqlens=cu_seqlens)
    torch.autograd.grad(ops.combine(ops.gather(x, routes), routes).sum(), (logits, x))
