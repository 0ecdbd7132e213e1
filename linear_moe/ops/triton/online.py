"""ttt_linear and titans_linear on Triton kernels: what api.py calls.

Saved for the backward: the operands. There a first walk writes the memory before every mini-batch, and a second one
walks back with its gradient.
"""

import torch
import triton
from torch.autograd.function import once_differentiable

from .launch import launch
from .mini_batches import slot_table
from .problem import Problem, block, contiguous
from .titans import titans_backward, titans_finish_back, titans_forward, titans_prepare
from .ttt import ttt_acc, ttt_acc_back, ttt_backward, ttt_finish_back, ttt_forward, ttt_prepare, ttt_prepare_back


def _slots(p):
    """Which rows every mini-batch holds, for kernels that take all of them in parallel."""
    return slot_table(p.B, p.T, p.cu_seqlens, p.offset, p.C, p.device)


class _TTT(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, eta, token_scale, weight, bias, initial, p, eps, return_state):
        operands, o = (q, k, v, eta, token_scale, weight, bias, initial), torch.empty_like(v)
        final = torch.zeros(p.N, p.H, 2, p.V + 1, p.V, device=p.device) if return_state else None
        if initial is not None:
            sizes = p.sizes("H", "V", "C", "BC", "PRECISION", "WIDE") | {"BV": block(p.V)}
            launch(
                ttt_acc, (p.N * p.H,), q, token_scale, initial, p.offset, o, p.cu_seqlens, p.scale, p.T, **sizes,
                **p.configure("ttt_acc"),
            )  # fmt: skip
        _ttt_walk(p, operands, _ttt_prepare(p, q, k, _slots(p)), eps, o=o, final=final)
        ctx.save_for_backward(*operands)
        ctx.problem, ctx.eps = p, eps
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal):
        p, operands, table = ctx.problem, ctx.saved_tensors, _slots(ctx.problem)
        q, k, v, eta, token_scale, weight, bias, initial = operands
        do, dfinal = contiguous(torch.zeros_like(v) if do is None else do, dfinal)
        P = _ttt_prepare(p, q, k, table)
        states, biases = p.empty(len(table), p.H, p.V, p.V, dtype=p.wide), p.empty(len(table), p.H, p.V)
        _ttt_walk(p, operands, P, ctx.eps, states=states, biases=biases)
        dstates, dbiases = torch.empty_like(states), torch.empty_like(biases)
        x, y, dk_part = (p.rows(p.V) for _ in range(3))
        pull, dz, du = (p.rows(p.V, dtype=p.wide) for _ in range(3))
        vectors, deta = p.rows(3), torch.empty_like(eta)
        dq, dk, dv = (torch.empty_like(v) for _ in range(3))
        dscale = None if token_scale is None else p.empty(*eta.shape)
        dinitial = None if initial is None else torch.zeros_like(initial)  # an empty sequence's is not written
        dweight, dbias = (torch.zeros(len(table), p.H, p.V, device=p.device) for _ in range(2))
        every, walks = (len(table) * p.H,), (p.N * p.H,)
        sizes = p.sizes("H", "V", "BC", "PRECISION") | {"BV": block(p.V)}
        more = sizes | p.sizes("C", "WIDE")
        launch(
            ttt_prepare_back, every, *operands[:-1], table, P, states, biases, do, x, y, vectors, pull, dq, dk_part,
            dscale, p.scale, ctx.eps, **sizes, **p.sizes("WIDE"), **p.configure("ttt_prepare_back"),
        )  # fmt: skip
        launch(
            ttt_backward, walks, q, k, eta, token_scale, weight, p.offset, x, y, vectors, pull, do, dfinal, dz, du,
            dstates, dbiases, dinitial, p.cu_seqlens, p.scale, p.T, **more, **p.configure("ttt_backward"),
        )  # fmt: skip
        launch(
            ttt_finish_back, every, k, eta, token_scale, weight, table, states, x, y, vectors, dz, du, dstates,
            dbiases, dk_part, dk, dv, deta, dscale, dweight, dbias, **sizes, **p.configure("ttt_finish_back"),
        )  # fmt: skip
        if initial is not None:
            launch(
                ttt_acc_back, walks, q, token_scale, initial, p.offset, do, dstates, dbiases, dq, dscale, dinitial,
                p.cu_seqlens, p.scale, p.T, **more, **p.configure("ttt_acc_back", BK=p.V),
            )  # fmt: skip
        dscale = None if token_scale is None else dscale.to(token_scale.dtype)
        dweight, dbias = dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype)
        return dq, dk, dv, deta, dscale, dweight, dbias, dinitial, None, None, None


def _ttt_prepare(p, q, k, table):
    """P of the kernels' legend."""
    P = p.rows(block(p.C), dtype=p.wide)
    launch(
        ttt_prepare, (len(table) * p.H,), q, k, table, P, p.scale, **p.sizes("H", "V", "BC", "PRECISION"),
        BV=block(p.V), **p.configure("ttt_prepare"),
    )  # fmt: skip
    return P


