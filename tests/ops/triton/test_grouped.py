"""The grouped linear map that gathers its rows, and its gradients, against torch's on gathered rows."""

import pytest
import torch

from linear_moe.ops import grouped as torch_ops
from linear_moe.ops import routing
from linear_moe.ops.triton import launch as launches
from linear_moe.ops.triton.grouped import grouped_linear
from tests.helpers import fresh_seed, rel_err

TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.float16: (2e-3, 2e-3)}
LENGTHS = {"mixed": [0, 7, 140, 0, 12], "full-tiles": [128, 64], "one-row": [0, 1], "empty": [0, 0]}
WIDTHS = {"full-tiles": (256, 64), "edges": (264, 72), "unaligned": (13, 69)}  # E, D


def both(x, weight, offsets, token=None, row=None):
    """(forward, gradients) of the kernels, and of torch in float64."""
    direction = torch.randn(len(x) if token is None else len(token), weight.shape[1]).to(x.dtype)
    y = grouped_linear(x, weight, offsets, token, row)
    assert y.dtype == x.dtype
    grads = torch.autograd.grad(y, (x, weight), direction)
    assert all(grad.dtype == x.dtype for grad in grads)
    exact = [a.detach().double().requires_grad_() for a in (x, weight)]
    wanted = torch_ops.grouped_linear(exact[0] if token is None else exact[0][token], exact[1], offsets)
    return (y, *grads), (wanted, *torch.autograd.grad(wanted, exact, direction.double()))


def assert_close(found, wanted, dtype):
    forward, gradient = TOLERANCES[dtype]
    for name, x, ref, tolerance in zip(("y", "dx", "dweight"), found, wanted, (forward, gradient, gradient)):
        assert rel_err(x, ref) < tolerance, name


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_rows_in_place(lengths, widths, dtype):
    fresh_seed()
    lengths, (E, D) = LENGTHS[lengths], WIDTHS[widths]
    x = torch.randn(sum(lengths), D).to(dtype).requires_grad_()
    weight = (torch.randn(len(lengths), E, D) / D**0.5).to(dtype).requires_grad_()
    offsets = torch.tensor(lengths).cumsum(0, dtype=torch.int32)
    assert_close(*both(x, weight, offsets), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("tokens", (0, 1, 150))
def test_rows_of_tokens(tokens, widths, dtype):
    fresh_seed()
    E, D = WIDTHS[widths]
    weights, indices, _ = routing.topk_router(torch.randn(1, tokens, 4), 2)
    routes = routing.route(indices, weights, num_memories=4, shared=True)
    x = torch.randn(tokens, D).to(dtype).requires_grad_()
    weight = (torch.randn(5, E, D) / D**0.5).to(dtype).requires_grad_()
    found, wanted = both(x, weight, routes.memory_offsets, routes.token, routes.row)
    assert_close(found, wanted, dtype)


def test_a_group_sees_no_other_rows():
    """A NaN in one group's row stays in that group, also in gradients of the weight."""
    fresh_seed()
    x, weight = torch.randn(20, 32), torch.randn(2, 16, 32, requires_grad=True)
    x[0] = torch.nan
    y = grouped_linear(x, weight, torch.tensor([5, 20], dtype=torch.int32))
    (dweight,) = torch.autograd.grad(y[5:].sum(), weight)
    assert y[1:].isfinite().all()
    assert dweight[1].isfinite().all()


def test_strides_and_needed_gradients_only():
    fresh_seed()
    offsets = torch.tensor([4, 9], dtype=torch.int32)
    x, weight = torch.randn(33, 9).mT, torch.randn(2, 33, 17).mT.requires_grad_()
    y = grouped_linear(x, weight, offsets)
    assert rel_err(y, torch_ops.grouped_linear(x, weight, offsets)) < 1e-5
    (saved,) = torch.autograd.grad(y.sum(), weight)  # the gradient of a sum is expanded
    wanted = torch.stack([part.sum(0).expand(17, 33) for part in (x[:4], x[4:])])
    assert rel_err(saved, wanted) < 1e-5
    assert grouped_linear(x, weight.detach(), offsets).grad_fn is None
    launches.recorded.clear()
    x, weight = torch.empty(9, 33, device="meta", requires_grad=True), torch.empty(2, 17, 33, device="meta")
    grouped_linear(x, weight, offsets.to("meta")).sum().backward()
    assert len(launches.recorded) == 2  # forward and dx
    launches.recorded.clear()
