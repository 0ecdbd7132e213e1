"""linear_attention and delta_rule on Triton kernels: what api.py calls.

Saved for the backward: the operands, and P [tokens, HV, C] of the delta rule (of 64 tokens a chunk: half as large as
one operand of width 128). Recomputed there: products and decayed operands inside the chunks, the states before every
chunk, the delta rule's writes.
"""

import torch
import triton
from torch.autograd.function import once_differentiable

from .decay import CHANNEL, CONSTANT, NONE, SCALAR
from .gradients import key_gradients
from .launch import launch
from .prepare import prepare_channels, prepare_heads
from .problem import Problem, contiguous
from .scan import scan_backward, scan_forward

DECAYS = {1: CONSTANT, 3: SCALAR, 4: CHANNEL}  # by the dimensions of g
SCAN = ("H", "HV", "K", "V", "C", "BK", "DECAY", "DELTA", "PRECISION", "WIDE")


def problem_of(k, v, beta, g, scale, cu_seqlens):
    decay = NONE if g is None else DECAYS[g.ndim]
    tuned_as = "{}_channels" if decay == CHANNEL else "{}"
    return Problem(k, v, scale, cu_seqlens, decay=decay, delta=beta is not None, tuned_as=tuned_as)


class Prepared:
    """What prepare.py's kernels leave for the scans: see scan.py's legend. P is made where none is given."""

    def __init__(self, p, q, k, beta, g, P=None):
        make_p = p.delta and P is None
        self.P = p.rows(p.C, dtype=p.dtype) if make_p else P
        self.A = p.rows(p.C, dtype=p.dtype)
        self.k_read = self.from_start = self.to_end = self.whole = None
        P = self.P if make_p else None
        grid, places = (p.chunks.count * p.HV,), (p.chunks.table, p.T, p.chunks.per_sequence)
        if p.decay == CHANNEL:
            self.heads = p.HV
            self.q_read, self.k_write = (p.rows(p.K, dtype=p.dtype) for _ in range(2))
            self.k_read = torch.empty_like(self.k_write) if p.delta else None
            self.whole = p.empty(p.chunks.count, p.HV, p.K)
            launch(
                prepare_channels, grid, q, k, beta, g, self.A, P, self.q_read, self.k_read, self.k_write, self.whole,
                *places, **p.sizes("H", "HV", "K", "C", "LEVELS", "PRECISION"), **p.configure("prepare", BK=p.K),
            )  # fmt: skip
        else:
            self.heads, self.q_read, self.k_write = p.H, q, k
            if p.decay != NONE:
                self.from_start, self.to_end = (p.rows() for _ in range(2))
                self.whole = p.empty(p.chunks.count, p.HV)
            launch(
                prepare_heads, grid, q, k, beta, g, self.A, P, self.from_start, self.to_end, self.whole, *places,
                **p.sizes("H", "HV", "K", "C", "BK", "DECAY", "PRECISION"), **p.configure("prepare"),
            )  # fmt: skip

    def scan_for_outputs(self, p, v, beta, initial, o, final):
        """The forward's pass: fills o, and final unless it is None."""
        self._scan(p, v, beta, initial, o, None, None, final, None)

    def scan_for_states(self, p, v, beta, initial, states, r, final=None):
        """The pass that the backward begins with: fills the states before every chunk, the delta rule's r, and final
        unless it is None."""
        self._scan(p, v, beta, initial, None, states, r, final, None)

    def scan_for_summary(self, p, v, beta, initial, final, transition=None):
        """The pass that keeps nothing of a chunk: fills final and, unless it is None, the transition of a decay."""
        self._scan(p, v, beta, initial, None, None, None, final, transition)

    def _scan(self, p, v, beta, initial, o, states, r, final, transition):
        options = p.configure("scan_forward", BV=p.V)
        launch(
            scan_forward, (p.N * p.HV * triton.cdiv(p.V, options["BV"]),), self.q_read, self.k_read, self.k_write, v,
            beta, self.A, self.P, self.from_start, self.to_end, self.whole, initial, o, states, r, final, transition,
            p.cu_seqlens, p.chunks.starts, p.scale, p.T, p.chunks.per_sequence,
            **p.sizes(*SCAN) | {"H": self.heads}, **options,
        )  # fmt: skip

    def scan_back(self, p, beta, initial, r, do, dfinal, dstates):
        """The backward scan: (dv, dbeta, dinitial)."""
        options = p.configure("scan_backward", BV=p.V)
        blocks = triton.cdiv(p.V, options["BV"])
        dv = torch.empty_like(do)
        dbeta = p.rows(blocks) if p.delta else None
        dinitial = torch.empty_like(initial) if initial is not None else None
        launch(
            scan_backward, (p.N * p.HV * blocks,), self.q_read, self.k_read, self.k_write, beta, self.A,
            self.P, self.from_start, self.to_end, self.whole, r, do, dfinal, dv, dbeta, dstates, dinitial,
            p.cu_seqlens, p.chunks.starts, p.scale, p.T, p.chunks.per_sequence,
            **p.sizes(*SCAN) | {"H": self.heads}, **options,
        )  # fmt: skip
        return dv, dbeta.sum(-1).view(beta.shape).to(beta.dtype) if p.delta else None, dinitial


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, g, initial, cu_seqlens, scale, return_state):
        p = problem_of(k, v, beta, g, scale, cu_seqlens)
        prepared = Prepared(p, q, k, beta, g)
        o = torch.empty_like(v)
        final = p.states(p.N) if return_state else None
        prepared.scan_for_outputs(p, v, beta, initial, o, final)
        ctx.save_for_backward(q, k, v, beta, g, initial, prepared.P)
        ctx.problem = p
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal):
        q, k, v, beta, g, initial, P = ctx.saved_tensors
        p = ctx.problem
        do, dfinal = contiguous(torch.zeros_like(v) if do is None else do, dfinal)
        prepared = Prepared(p, q, k, beta, g, P)
        dq = _key_like(p, k)
        gradients = backward(p, prepared, q, k, v, beta, g, initial, do, dfinal, dq, ctx.needs_input_grad[4])
        return _sum_groups(p, dq, k), *gradients, None, None, None