def _ttt_walk(p, operands, P, eps, *, o=None, final=None, states=None, biases=None):
    """The forward's pass fills o and final, the one for states the memory before every mini-batch."""
    launch(
        ttt_forward, (p.N * p.H,), *operands, p.offset, P, o, states, biases, final, p.cu_seqlens, p.scale, eps, p.T,
        **p.sizes("H", "V", "C", "BC", "PRECISION", "WIDE"), BV=block(p.V), **p.configure("ttt_forward"),
    )  # fmt: skip


class _Titans(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, theta, g, m, initial, p, return_state):
        o = torch.empty_like(v)
        final = torch.zeros(p.N, p.H, 3, p.K, p.V, device=p.device) if return_state else None
        A, _, *ends = _titans_prepare(p, q, k, g, m, _slots(p))
        _titans_walk(p, (q, k, v, theta, initial), (A, *ends), o=o, final=final)
        ctx.save_for_backward(q, k, v, theta, g, m, initial)
        ctx.problem = p
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal):
        p, (q, k, v, theta, g, m, initial) = ctx.problem, ctx.saved_tensors
        do, dfinal = contiguous(torch.zeros_like(v) if do is None else do, dfinal)
        table = _slots(p)
        A, c, *ends = _titans_prepare(p, q, k, g, m, table)
        S, Z = (p.empty(len(table), p.H, p.K, p.V, dtype=p.wide) for _ in range(2))
        r = p.rows(p.V, dtype=p.wide)
        _titans_walk(p, (q, k, v, theta, initial), (A, *ends), r=r, S=S, Z=Z)
        options = p.configure("titans_backward", BV=p.V)
        blocks = triton.cdiv(p.V, options["BV"])
        parts = [p.rows(blocks, p.K, dtype=p.wide) for _ in range(2)]
        parts += [p.rows(blocks, width) for width in (block(p.C), 5)]
        parts.append(p.empty(len(table), p.H, blocks, 3))
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        dinitial = None if initial is None else torch.zeros_like(initial)  # an empty sequence's is not written
        launch(
            titans_backward, (p.N * p.H * blocks,), q, k, theta, p.offset, A, c, *ends, r, S, Z, do, dfinal,
            *parts[:2], dv, *parts[2:], dinitial, p.cu_seqlens, p.scale, p.T,
            **p.sizes("H", "K", "V", "C", "BC", "BK", "PRECISION", "WIDE"), **options,
        )  # fmt: skip
        dgates = [p.empty(*theta.shape) for _ in range(3)]
        launch(
            titans_finish_back, (len(table) * p.H,), q, k, g, m, initial, table, S, dv, *parts, dq, dk, *dgates,
            **p.sizes("H", "K", "V", "BC", "BK", "PRECISION", "WIDE"), BV=options["BV"],
            **p.configure("titans_finish_back"),
        )  # fmt: skip
        dgates = (d.to(x.dtype) for d, x in zip(dgates, (theta, g, m)))
        return dq, dk, dv, *dgates, dinitial, None, None


def _titans_prepare(p, q, k, g, m, table):
    """What the kernels need of every mini-batch's tokens before its memory is known."""
    A, c = p.rows(block(p.C), dtype=p.wide), p.rows(block(p.C))
    vectors, ends = p.rows(4), p.empty(len(table), p.H, 3)
    launch(
        titans_prepare, (len(table) * p.H,), q, k, g, m, table, A, c, vectors, ends,
        **p.sizes("H", "K", "BC", "BK", "PRECISION"), **p.configure("titans_prepare"),
    )  # fmt: skip
    return A, c, vectors, ends


def _titans_walk(p, operands, prepared, *, o=None, final=None, r=None, S=None, Z=None):
    """The forward's pass fills o and final, the one for states r and the memory before every mini-batch."""
    options = p.configure("titans_forward", BV=p.V)
    launch(
        titans_forward, (p.N * p.H * triton.cdiv(p.V, options["BV"]),), *operands, p.offset, *prepared, o, r, S, Z,
        final, p.cu_seqlens, p.scale, p.T,
        **p.sizes("H", "K", "V", "C", "BC", "BK", "PRECISION", "WIDE"), **options,
    )  # fmt: skip


def ttt_linear(
    q, k, v, eta, token_scale, weight, bias, *,
    eps, scale, mini_batch, initial_state=None, offset=None, return_state=False, cu_seqlens=None,
):  # fmt: skip
    """See api.ttt_linear."""
    operands = contiguous(q, k, v, eta, token_scale, weight, bias, initial_state)
    p = Problem(k, v, scale, cu_seqlens, mini_batch=mini_batch, offset=offset)
    return _TTT.apply(*operands, p, float(eps), return_state)


def titans_linear(
    q, k, v, theta, g, m, *,
    scale, mini_batch, initial_state=None, offset=None, return_state=False, cu_seqlens=None,
):  # fmt: skip
    """See api.titans_linear."""
    operands = contiguous(q, k, v, theta, g, m, initial_state)
    p = Problem(k, v, scale, cu_seqlens, mini_batch=mini_batch, offset=offset)
    return _Titans.apply(*operands, p, return_state)
