"""linear_attention and delta_rule on Triton kernels: what api.py calls.

Saved for the backward: the operands, and P [tokens, HV, C] of the delta rule (of 64 tokens a chunk: half as large as
one operand of width 128). Recomputed there: products and decayed operands inside the chunks, the states before every
chunk, the delta rule's writes.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .chunks import Chunks
from .decay import CHANNEL, CONSTANT, NONE, SCALAR
from .gradients import key_gradients
from .launch import configure, launch, precision
from .prepare import prepare_channels, prepare_heads
from .scan import scan_backward, scan_forward


class Problem:
    """Sizes, kinds and layout of one call: what every kernel's launch has in common."""

    def __init__(self, k, v, beta, g, scale, cu_seqlens):
        self.B, self.T, self.HV, self.V = v.shape
        self.H, self.K = k.shape[2:]
        self.tokens, self.scale, self.device, self.dtype = self.B * self.T, float(scale), v.device, v.dtype
        self.decay = NONE if g is None else (None, CONSTANT, None, SCALAR, CHANNEL)[g.ndim]
        self.delta = beta is not None
        self.chunks = Chunks(self.B, self.T, cu_seqlens, self.configure("chunk")["C"])
        self.C, self.N = self.chunks.C, self.chunks.N
        self.wide = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
        self.precision = precision(v.dtype, v.device)

    def configure(self, name, **widths):
        """The tuned options; tiles no wider than the widths of that name."""
        name = f"{name}_channels" if self.decay == CHANNEL else name
        options = configure(name, self.K, self.V, self.device, self.dtype)
        return options | {tile: min(options[tile], block(width)) for tile, width in widths.items()}

    def sizes(self, *names):
        """The constexpr arguments of those names."""
        known = {
            "H": self.H,
            "HV": self.HV,
            "K": self.K,
            "V": self.V,
            "C": self.C,
            "LEVELS": self.C.bit_length() - 1,
            "BK": block(self.K),
            "DECAY": self.decay,
            "DELTA": self.delta,
            "PRECISION": self.precision,
            "WIDE": tl.bfloat16 if self.wide == torch.bfloat16 else tl.float32,
        }
        return {name: known[name] for name in names}

    def empty(self, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=self.device)

    def empty_states(self):
        """Room for one state a chunk and head."""
        return self.empty(self.chunks.count, self.HV, self.K, self.V, dtype=self.wide)


SCAN = ("H", "HV", "K", "V", "C", "BK", "DECAY", "DELTA", "PRECISION", "WIDE")


def block(width):
    """The tile that holds a whole head: products want at least 16."""
    return max(16, triton.next_power_of_2(width))


