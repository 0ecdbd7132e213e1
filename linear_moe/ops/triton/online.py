"""ttt_linear and titans_linear on Triton kernels: what api.py calls.

Saved for the backward: the operands. There a first walk writes the memory before every mini-batch, and a second one
walks back with its gradient.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .launch import configure, launch, precision
from .mini_batches import slot_table
from .titans import titans_backward, titans_finish_back, titans_forward, titans_prepare
from .ttt import ttt_acc, ttt_acc_back, ttt_backward, ttt_finish_back, ttt_forward, ttt_prepare, ttt_prepare_back


class _Problem:
    """Sizes and layout of one call."""

    def __init__(self, k, v, offset, cu_seqlens, scale, mini_batch):
        (self.B, self.T, self.H, self.V), self.K = v.shape, k.shape[-1]
        self.tokens, self.scale, self.device, self.dtype = self.B * self.T, float(scale), v.device, v.dtype
        self.offset, self.cu_seqlens, self.C = offset, cu_seqlens, mini_batch
        self.N = self.B if cu_seqlens is None else len(cu_seqlens) - 1
        self.wide = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
        self.precision = precision(v.dtype, v.device)

    def empty(self, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=self.device)

    def slots(self):
        """Which rows every mini-batch holds, for kernels that take all of them in parallel."""
        return slot_table(self.B, self.T, self.cu_seqlens, self.offset, self.C, self.device)

    def configure(self, name, **tiles):
        """The tuned options; tiles no wider than those given."""
        options = configure(name, self.K, self.V, self.device, self.dtype)
        return options | {tile: min(options.get(tile, width), width) for tile, width in tiles.items()}

    def sizes(self, *names):
        """The constexpr arguments of those names."""
        known = {"H": self.H, "K": self.K, "V": self.V, "C": self.C, "BC": block(self.C), "PRECISION": self.precision}
        known["WIDE"] = tl.bfloat16 if self.wide == torch.bfloat16 else tl.float32
        return {name: known[name] for name in names}


def block(width):
    """The tile that holds it whole: products want at least 16."""
    return max(16, triton.next_power_of_2(width))


def _contiguous(*tensors):
    return [x if x is None else x.contiguous() for x in tensors]


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
        _ttt_walk(p, operands, _ttt_prepare(p, q, k, p.slots()), eps, o, None, None, final)
        ctx.save_for_backward(*operands)
        ctx.problem, ctx.eps = p, eps
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal):
        p, operands, table = ctx.problem, ctx.saved_tensors, ctx.problem.slots()
        q, k, v, eta, token_scale, weight, bias, initial = operands
        do, dfinal = _contiguous(torch.zeros_like(v) if do is None else do, dfinal)
        P = _ttt_prepare(p, q, k, table)
        states, biases = p.empty(len(table), p.H, p.V, p.V, dtype=p.wide), p.empty(len(table), p.H, p.V)
        _ttt_walk(p, operands, P, ctx.eps, None, states, biases, None)
        dstates, dbiases = torch.empty_like(states), torch.empty_like(biases)
        x, y, dk_part = (p.empty(p.tokens, p.H, p.V) for _ in range(3))
        pull, dz, du = (p.empty(p.tokens, p.H, p.V, dtype=p.wide) for _ in range(3))
        vectors, deta = p.empty(p.tokens, p.H, 3), torch.empty_like(eta)
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
                p.cu_seqlens, p.scale, p.T, **more, **p.configure("ttt_acc_back", BK=block(p.V)),
            )  # fmt: skip
        dscale = None if token_scale is None else dscale.to(token_scale.dtype)
        dweight, dbias = dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype)
        return dq, dk, dv, deta, dscale, dweight, dbias, dinitial, None, None, None


def _ttt_prepare(p, q, k, table):
    """P of the kernels' legend."""
    P = p.empty(p.tokens, p.H, block(p.C), dtype=p.wide)
    launch(
        ttt_prepare, (len(table) * p.H,), q, k, table, P, p.scale, **p.sizes("H", "V", "BC", "PRECISION"),
        BV=block(p.V), **p.configure("ttt_prepare"),
    )  # fmt: skip
    return P


def _ttt_walk(p, operands, P, eps, o, states, biases, final):
    launch(
        ttt_forward, (p.N * p.H,), *operands, p.offset, P, o, states, biases, final, p.cu_seqlens, p.scale, eps, p.T,
        **p.sizes("H", "V", "C", "BC", "PRECISION", "WIDE"), BV=block(p.V), **p.configure("ttt_forward"),
    )  # fmt: skip


