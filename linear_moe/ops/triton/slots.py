"""ops/slots.py on the rules' kernels.

r_t = scale S_t x_t is what linear_attention's backward computes for its queries when x is the output's gradient. Both
are sides of one form: with y the gradient of r, sum_t r_t . y_t = sum_t x_t . (scale S_t^T y_t). So x's gradient is
linear_attention for the queries y, and all others are those of linear_attention for the queries y and the gradient x.
"""

import torch
from torch.autograd.function import once_differentiable

from .problem import contiguous
from .rules import Prepared, backward, launch_key_gradients, problem_of


class _ReadByValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, k, v, g, initial, cu_seqlens, scale, return_state):
        p = problem_of(k, v, None, g, scale, cu_seqlens)
        states, r = p.states(p.chunks.count, p.wide), p.empty(*k.shape)
        final = p.states(p.N) if return_state else None
        # There is no query: k stands for it, and what is made of it is not read.
        Prepared(p, k, k, None, g).scan_for_states(p, v, None, initial, states, None, final)
        launch_key_gradients(p, k, k, v, None, g, None, x, None, states, None, r, None, need_dg=False)
        ctx.save_for_backward(x, k, v, g, initial)
        ctx.problem = p
        ctx.set_materialize_grads(False)
        return r, final

    @staticmethod
    @once_differentiable
    def backward(ctx, y, dfinal):
        x, k, v, g, initial = ctx.saved_tensors
        p = ctx.problem
        y, dfinal = contiguous(torch.zeros_like(k) if y is None else y.to(k.dtype), dfinal)
        prepared, dx = Prepared(p, y, k, None, g), torch.empty_like(x)
        prepared.scan_for_outputs(p, v, None, initial, dx, None)
        need_dg = ctx.needs_input_grad[3]
        dk, dv, _, dg, dinitial = backward(p, prepared, y, k, v, None, g, initial, x, dfinal, None, need_dg)
        return dx, dk, dv, dg, dinitial, None, None, None


def read_by_value(x, k, v, g, *, scale, initial_state=None, return_state=False, cu_seqlens=None):
    """See ops/slots.py."""
    operands = contiguous(x, k, v, g, initial_state)
    return _ReadByValue.apply(*operands, cu_seqlens, scale, return_state)
