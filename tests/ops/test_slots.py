"""Reading a state by its values: the gradient of linear_attention's queries, in every layout."""

from functools import partial

import pytest
import torch

from linear_moe.ops import chunk, reference, slots
from tests.helpers import fresh_seed, rel_err
from tests.ops import cases

LAYOUTS = cases.layouts((0, 1, 64, 65, 257))


def inputs(B, T, cu_seqlens):
    x = cases.inputs("linear_attention", "channel", B, T, cu_seqlens, heads=cases.H)
    return x | {"x": torch.randn(B, T, cases.H, cases.V).double()}


def expected(x, cu_seqlens):
    """r_t = scale S_t x_t is the gradient of sum_t x_t . (scale S_t^T q_t) to q_t, whatever q is."""
    cotangent, q = x["x"], x["q"].requires_grad_()
    operands = {name: tensor for name, tensor in x.items() if name != "x"}
    o, state = reference.linear_attention(**operands, scale=0.3, return_state=True, cu_seqlens=cu_seqlens)
    return torch.autograd.grad(o, q, cotangent)[0] if o.requires_grad else torch.zeros_like(q), state


@pytest.mark.parametrize("read_lengths", (None, False), ids=("cpu", "gpu"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_the_queries_gradient(monkeypatch, layout, read_lengths):
    monkeypatch.setattr(chunk, "Layout", partial(chunk.Layout, read_lengths=read_lengths))
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS[layout]
    x = inputs(B, T, cu_seqlens)
    r, state = expected(x, cu_seqlens)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        given = {name: tensor.to(dtype) for name, tensor in x.items() if name != "q"}
        ours = slots.read_by_value(**given, scale=0.3, return_state=True, cu_seqlens=cu_seqlens)
        assert [y.dtype for y in ours] == [dtype, dtype]
        assert rel_err(ours[0], r) < limit and rel_err(ours[1], state) < limit


def test_answers_of_half_precision_are_wide():
    """They are exponentiated next."""
    x = {name: tensor.bfloat16() for name, tensor in inputs(2, 20, None).items() if name != "q"}
    r, state = slots.read_by_value(**x, scale=1.0)
    assert r.dtype == torch.float32 and state is None