class _Titans(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, theta, g, m, initial, p, return_state):
        o = torch.empty_like(v)
        final = torch.zeros(p.N, p.H, 3, p.K, p.V, device=p.device) if return_state else None
        A, _, *ends = _titans_prepare(p, q, k, g, m, p.slots())
        _titans_walk(p, (q, k, v, theta, initial), (A, *ends), o, None, None, None, final)
        ctx.save_for_backward(q, k, v, theta, g, m, initial)
        ctx.problem = p
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal):
        p, (q, k, v, theta, g, m, initial) = ctx.problem, ctx.saved_tensors
        do, dfinal = _contiguous(torch.zeros_like(v) if do is None else do, dfinal)
        table = p.slots()
        A, c, *ends = _titans_prepare(p, q, k, g, m, table)
        S, Z = (p.empty(len(table), p.H, p.K, p.V, dtype=p.wide) for _ in range(2))
        r = p.empty(p.tokens, p.H, p.V, dtype=p.wide)
        _titans_walk(p, (q, k, v, theta, initial), (A, *ends), None, r, S, Z, None)
        options = p.configure("titans_backward", BV=block(p.V))
        blocks = triton.cdiv(p.V, options["BV"])
        parts = [p.empty(p.tokens, p.H, blocks, p.K, dtype=p.wide) for _ in range(2)]
        parts += [p.empty(p.tokens, p.H, blocks, width) for width in (block(p.C), 5)]
        parts.append(p.empty(len(table), p.H, blocks, 3))
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        dinitial = None if initial is None else torch.zeros_like(initial)  # an empty sequence's is not written
        launch(
            titans_backward, (p.N * p.H * blocks,), q, k, theta, p.offset, A, c, *ends, r, S, Z, do, dfinal,
            *parts[:2], dv, *parts[2:], dinitial, p.cu_seqlens, p.scale, p.T,
            **p.sizes("H", "K", "V", "C", "BC", "PRECISION", "WIDE"), BK=block(p.K), **options,
        )  # fmt: skip
        dgates = [p.empty(*theta.shape) for _ in range(3)]
        launch(
            titans_finish_back, (len(table) * p.H,), q, k, g, m, initial, table, S, dv, *parts, dq, dk, *dgates,
            **p.sizes("H", "K", "V", "BC", "PRECISION", "WIDE"), BK=block(p.K), BV=options["BV"],
            **p.configure("titans_finish_back"),
        )  # fmt: skip
        dgates = (d.to(x.dtype) for d, x in zip(dgates, (theta, g, m)))
        return dq, dk, dv, *dgates, dinitial, None, None


def _titans_prepare(p, q, k, g, m, table):
    """What the kernels need of every mini-batch's tokens before its memory is known."""
    A, c = p.empty(p.tokens, p.H, block(p.C), dtype=p.wide), p.empty(p.tokens, p.H, block(p.C))
    vectors, ends = p.empty(p.tokens, p.H, 4), p.empty(len(table), p.H, 3)
    launch(
        titans_prepare, (len(table) * p.H,), q, k, g, m, table, A, c, vectors, ends,
        **p.sizes("H", "K", "BC", "PRECISION"), BK=block(p.K), **p.configure("titans_prepare"),
    )  # fmt: skip
    return A, c, vectors, ends


def _titans_walk(p, operands, prepared, o, r, S, Z, final):
    options = p.configure("titans_forward", BV=block(p.V))
    launch(
        titans_forward, (p.N * p.H * triton.cdiv(p.V, options["BV"]),), *operands, p.offset, *prepared, o, r, S, Z,
        final, p.cu_seqlens, p.scale, p.T,
        **p.sizes("H", "K", "V", "C", "BC", "PRECISION", "WIDE"), BK=block(p.K), **options,
    )  # fmt: skip


def ttt_linear(
    q, k, v, eta, token_scale, weight, bias, *,
    eps, scale, mini_batch, initial_state=None, offset=None, return_state=False, cu_seqlens=None,
):  # fmt: skip
    """See api.ttt_linear."""
    operands = _contiguous(q, k, v, eta, token_scale, weight, bias, initial_state)
    p = _Problem(k, v, offset, cu_seqlens, scale, mini_batch)
    return _TTT.apply(*operands, p, float(eps), return_state)


def titans_linear(
    q, k, v, theta, g, m, *,
    scale, mini_batch, initial_state=None, offset=None, return_state=False, cu_seqlens=None,
):  # fmt: skip
    """See api.titans_linear."""
    operands = _contiguous(q, k, v, theta, g, m, initial_state)
    return _Titans.apply(*operands, _Problem(k, v, offset, cu_seqlens, scale, mini_batch), return_state)
