"""ops/summary.py on the rules' kernels: one preparation of the chunks, then a walk that leaves nothing but its last
state, once for U from zeros, and for the delta rules once more for P, from the identity with zeros for values.

The backward is the rules' own where the outputs' gradient is zero: once for U and once for P, so that the states of
only one of them are there at a time, and not at all where nobody asked for that one. Saved: the operands, and of the
delta rules what their preparation solved, as in rules.py and dplr.py. There are no queries: in a forward that reads
none the keys stand for them, elsewhere zeros do.
"""

import torch
from torch.autograd.function import once_differentiable

from ..sequences import sequence_of
from . import dplr as dplr_rule
from . import rules
from .decay import CHANNEL, CONSTANT, NONE
from .problem import Problem, contiguous


def _zeros(p, heads, channels):
    return torch.zeros(p.B, p.T, heads, channels, dtype=p.dtype, device=p.device)


def _identity(p):
    """[N, HV, K, K]."""
    return torch.eye(p.K, dtype=torch.float32, device=p.device).expand(p.N, p.HV, p.K, p.K).contiguous()


def _sum(x, y):
    """Of two gradients, each perhaps None, which is zero."""
    if x is None or y is None:
        return y if x is None else x
    return x + y


class _Attention(torch.autograd.Function):
    """(decay of the whole sequence [N, HV, K or 1], or None without one, state)."""

    @staticmethod
    def forward(ctx, k, v, g, cu_seqlens):
        p = rules.problem_of(k, v, None, g, 1.0, cu_seqlens)
        state = p.states(p.N)
        transition = None if p.decay == NONE else p.empty(p.N, p.HV, p.K if p.decay == CHANNEL else 1)
        rules.Prepared(p, k, k, None, g).scan_for_summary(p, v, None, None, state, transition)
        ctx.save_for_backward(k, v, g, transition)
        ctx.problem = p
        ctx.set_materialize_grads(False)
        return transition, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dtransition, dstate):
        k, v, g, transition = ctx.saved_tensors
        p, need_dg = ctx.problem, ctx.needs_input_grad[2]
        dk = dv = dg = None
        if dstate is not None:
            q, do = _zeros(p, p.H, p.K), _zeros(p, p.HV, p.V)
            prepared = rules.Prepared(p, q, k, None, g)
            dk, dv, _, dg, _ = rules.backward(
                p, prepared, q, k, v, None, g, None, do, dstate.contiguous(), None, need_dg
            )
        if dtransition is not None and need_dg:
            dg = _sum(dg, _of_tokens(p, dtransition * transition).to(g.dtype).view(g.shape))
        return dk, dv, dg, None


def _of_tokens(p, d_sum):
    """The gradient of every log decay, from that of their sum over each sequence [N, HV, D]."""
    if p.decay == CONSTANT:
        lengths = p.T if p.cu_seqlens is None else p.cu_seqlens.diff()[:, None, None]
        return (d_sum * lengths).sum(0)
    if p.cu_seqlens is None:
        return d_sum.unsqueeze(1).expand(p.B, p.T, p.HV, d_sum.shape[-1]).contiguous()
    return d_sum[sequence_of(p.T, p.cu_seqlens)]


class _Delta(torch.autograd.Function):
    """(transition, state)."""

    @staticmethod
    def forward(ctx, k, v, beta, g, cu_seqlens):
        p = rules.problem_of(k, v, beta, g, 1.0, cu_seqlens)
        square = p.with_values(p.K)
        prepared = rules.Prepared(p, k, k, beta, g)
        state, transition = p.states(p.N), square.states(p.N)
        prepared.scan_for_summary(p, v, beta, None, state)
        prepared.scan_for_summary(square, _zeros(p, p.HV, p.K), beta, _identity(p), transition)
        ctx.save_for_backward(k, v, beta, g, prepared.P)
        ctx.problem = p
        ctx.set_materialize_grads(False)
        return transition, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dtransition, dstate):
        k, v, beta, g, P = ctx.saved_tensors
        p, need_dg = ctx.problem, ctx.needs_input_grad[3]
        q = _zeros(p, p.H, p.K)
        prepared = rules.Prepared(p, q, k, beta, g, P)
        dk = dv = dbeta = dg = None
        if dstate is not None:
            do = _zeros(p, p.HV, p.V)
            dk, dv, dbeta, dg, _ = rules.backward(
                p, prepared, q, k, v, beta, g, None, do, dstate.contiguous(), None, need_dg
            )
        if dtransition is not None:
            square, zeros = p.with_values(p.K), _zeros(p, p.HV, p.K)
            of_k, _, of_beta, of_g, _ = rules.backward(
                square, prepared, q, k, zeros, beta, g, _identity(p), zeros, dtransition.contiguous(), None, need_dg
            )
            dk, dbeta, dg = _sum(dk, of_k), _sum(dbeta, of_beta), _sum(dg, of_g)
        return dk, dv, dbeta, dg, None


class _Dplr(torch.autograd.Function):
    """(transition, state)."""

    @staticmethod
    def forward(ctx, k, v, a, b, g, cu_seqlens):
        p = Problem(k, v, 1.0, cu_seqlens, tuned_as="dplr_{}")
        square = p.with_values(p.K)
        zeros = _zeros(p, p.HV, p.K)
        # zeros for the queries too: the walk multiplies them, though it keeps nothing of it
        prepared = dplr_rule.Prepared(p, zeros, k, a, b, g)
        state, transition = p.states(p.N), square.states(p.N)
        prepared.scan_for_summary(p, v, None, state)
        prepared.scan_for_summary(square, zeros, _identity(p), transition)
        ctx.save_for_backward(k, v, a, b, g, prepared.P)
        ctx.problem = p
        ctx.set_materialize_grads(False)
        return transition, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dtransition, dstate):
        k, v, a, b, g, P = ctx.saved_tensors
        p, zeros = ctx.problem, _zeros(ctx.problem, ctx.problem.HV, ctx.problem.K)
        prepared = dplr_rule.Prepared(p, zeros, k, a, b, g, P)
        dk = dv = da = db = dg = None
        if dstate is not None:
            do = _zeros(p, p.HV, p.V)
            _, dk, dv, da, db, dg, _ = dplr_rule.backward(
                p, prepared, zeros, k, v, a, b, g, None, do, dstate.contiguous()
            )
        if dtransition is not None:
            square, dlast = p.with_values(p.K), dtransition.contiguous()
            _, of_k, _, of_a, of_b, of_g, _ = dplr_rule.backward(
                square, prepared, zeros, k, zeros, a, b, g, _identity(p), zeros, dlast
            )
            dk, da, db, dg = _sum(dk, of_k), _sum(da, of_a), _sum(db, of_b), _sum(dg, of_g)
        return dk, dv, da, db, dg, None


def linear_attention(k, v, g=None, *, cu_seqlens=None):
    """See api.summary."""
    transition, state = _Attention.apply(*contiguous(k, v, g), cu_seqlens)
    if transition is None:
        return torch.ones(state.shape[:3], dtype=state.dtype, device=state.device), state
    return transition.expand(state.shape[:3]).contiguous(), state


def delta_rule(k, v, beta, g=None, *, cu_seqlens=None):
    """See api.summary."""
    return _Delta.apply(*contiguous(k, v, beta, g), cu_seqlens)


def dplr(k, v, a, b, g, *, cu_seqlens=None):
    """See api.summary."""
    return _Dplr.apply(*contiguous(k, v, a, b, g), cu_seqlens)