def backward(p, prepared, q, k, v, beta, g, initial, do, dfinal, dq, need_dg):
    """The gradients (dk, dv, dbeta, dg, dinitial); fills dq, unless it is None."""
    states, dstates = (p.states(p.chunks.count, p.wide) for _ in range(2))
    r = torch.empty_like(v) if p.delta else None
    prepared.scan_for_states(p, v, beta, initial, states, r)
    dv, dbeta, dinitial = prepared.scan_back(p, beta, initial, r, do, dfinal, dstates)
    dk = _key_like(p, k)
    dg = launch_key_gradients(p, q, k, v, beta, g, r, do, dv, states, dstates, dq, dk, need_dg)
    return _sum_groups(p, dk, k), dv, dbeta, dg, dinitial


def _key_like(p, k):
    """Room for a gradient of queries or keys, of every value head."""
    return p.rows(p.K, dtype=k.dtype if p.HV == p.H else torch.float32)


def _sum_groups(p, dk, k):
    """[tokens, HV, K] -> k's shape and dtype."""
    return dk.view(k.shape) if p.HV == p.H else dk.view(p.B, p.T, p.H, p.HV // p.H, p.K).sum(3).to(k.dtype)


def launch_key_gradients(p, q, k, v, beta, g, r, do, dz, states, dstates, dq, dk, need_dg):
    """Fills dq and dk [tokens, HV, K], unless they are None; returns dg, or None."""
    options = p.configure("key_gradients", BK=p.K, BV=p.V)
    blocks = triton.cdiv(p.K, options["BK"])
    dg = None
    if need_dg and p.decay == CONSTANT:  # chunks beyond the last write nothing
        dg = torch.zeros(p.chunks.count, p.HV, blocks, device=p.device)
    elif need_dg:
        dg = p.rows(p.K if p.decay == CHANNEL else blocks)
    launch(
        key_gradients, (p.chunks.count * p.HV * blocks,), q, k, v, beta, g, r, do, dz, states, dstates, dq, dk, dg,
        p.chunks.table, p.scale, p.T, p.chunks.per_sequence,
        **p.sizes("H", "HV", "K", "V", "C", "LEVELS", "DECAY", "DELTA", "PRECISION", "WIDE"), **options,
    )  # fmt: skip
    if dg is not None and p.decay != CHANNEL:
        dg = dg.sum((0, 2) if p.decay == CONSTANT else -1)
    return None if dg is None else dg.view(g.shape).to(g.dtype)


def _run(q, k, v, beta, g, scale, initial_state, return_state, cu_seqlens):
    operands = contiguous(q, k, v, beta, g, initial_state)
    return _Rule.apply(*operands, cu_seqlens, scale, return_state)


def linear_attention(q, k, v, g=None, *, scale, initial_state=None, return_state=False, cu_seqlens=None):
    """See api.linear_attention."""
    return _run(q, k, v, None, g, scale, initial_state, return_state, cu_seqlens)


def delta_rule(q, k, v, beta, g=None, *, scale, initial_state=None, return_state=False, cu_seqlens=None):
    """See api.delta_rule."""
    return _run(q, k, v, beta, g, scale, initial_state, return_state, cu_seqlens)