class Prepared:
    """What prepare.py's kernels leave for the scans. P is made where none is given."""

    def __init__(self, p, q, k, beta, g, P=None):
        make_p = p.delta and P is None
        self.P = p.empty(p.tokens, p.HV, p.C, dtype=k.dtype) if make_p else P
        self.A = p.empty(p.tokens, p.HV, p.C, dtype=k.dtype)
        self.k_start = self.from_start = self.to_end = self.whole = None
        P = self.P if make_p else None
        grid, places = (p.chunks.count * p.HV,), (p.chunks.table, p.T, p.chunks.per_sequence)
        if p.decay == CHANNEL:
            self.heads, self.q, self.k_end = p.HV, *(p.empty(p.tokens, p.HV, p.K, dtype=k.dtype) for _ in range(2))
            self.k_start = torch.empty_like(self.k_end) if p.delta else None
            self.whole = p.empty(p.chunks.count, p.HV, p.K)
            options = p.configure("prepare", BK=p.K)
            launch(
                prepare_channels, grid, q, k, beta, g, self.A, P, self.q, self.k_start, self.k_end, self.whole, *places,
                **p.sizes("H", "HV", "K", "C", "LEVELS", "PRECISION"), **options,
            )  # fmt: skip
        else:
            self.heads, self.q, self.k_end = p.H, q, k
            if p.decay != NONE:
                self.from_start, self.to_end = (p.empty(p.tokens, p.HV) for _ in range(2))
                self.whole = p.empty(p.chunks.count, p.HV)
            launch(
                prepare_heads, grid, q, k, beta, g, self.A, P, self.from_start, self.to_end, self.whole, *places,
                **p.sizes("H", "HV", "K", "C", "BK", "DECAY", "PRECISION"), **p.configure("prepare"),
            )  # fmt: skip

    def scan(self, p, v, beta, initial, o, states, r, final):
        """One forward scan: for o and final, or for what the backward needs."""
        options = p.configure("scan_forward", BV=p.V)
        launch(
            scan_forward, (p.N * p.HV * triton.cdiv(p.V, options["BV"]),), self.q, self.k_start, self.k_end, v, beta,
            self.A, self.P, self.from_start, self.to_end, self.whole, initial, o, states, r, final,
            p.chunks.cu_seqlens, p.chunks.starts, p.scale, p.T, p.chunks.per_sequence,
            **p.sizes(*SCAN) | {"H": self.heads}, **options,
        )  # fmt: skip

    def scan_back(self, p, beta, initial, r, do, dfinal, dstates):
        """The backward scan: (dv, dbeta, dinitial)."""
        options = p.configure("scan_backward", BV=p.V)
        blocks = triton.cdiv(p.V, options["BV"])
        dv = torch.empty_like(do)
        dbeta = p.empty(p.tokens, p.HV, blocks) if p.delta else None
        dinitial = torch.empty_like(initial) if initial is not None else None
        launch(
            scan_backward, (p.N * p.HV * blocks,), self.q, self.k_start, self.k_end, beta, self.A, self.P,
            self.from_start, self.to_end, self.whole, r, do, dfinal, dv, dbeta, dstates, dinitial,
            p.chunks.cu_seqlens, p.chunks.starts, p.scale, p.T, p.chunks.per_sequence,
            **p.sizes(*SCAN) | {"H": self.heads}, **options,
        )  # fmt: skip
        return dv, dbeta.sum(-1).view(beta.shape).to(beta.dtype) if p.delta else None, dinitial


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, g, initial, cu_seqlens, scale, return_state):
        p = Problem(k, v, beta, g, scale, cu_seqlens)
        prepared = Prepared(p, q, k, beta, g)
        o = torch.empty_like(v)
        final = p.empty(p.N, p.HV, p.K, p.V) if return_state else None
        prepared.scan(p, v, beta, initial, o, None, None, final)
        ctx.save_for_backward(q, k, v, beta, g, initial, prepared.P)
        ctx.problem = p
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal):
        q, k, v, beta, g, initial, P = ctx.saved_tensors
        p = ctx.problem
        do = torch.zeros_like(v) if do is None else do.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()
        prepared = Prepared(p, q, k, beta, g, P)
        dq = _key_like(p, k)
        gradients = backward(p, prepared, q, k, v, beta, g, initial, do, dfinal, dq, ctx.needs_input_grad[4])
        return _sum_groups(p, dq, k), *gradients, None, None, None


def backward(p, prepared, q, k, v, beta, g, initial, do, dfinal, dq, need_dg):
    """The gradients (dk, dv, dbeta, dg, dinitial); fills dq, unless it is None."""
    states, dstates = (p.empty_states() for _ in range(2))
    r = torch.empty_like(v) if p.delta else None
    prepared.scan(p, v, beta, initial, None, states, r, None)
    dv, dbeta, dinitial = prepared.scan_back(p, beta, initial, r, do, dfinal, dstates)
    dk = _key_like(p, k)
    dg = launch_key_gradients(p, q, k, v, beta, g, r, do, dv, states, dstates, dq, dk, need_dg)
    return _sum_groups(p, dk, k), dv, dbeta, dg, dinitial


def _key_like(p, k):
    """Room for a gradient of queries or keys, of every value head."""
    return p.empty(p.tokens, p.HV, p.K, dtype=k.dtype if p.HV == p.H else torch.float32)


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
        dg = p.empty(p.tokens, p.HV, p.K if p.decay == CHANNEL else blocks)
    launch(
        key_gradients, (p.chunks.count * p.HV * blocks,), q, k, v, beta, g, r, do, dz, states, dstates, dq, dk, dg,
        p.chunks.table, p.scale, p.T, p.chunks.per_sequence,
        **p.sizes("H", "HV", "K", "V", "C", "LEVELS", "DECAY", "DELTA", "PRECISION", "WIDE"), **options,
    )  # fmt: skip
    if dg is not None and p.decay != CHANNEL:
        dg = dg.sum((0, 2) if p.decay == CONSTANT else -1)
    return None if dg is None else dg.view(g.shape).to(g.dtype)


def _run(q, k, v, beta, g, scale, initial_state, return_state, cu_seqlens):
    q, k, v = (x.contiguous() for x in (q, k, v))
    beta, g, initial_state = (x if x is None else x.contiguous() for x in (beta, g, initial_state))
    return _Rule.apply(q, k, v, beta, g, initial_state, cu_seqlens, scale, return_state)


def linear_attention(q, k, v, g=None, *, scale, initial_state=None, return_state=False, cu_seqlens=None):
    """See api.linear_attention."""
    return _run(q, k, v, None, g, scale, initial_state, return_state, cu_seqlens)


def delta_rule(q, k, v, beta, g=None, *, scale, initial_state=None, return_state=False, cu_seqlens=None):
    """See api.delta_rule."""
    return _run(q, k, v, beta, g, scale, initial_state, return_state, cu_seqlens)
