"""The walk along a sequence's chunks, with the state [K, BV] of one head and one block of values in registers.

q_read and k_read ask the state, k_write is written to it. For a decay a channel they are q e^G, k e^G and
k e^(G_end - G), of HV heads, made by prepare.py. Otherwise q_read and k_write are q and k themselves, of H heads, so
that they reach the tensor cores as they are, and k_write stands for k_read, which is None: decays go on the rows that
they are multiplied with.

Legend, one chunk: S the state before it; z = v - (k e^G) S and v' = b (z - P (b z)) the delta rule's writes (v' = v for
additive rules); o = scale ((q e^G) S + A v'); S_next = e^G_end S + (k e^(G_end - G))^T v'.
"""

import triton
import triton.language as tl

from .chunks import sequence_rows
from .decay import CHANNEL, NONE
from .launch import kernel
from .prepare import dot, load_tile, store_tile


@triton.jit
def load_state(p, i, i_k, i_v, K: tl.constexpr, V: tl.constexpr):
    """State i of [.., K, V] at keys i_k and values i_v; 0 outside."""
    p_s = p + tl.cast(i, tl.int64) * K * V + i_k[:, None] * V + i_v[None, :]
    return tl.load(p_s, mask=(i_k < K)[:, None] & (i_v < V)[None, :], other=0)


@triton.jit
def store_state(p, x, i, i_k, i_v, K: tl.constexpr, V: tl.constexpr):
    p_s = p + tl.cast(i, tl.int64) * K * V + i_k[:, None] * V + i_v[None, :]
    tl.store(p_s, x, mask=(i_k < K)[:, None] & (i_v < V)[None, :])


@triton.jit
def load_transposed(p, i, i_k, i_v, K: tl.constexpr, V: tl.constexpr):
    """load_state's transpose, [len(i_v), len(i_k)]."""
    p_s = p + tl.cast(i, tl.int64) * K * V + i_k[None, :] * V + i_v[:, None]
    return tl.load(p_s, mask=(i_k < K)[None, :] & (i_v < V)[:, None], other=0)


@triton.jit
def store_transposed(p, x, i, i_k, i_v, K: tl.constexpr, V: tl.constexpr):
    """x [len(i_v), len(i_k)], where store_state has its transpose."""
    p_s = p + tl.cast(i, tl.int64) * K * V + i_k[None, :] * V + i_v[:, None]
    tl.store(p_s, x, mask=(i_k < K)[None, :] & (i_v < V)[:, None])


@triton.jit
def row_decay(p, first, rows, i_h, HV: tl.constexpr, C: tl.constexpr):
    """[C, 1]: the decay of every row that is still to be applied; with a decay a channel the operands have theirs."""
    i_t = tl.arange(0, C)
    if p is None:
        decay = tl.full([C, 1], 1, tl.float32)
    else:
        decay = tl.load(p + (first + i_t) * HV + i_h, mask=i_t < rows, other=0)[:, None]
    return decay


@triton.jit
def whole_decay(whole, i_c, i_h, i_k, HV: tl.constexpr, K: tl.constexpr, DECAY: tl.constexpr):
    """What a chunk leaves of the state before it: [1, 1], or [len(i_k), 1] for a decay a channel."""
    i = tl.cast(i_c, tl.int64) * HV + i_h
    if DECAY == NONE:
        decay = tl.full([1, 1], 1, tl.float32)
    elif DECAY == CHANNEL:
        decay = tl.load(whole + i * K + i_k, mask=i_k < K, other=0)[:, None]
    else:
        decay = tl.load(whole + i + tl.zeros([1, 1], tl.int64))
    return decay


