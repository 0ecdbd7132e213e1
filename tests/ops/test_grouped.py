"""grouped_linear, and the kernel that it uses on CUDA, against one product a row."""

import pytest
import torch

from linear_moe.ops import grouped_linear
from linear_moe.ops.grouped import grouped_mm
from tests.helpers import rel_err

LENGTHS = [0, 7, 3, 0, 12]


@pytest.mark.parametrize(("width", "D"), [(16, 8), (13, 8), (16, 12), (13, 5)], ids=str)
@pytest.mark.parametrize(
    ("function", "dtype", "tolerance"),
    [(grouped_linear, torch.float64, 1e-14), (grouped_linear, torch.float32, 1e-6), (grouped_mm, torch.bfloat16, 1e-2)],
    ids=["cpu-float64", "cpu-float32", "kernel-bfloat16"],
)
def test_grouped_linear(function, dtype, tolerance, width, D, seed):
    x = torch.randn(sum(LENGTHS), D).to(dtype).requires_grad_()
    weight = torch.randn(len(LENGTHS), width, D).to(dtype).requires_grad_()
    offsets = torch.tensor(LENGTHS).cumsum(0, dtype=torch.int32)
    direction = torch.randn(sum(LENGTHS), width, dtype=torch.float64)
    y = function(x, weight, offsets)
    grads = torch.autograd.grad((y * direction.to(dtype)).sum(), (x, weight))
    group = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = torch.einsum("rd,red->re", wide_x, wide_weight[group])
    wanted = torch.autograd.grad((expected * direction.to(dtype).double()).sum(), (wide_x, wide_weight))
    assert rel_err(y, expected) < tolerance
    assert all(rel_err(a, b) < tolerance for a, b in zip(grads, wanted))
    assert not grads[1][[0, 3]].any()
    torch.autograd.grad(function(x, weight, offsets).sum(), (x, weight))  # an expanded gradient


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"not \[3, 4\], \[2, 5, 6\] and \[2\]"):
        grouped_linear(torch.zeros(3, 4), torch.zeros(2, 5, 6), torch.zeros(2, dtype=torch.int32))


def test_dtypes_are_checked():
    with pytest.raises(ValueError, match=r"must share a dtype, not torch.float16 and torch.float32"):
        grouped_linear(torch.ones(3, 4).half(), torch.ones(1, 5, 4), torch.tensor([3], dtype=torch.int32))
