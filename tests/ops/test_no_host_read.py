"""On a GPU nothing is read back to the host. Meta tensors take the same path and have no values: reading one raises."""

import pytest
import torch

from linear_moe import ops
from tests.ops import cases, steps


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


@pytest.mark.parametrize("stored", (False, True), ids=("states", "store"))
@pytest.mark.parametrize("case", steps.CASES, ids=steps.IDS)
def test_steps(no_values, case, stored):
    x, state = steps.draw(case, T=1)
    slots, offset = torch.zeros(3).int() if stored else None, torch.zeros(3).int()
    ops.step(case[0], state, *steps.token(x, 0), **steps.options(case[0], offset), slots=slots)


@pytest.mark.parametrize("stored", (False, True), ids=("states", "store"))
def test_steps_of_what_stands_before_a_rule(no_values, stored):
    slots, x = torch.zeros(2).int() if stored else None, torch.zeros(2, 6)
    ops.conv_step(x, torch.zeros(6, 4), torch.zeros(2, 6, 3), normalize=3, slots=slots)
    ops.shift_step(x, torch.zeros(2, 6), slots=slots)
