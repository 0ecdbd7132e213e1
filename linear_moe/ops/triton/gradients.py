"""Gradients of a chunk's queries, keys and decays, all chunks in parallel, from the states that the two scans kept.

Legend, one chunk, S the state before it and dS the gradient of the one behind: with v' the rule's writes and z as in
scan.py, dA = do v'^T and dM = -dz v'^T (strict triangle); d(q e^G) = do S^T, d(k e^(G_end - G)) = v' dS^T and
d(k e^G) = -dz S^T. A log decay g_l takes part in every decay that spans it: of pairs i >= l > j, of the way from the
start to i >= l and of the way from i < l to the end. What no decay touches (a token with itself, the last token and the
end) stays out of the sums, so that what a strong decay has made small is not lost beside large terms that cancel.

Triton 3.4 to 3.7 compiles a product with the transpose of another one, held in registers, wrongly for sm_90. dk sums
over the columns of dA and dM: so either dk itself is upright, [BK, C], or the transposes are products of their own, in
the upper triangles of the same tiles.
"""

import triton
import triton.language as tl

from .chunks import chunk_rows
from .decay import CHANNEL, CONSTANT, last_row, level, scalar_decay, widen_blocks
from .launch import kernel
from .mini_batches import store_columns
from .prepare import dot, load_tile, store_tile
from .scan import load_state