@kernel
def scan_forward(
    q_read, k_read, k_write, v, beta, A, P, from_start, to_end, whole, initial, o, states, r, final, transition,
    cu_seqlens, starts, scale, T, NC, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, DELTA: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes what is not None: o [tokens, HV, V]; in the pass that the backward begins with, `states`
    [chunks, HV, K, V] before every chunk and, for the delta rule, r [tokens, HV, V]; `final` [N, HV, K, V];
    `transition` [N, HV, K or 1], the decay of the whole sequence. q_read and A are read for o alone. WIDE: the dtype of
    products with the state (float32 where the inputs' could not hold it)."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_nh = tl.program_id(0) // NV
    i_v = (tl.program_id(0) % NV) * BV + tl.arange(0, BV)
    i_n, i_h = i_nh // HV, i_nh % HV
    i_k, i_t = tl.arange(0, BK), tl.arange(0, C)
    first, length, i_c = sequence_rows(cu_seqlens, starts, i_n, T, NC)
    S = tl.zeros([BK, BV], tl.float32)
    if initial is not None:
        S = load_state(initial, i_nh, i_k, i_v, K, V).to(tl.float32)
    if transition is not None:
        left = tl.full([BK if DECAY == CHANNEL else 1, 1], 1, tl.float32)
    for i in range(0, length, C):
        rows = tl.minimum(length - i, C)
        decay = whole_decay(whole, i_c, i_h, i_k, HV, K, DECAY)
        if transition is not None:
            left *= decay
        # [C, BK]
        b_write = load_tile(k_write, first, rows, i_h // (HV // H), i_k, H, K, C)
        # [C, BV]
        b_v = load_tile(v, first, rows, i_h, i_v, HV, V, C)
        b_S = S.to(WIDE)
        b_from = row_decay(from_start, first, rows, i_h, HV, C)
        if states is not None:
            store_state(states, b_S, i_c * HV + i_h, i_k, i_v, K, V)
        if DELTA:
            b_beta = tl.load(beta + (first + i_t) * HV + i_h, mask=i_t < rows, other=0).to(tl.float32)[:, None]
            b_P = load_tile(P, first, rows, i_h, i_t, HV, C, C)
            b_read = b_write
            if DECAY == CHANNEL:
                b_read = load_tile(k_read, first, rows, i_h, i_k, HV, K, C)
            z = b_v - b_from * dot(b_read.to(WIDE), b_S, PRECISION)
            b_r = z - dot(b_P, (b_beta * z).to(b_P.dtype), PRECISION)
            if r is not None:
                store_tile(r, b_r, first, rows, i_h, i_v, HV, V, C)
            b_v = (b_beta * b_r).to(b_v.dtype)
        if o is not None:
            b_q = load_tile(q_read, first, rows, i_h // (HV // H), i_k, H, K, C)
            b_A = load_tile(A, first, rows, i_h, i_t, HV, C, C)
            b_o = b_from * dot(b_q.to(WIDE), b_S, PRECISION) + dot(b_A, b_v, PRECISION)
            store_tile(o, scale * b_o, first, rows, i_h, i_v, HV, V, C)
        b_v = row_decay(to_end, first, rows, i_h, HV, C) * b_v
        S = decay * S + dot(tl.trans(b_write), b_v.to(k_write.dtype.element_ty), PRECISION)
        first += C
        i_c += 1
    if final is not None:
        store_state(final, S, i_nh, i_k, i_v, K, V)
    if transition is not None and tl.program_id(0) % NV == 0:
        D: tl.constexpr = K if DECAY == CHANNEL else 1
        i_d = tl.arange(0, left.shape[0])
        p_left = transition + tl.cast(i_nh, tl.int64) * D + i_d[:, None]
        tl.store(p_left, left, mask=(i_d < D)[:, None])


@kernel
def scan_backward(
    q_read, k_read, k_write, beta, A, P, from_start, to_end, whole, r, do, dfinal, dv, dbeta, dstates, dinitial,
    cu_seqlens, starts, scale, T, NC, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, DELTA: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes dv [tokens, HV, V], `dstates` [chunks, HV, K, V] with the gradient of the state BEHIND every chunk,
    dinitial [N, HV, K, V] (or None), and for the delta rule dbeta [tokens, HV, value blocks], to be summed up."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_nh = tl.program_id(0) // NV
    i_vb = tl.program_id(0) % NV
    i_v = i_vb * BV + tl.arange(0, BV)
    i_n, i_h = i_nh // HV, i_nh % HV
    i_k, i_t = tl.arange(0, BK), tl.arange(0, C)
    first, length, i_c = sequence_rows(cu_seqlens, starts, i_n, T, NC)
    count = tl.cdiv(length, C)
    first += tl.cast(count - 1, tl.int64) * C
    i_c += count - 1
    dS = tl.zeros([BK, BV], tl.float32)
    if dfinal is not None:
        dS = load_state(dfinal, i_nh, i_k, i_v, K, V).to(tl.float32)
    for i in range(0, count):
        rows = tl.minimum(length - (count - 1 - i) * C, C)
        decay = whole_decay(whole, i_c, i_h, i_k, HV, K, DECAY)
        b_from = row_decay(from_start, first, rows, i_h, HV, C)
        # [C, BK]
        b_q = load_tile(q_read, first, rows, i_h // (HV // H), i_k, H, K, C)
        b_write = load_tile(k_write, first, rows, i_h // (HV // H), i_k, H, K, C)
        # [C, C]
        b_A = load_tile(A, first, rows, i_h, i_t, HV, C, C)
        # [C, BV]
        b_do = load_tile(do, first, rows, i_h, i_v, HV, V, C)
        b_do = (scale * b_do).to(b_do.dtype)
        b_dS = dS.to(WIDE)
        store_state(dstates, b_dS, i_c * HV + i_h, i_k, i_v, K, V)
        b_dv = dot(tl.trans(b_A), b_do, PRECISION) + row_decay(to_end, first, rows, i_h, HV, C) * dot(
            b_write.to(WIDE), b_dS, PRECISION
        )
        dS = decay * dS + dot(tl.trans(b_q), (b_from * b_do).to(b_do.dtype), PRECISION)
        if DELTA:
            b_beta = tl.load(beta + (first + i_t) * HV + i_h, mask=i_t < rows, other=0).to(tl.float32)[:, None]
            b_P = load_tile(P, first, rows, i_h, i_t, HV, C, C)
            b_dv -= dot(tl.trans(b_P), (b_beta * b_dv).to(b_P.dtype), PRECISION)
            b_r = load_tile(r, first, rows, i_h, i_v, HV, V, C)
            p_beta = dbeta + ((first + i_t) * HV + i_h) * NV + i_vb
            tl.store(p_beta, tl.sum(b_r * b_dv, 1), mask=i_t < rows)
            b_dv = (b_beta * b_dv).to(b_do.dtype)
            b_read = b_write
            if DECAY == CHANNEL:
                b_read = load_tile(k_read, first, rows, i_h, i_k, HV, K, C)
            dS -= dot(tl.trans(b_read), (b_from * b_dv).to(b_do.dtype), PRECISION)
        store_tile(dv, b_dv, first, rows, i_h, i_v, HV, V, C)
        first -= C
        i_c -= 1
    if dinitial is not None:
        store_state(dinitial, dS, i_nh, i_k, i_v, K, V)