@triton.jit
def outer(a, b, UPRIGHT: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T, or its transpose."""
    return dot(b, tl.trans(a), PRECISION) if UPRIGHT else dot(a, tl.trans(b), PRECISION)


@triton.jit
def mirrored(a, b, lower, PRECISION: tl.constexpr):
    """a b^T in the lower triangle, and the transpose of that in the upper one."""
    return tl.where(lower, dot(a, tl.trans(b), PRECISION), dot(b, tl.trans(a), PRECISION))


@kernel
def key_gradients(
    q, k, v, beta, g, r, do, dz, states, dstates, dq, dk, dg, table, scale, T, NC, H: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dq, dk [tokens, HV, K]; dg [tokens, HV, K] for a decay a channel, [tokens, HV, key blocks] a head, [chunks, HV,
    key blocks] for a constant one: sums over key blocks, chunks and the value heads of a key head are the caller's.
    Each may be None, but dg wants dk. Where dk is None, dstates may be too, and q is not read."""
    NK: tl.constexpr = (K + BK - 1) // BK
    i_kb = tl.program_id(0) % NK
    i_h = (tl.program_id(0) // NK) % HV
    i_c = tl.program_id(0) // (NK * HV)
    first, rows = chunk_rows(table, i_c, T, NC, C)
    if rows <= 0:
        return
    i_t = tl.arange(0, C)
    i_k = i_kb * BK + tl.arange(0, BK)
    lower, strict = i_t[:, None] >= i_t[None, :], i_t[:, None] > i_t[None, :]
    UPRIGHT: tl.constexpr = DECAY != CHANNEL
    dA = tl.zeros([C, C], tl.float32)
    dM = tl.zeros([C, C], tl.float32)
    dq_start = tl.zeros([C, BK], tl.float32)
    dk_start = tl.zeros([BK, C] if UPRIGHT else [C, BK], tl.float32)
    dk_end = tl.zeros([BK, C] if UPRIGHT else [C, BK], tl.float32)
    overlap = tl.zeros([BK], tl.float32)
    if DELTA:
        b_beta = tl.load(beta + (first + i_t) * HV + i_h, mask=i_t < rows, other=0).to(tl.float32)[:, None]
    for i in range(0, V, BV):
        i_v = i + tl.arange(0, BV)
        # [C, BV]
        b_do = load_tile(do, first, rows, i_h, i_v, HV, V, C)
        b_do = (scale * b_do).to(b_do.dtype)
        # [BK, BV]
        b_S = load_state(states, i_c * HV + i_h, i_k, i_v, K, V)
        if dk is not None:
            b_dS = load_state(dstates, i_c * HV + i_h, i_k, i_v, K, V)
        if DELTA:
            b_dz = load_tile(dz, first, rows, i_h, i_v, HV, V, C)
            b_v = (b_beta * load_tile(r, first, rows, i_h, i_v, HV, V, C)).to(b_do.dtype)
            dM -= mirrored(b_dz, b_v, lower, PRECISION)
            dk_start -= outer(b_dz.to(WIDE), b_S, UPRIGHT, PRECISION)
        else:
            b_v = load_tile(v, first, rows, i_h, i_v, HV, V, C)
        if dk is None or UPRIGHT:
            dA += dot(b_do, tl.trans(b_v), PRECISION)
        else:
            dA += mirrored(b_do, b_v, lower, PRECISION)
        dq_start += dot(b_do.to(WIDE), tl.trans(b_S), PRECISION)
        if dk is not None:
            dk_end += outer(b_v.to(WIDE), b_dS, UPRIGHT, PRECISION)
        if dg is not None:
            overlap += tl.sum(b_S.to(tl.float32) * b_dS.to(tl.float32), 1)
    # [C, BK]
    b_q = load_tile(q, first, rows, i_h // (HV // H), i_k, H, K, C)
    b_k = load_tile(k, first, rows, i_h // (HV // H), i_k, H, K, C)
    if DECAY == CHANNEL:
        b_g = tl.maximum(load_tile(g, first, rows, i_h, i_k, HV, K, C).to(tl.float32), -1e4)
        channel_gradients(
            b_q, b_k, b_g, dA, dM, dq_start, dk_start, dk_end, overlap, dq, dk, dg, first, rows, i_h, i_k, HV, K,
            LEVELS, DELTA, PRECISION,
        )  # fmt: skip
    else:
        between, from_start, to_end, whole = scalar_decay(g, first, rows, i_h, HV, C, DECAY)
        dA = tl.where(lower, dA * between, 0)
        dM = tl.where(lower & ~strict, 0, dM * between)  # both triangles: dk sums over its rows and over its columns
        if dg is not None:
            pairs = dA * dot(b_q, tl.trans(b_k), PRECISION)
            starts = tl.sum(dq_start * b_q, 1) * from_start
            if DELTA:
                pairs += dM * dot(b_k, tl.trans(b_k), PRECISION)
                starts += tl.sum(dk_start * tl.trans(b_k), 0) * from_start
            pairs = tl.where(strict, pairs, 0)
            starts += tl.sum(pairs, 1) - tl.sum(pairs, 0)
            ends = tl.sum(dk_end * tl.trans(b_k), 0) * to_end
            b_dg = tl.sum(tl.where(lower, starts[:, None], ends[:, None]), 0) + whole * tl.sum(overlap)
            if DECAY == CONSTANT:
                b_dg = tl.sum(tl.where(i_t < rows, b_dg, 0))
                tl.store(dg + (tl.cast(i_c, tl.int64) * HV + i_h) * NK + i_kb, b_dg)
            else:
                tl.store(dg + ((first + i_t) * HV + i_h) * NK + i_kb, b_dg, mask=i_t < rows)
        b_dA = dA.to(b_k.dtype)
        if dq is not None:
            b_dq = dq_start * from_start[:, None] + dot(b_dA, b_k, PRECISION)
            store_tile(dq, b_dq, first, rows, i_h, i_k, HV, K, C)
        if dk is not None:
            # [BK, C]
            b_dk = dk_end * to_end[None, :] + dot(tl.trans(b_q), b_dA, PRECISION)
            if DELTA:
                b_dk += dk_start * from_start[None, :] + dot(tl.trans(b_k), dM.to(b_k.dtype), PRECISION)
            store_columns(dk, b_dk, first, rows, i_h, i_k, HV, K, C)


@triton.jit
def channel_gradients(
    b_q, b_k, b_g, dA, dM, dq_start, dk_start, dk_end, overlap, dq, dk, dg, first, rows, i_h, i_k, HV: tl.constexpr,
    K: tl.constexpr, LEVELS: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The way back through the levels of prepare_channels. dA and dM hold their transposes too."""
    C: tl.constexpr = b_q.shape[0]
    BK: tl.constexpr = b_q.shape[1]
    i_t = tl.arange(0, C)
    itself = tl.sum(tl.where(i_t[:, None] == i_t[None, :], dA, 0), 1)[:, None]
    dA, dM = dA.to(b_k.dtype), dM.to(b_k.dtype)
    b_dq = tl.zeros([C, BK], tl.float32)  # without the diagonal, which no decay touches
    rows_dk = tl.zeros([C, BK], tl.float32)  # of keys in M's rows
    columns_dk = tl.zeros([C, BK], tl.float32)  # of keys in the columns of A and M
    down, up = b_g, tl.zeros_like(b_g)
    for n in range(LEVELS):
        pairs = level(C, 1 << n)
        b_down, b_up = tl.exp(down), tl.exp(up)
        right = (b_k * b_up).to(b_k.dtype)
        b_dq += b_down * dot(tl.where(pairs, dA, 0), right, PRECISION)
        if dk is not None:
            across = level(C, 1 << n, 0)
            columns = dot(tl.where(across, dA, 0), (b_q * b_down).to(b_k.dtype), PRECISION)
            if DELTA:
                rows_dk += b_down * dot(tl.where(pairs, dM, 0), right, PRECISION)
                columns += dot(tl.where(across, dM, 0), (b_k * b_down).to(b_k.dtype), PRECISION)
            columns_dk += b_up * columns
        down, up = widen_blocks(down, up, 1 << n)
    b_down, b_up = tl.exp(down), tl.exp(up)
    b_dq += dq_start * b_down
    rows_dk += dk_start * b_down
    dk_end *= b_up
    starts = b_q * b_dq + b_k * (rows_dk - columns_dk)
    until = (i_t[:, None] > i_t[None, :]).to(tl.float32)
    if dg is not None:
        b_dg = tl.cumsum(starts, 0, reverse=True) + dot(until, b_k * dk_end, PRECISION)
        b_dg += (tl.exp(last_row(down)) * overlap)[None, :]
        store_tile(dg, b_dg, first, rows, i_h, i_k, HV, K, C)
    if dq is not None:
        store_tile(dq, b_dq + itself * b_k, first, rows, i_h, i_k, HV, K, C)
    if dk is not None:
        store_tile(dk, rows_dk + columns_dk + dk_end + itself * b_q, first, rows, i_h, i_k, HV, K, C)
