"""RWKV-7's rule, S_t = Diag(e^g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T, on Triton kernels: what api.py calls.

Legend, one chunk, S the state before it, G the running sum of its log decay:
    qk, qb: the lower triangles of q_i.k_j e^(G_i - G_j) and q_i.b_j e^(G_i - G_j); ak, ab: the strict ones of
    a_i.k_j e^(G_{i-1} - G_j) and a_i.b_j e^(G_{i-1} - G_j); u_i = a_i^T S_{i-1}, what b_i is written with.
    u = w S + Y v, with P = I - (I - ab)^-1, w = (I - P) (a e^(G_{i-1})), Y = (I - P) ak;
    o = scale (x S + A v), with x = q e^G + qb w, A = qk + qb Y;
    S_next = e^(G_end) S + z^T v + b_end^T (w S), with b_end = b e^(G_end - G), z = k e^(G_end - G) + Y^T b_end.
As in prepare.py the identity in (I - ab)^-1 = I - P is never rounded.

Two things go through every product together, one below the other in a tile of 2C rows: what is asked of the state (q
and a, x and w) and what is written to it (k and b, z and b_end). a_{t+1} reads S_t, as q_t does: so a goes one row
early, one decay serves both, and a's first row, which no decay of its chunk touches, stays out of the sums for dg.

Saved for the backward: the operands, and P [tokens, H, C]. All else is computed again there.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .chunks import chunk_rows, sequence_rows
from .decay import CHANNEL, last_row, widen_blocks
from .launch import kernel, launch
from .mini_batches import load_columns, store_columns
from .prepare import dot, load_tile, solve, store_tile
from .problem import Problem, contiguous
from .scan import load_state, store_state, whole_decay


@triton.jit
def load_decay(g, first, rows, i_h, i_d, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """The log decays of a tile; no less than -1e4: as good as -inf, whose products with 0 are not numbers."""
    return tl.maximum(load_tile(g, first, rows, i_h, i_d, H, K, C).to(tl.float32), -1e4)


@triton.jit
def shift_down(x):
    """Row i takes what row i - 1 had; row 0 is 0."""
    i_t = tl.arange(0, x.shape[0])
    above = tl.gather(x, tl.broadcast_to(tl.maximum(i_t - 1, 0)[:, None], x.shape), 0)
    return tl.where((i_t > 0)[:, None], above, 0)


@triton.jit
def load_half(p, first, rows, i_h, i_d, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr):
    """[2C, len(i_d)]: the tile of p [tokens, H, D] in its first or second half, 0 elsewhere."""
    i_t = tl.arange(0, 2 * C) - HALF * C
    p_x = p + ((first + i_t) * H + i_h)[:, None] * D + i_d[None, :]
    return tl.load(p_x, mask=((i_t >= 0) & (i_t < rows))[:, None] & ((i_d >= 0) & (i_d < D))[None, :], other=0)


@triton.jit
def store_half(p, x, first, rows, i_h, i_d, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr):
    """That half of x [2C, len(i_d)]."""
    i_t = tl.arange(0, 2 * C) - HALF * C
    p_x = p + ((first + i_t) * H + i_h)[:, None] * D + i_d[None, :]
    tl.store(p_x, x.to(p.dtype.element_ty), mask=((i_t >= 0) & (i_t < rows))[:, None] & (i_d < D)[None, :])


@triton.jit
def load_pair(p, other, first, rows, i_h, i_d, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, SHIFT: tl.constexpr):
    """[2C, len(i_d)]: a chunk's rows of p and, below, those of `other`, SHIFT rows early."""
    upper = load_half(p, first, rows, i_h, i_d, H, D, C, 0)
    return upper + load_half(other, first + SHIFT, rows - SHIFT, i_h, i_d, H, D, C, 1)


@triton.jit
def load_both(p, first, rows, i_h, i_d, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """[2C, len(i_d)] of p [tokens, H, 2, D]: a chunk's rows of the one and, below, of the other."""
    i_r = tl.arange(0, 2 * C)
    p_x = p + (((first + i_r % C) * H + i_h) * 2 + i_r // C)[:, None] * D + i_d[None, :]
    return tl.load(p_x, mask=(i_r % C < rows)[:, None] & (i_d < D)[None, :], other=0)


@triton.jit
def sum_pair(x):
    """[2C, D] -> [C, D]: the sum of both halves."""
    return tl.sum(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), 0)


@triton.jit
def twice(x):
    """[C, D] -> [2C, D]."""
    return tl.reshape(tl.broadcast_to(x[None], [2, x.shape[0], x.shape[1]]), [2 * x.shape[0], x.shape[1]])


@triton.jit
def quarter(x, row: tl.constexpr, column: tl.constexpr):
    """One of the four [C, C] that make up x [2C, 2C]."""
    C: tl.constexpr = x.shape[0] // 2
    i = tl.arange(0, 2)
    own = (i == row)[:, None, None, None] & (i == column)[None, None, :, None]
    return tl.sum(tl.sum(tl.where(own, tl.reshape(x, [2, C, 2, C]), 0), 2), 0)


@triton.jit
def pair_level(C: tl.constexpr, n, ROW: tl.constexpr = 1):
    """[2C, 2C]: in every quarter, decay.level(C, 2^n, ROW)."""
    half = tl.arange(0, 2 * C) % C >> n
    second = tl.where(half % 2 == 1, half, -1)
    return second[:, None] == (half + 1)[None, :] if ROW else second[None, :] == (half + 1)[:, None]


@triton.jit
def pair_diagonal(C: tl.constexpr):
    """[2C, 2C]: in every quarter, the diagonal."""
    i_t = tl.arange(0, 2 * C) % C
    return i_t[:, None] == i_t[None, :]


@kernel
def prepare(
    q, k, a, b, g, P, A, Y, xw, zb, whole, table, T, NC, H: tl.constexpr, K: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, SOLVED: tl.constexpr,
):  # fmt: skip
    """See the module: P [tokens, H, C]; A beside qb [tokens, H, 2, C], x beside w and z beside b_end [tokens, H, 2, K];
    e^(G_end) [chunks, H, K]. SOLVED: P is given, and Y [tokens, H, C] and qb are wanted too. Levels as in
    prepare_channels."""
    i_c, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    first, rows = chunk_rows(table, i_c, T, NC, C)
    if rows <= 0:
        return
    scores = tl.zeros([2 * C, 2 * C], tl.float32)
    for i_k in range(0, K, BK):
        i_d = i_k + tl.arange(0, BK)
        # [2C, BK]
        b_q = load_pair(q, a, first, rows, i_h, i_d, H, K, C, 1)
        b_k = load_pair(k, b, first, rows, i_h, i_d, H, K, C, 0)
        down = load_decay(g, first, rows, i_h, i_d, H, K, C)
        up = tl.zeros_like(down)
        scores += tl.where(pair_diagonal(C), dot(b_q, tl.trans(b_k), PRECISION), 0)
        for n in range(LEVELS):
            left = (b_q * twice(tl.exp(down))).to(b_q.dtype)
            right = (b_k * twice(tl.exp(up))).to(b_q.dtype)
            scores += tl.where(pair_level(C, n), dot(left, tl.trans(right), PRECISION), 0)
            down, up = widen_blocks(down, up, 1 << n)
    dtype = k.dtype.element_ty
    i_t = tl.arange(0, C)
    ak, b_qb = shift_down(quarter(scores, 1, 0)), quarter(scores, 0, 1).to(dtype)
    if SOLVED:
        b_P = load_tile(P, first, rows, i_h, i_t, H, C, C)
        store_tile(A, b_qb, first, rows, 2 * i_h + 1, i_t, 2 * H, C, C)
    else:
        b_P = solve(-shift_down(quarter(scores, 1, 1)), tl.full([C], 1, tl.float32), PRECISION).to(dtype)
        store_tile(P, b_P, first, rows, i_h, i_t, H, C, C)
    b_Y = (ak - dot(b_P, ak.to(dtype), PRECISION)).to(dtype)
    if SOLVED:
        store_tile(Y, b_Y, first, rows, i_h, i_t, H, C, C)
    b_A = quarter(scores, 0, 0) + dot(b_qb, b_Y, PRECISION)
    store_tile(A, b_A, first, rows, 2 * i_h, i_t, 2 * H, C, C)
    for i_k in range(0, K, BK):
        i_d = i_k + tl.arange(0, BK)
        # [C, BK]
        b_g = load_decay(g, first, rows, i_h, i_d, H, K, C)
        down = tl.cumsum(b_g, 0)
        b_w = load_tile(a, first, rows, i_h, i_d, H, K, C) * tl.exp(shift_down(down))
        b_w = (b_w - dot(b_P, b_w.to(dtype), PRECISION)).to(dtype)
        store_tile(xw, b_w, first, rows, 2 * i_h + 1, i_d, 2 * H, K, C)
        b_x = load_tile(q, first, rows, i_h, i_d, H, K, C) * tl.exp(down) + dot(b_qb, b_w, PRECISION)
        store_tile(xw, b_x, first, rows, 2 * i_h, i_d, 2 * H, K, C)
        # [BK, C]: upright, so that no product takes the transpose of another one (see gradients.py)
        b_later = tl.maximum(load_columns(g, first + 1, rows - 1, i_h, i_d, H, K, C).to(tl.float32), -1e4)
        end = tl.exp(tl.cumsum(b_later, 1, reverse=True))
        b_b = (load_columns(b, first, rows, i_h, i_d, H, K, C) * end).to(dtype)
        store_columns(zb, b_b, first, rows, 2 * i_h + 1, i_d, 2 * H, K, C)
        b_z = load_columns(k, first, rows, i_h, i_d, H, K, C) * end + dot(b_b, b_Y, PRECISION)
        store_columns(zb, b_z, first, rows, 2 * i_h, i_d, 2 * H, K, C)
        tl.store(whole + (tl.cast(i_c, tl.int64) * H + i_h) * K + i_d, tl.exp(tl.sum(b_g, 0)), mask=i_d < K)


@kernel
def scan_forward(
    xw, zb, A, Y, whole, v, initial, o, states, u, final, cu_seqlens, starts, scale, T, NC, H: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Writes what is not None: o [tokens, H, V]; in the pass that the backward begins with, `states` [chunks, H, K, V]
    before every chunk and u [tokens, H, V]; `final` [N, H, K, V]. WIDE as in scan.py."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_nh = tl.program_id(0) // NV
    i_v = (tl.program_id(0) % NV) * BV + tl.arange(0, BV)
    i_n, i_h = i_nh // H, i_nh % H
    i_k, i_r = tl.arange(0, BK), tl.arange(0, 2 * C)
    first, length, i_c = sequence_rows(cu_seqlens, starts, i_n, T, NC)
    S = tl.zeros([BK, BV], tl.float32)
    if initial is not None:
        S = load_state(initial, i_nh, i_k, i_v, K, V).to(tl.float32)
    for i in range(0, length, C):
        rows = tl.minimum(length - i, C)
        decay = whole_decay(whole, i_c, i_h, i_k, H, K, CHANNEL)
        b_S = S.to(WIDE)
        # [2C, BK]
        b_xw = load_both(xw, first, rows, i_h, i_k, H, K, C)
        b_zb = load_both(zb, first, rows, i_h, i_k, H, K, C)
        # [2C, BV]
        b_v = load_half(v, first, rows, i_h, i_v, H, V, C, 0)
        b_S_read = dot(b_xw.to(WIDE), b_S, PRECISION)
        if states is not None:
            store_state(states, b_S, i_c * H + i_h, i_k, i_v, K, V)
            b_Y = load_half(Y, first, rows, i_h, i_r, H, C, C, 1)
            store_half(u, b_S_read + dot(b_Y, b_v, PRECISION), first, rows, i_h, i_v, H, V, C, 1)
        if o is not None:
            b_A = load_half(A, first, rows, 2 * i_h, i_r, 2 * H, C, C, 0)
            b_o = scale * (b_S_read + dot(b_A, b_v, PRECISION))
            store_half(o, b_o, first, rows, i_h, i_v, H, V, C, 0)
        b_v += tl.where(i_r < C, 0, 1)[:, None] * b_S_read
        S = decay * S + dot(tl.trans(b_zb), b_v.to(b_zb.dtype), PRECISION)
        first += C
        i_c += 1
    if final is not None:
        store_state(final, S, i_nh, i_k, i_v, K, V)


@kernel
def scan_backward(
    xw, zb, A, P, whole, do, dfinal, dv, du, dstates, dinitial, cu_seqlens, starts, scale, T, NC, H: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Writes dv [tokens, H, V]; du [tokens, H, V], the gradient of what (I - ab)^-1 is applied to; `dstates` [chunks,
    H, K, V] with the gradient of the state BEHIND every chunk; dinitial [N, H, K, V] (or None)."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_nh = tl.program_id(0) // NV
    i_v = (tl.program_id(0) % NV) * BV + tl.arange(0, BV)
    i_n, i_h = i_nh // H, i_nh % H
    i_k, i_r = tl.arange(0, BK), tl.arange(0, 2 * C)
    first, length, i_c = sequence_rows(cu_seqlens, starts, i_n, T, NC)
    count = tl.cdiv(length, C)
    first += tl.cast(count - 1, tl.int64) * C
    i_c += count - 1
    dS = tl.zeros([BK, BV], tl.float32)
    if dfinal is not None:
        dS = load_state(dfinal, i_nh, i_k, i_v, K, V).to(tl.float32)
    for i in range(0, count):
        rows = tl.minimum(length - (count - 1 - i) * C, C)
        decay = whole_decay(whole, i_c, i_h, i_k, H, K, CHANNEL)
        b_dS = dS.to(WIDE)
        store_state(dstates, b_dS, i_c * H + i_h, i_k, i_v, K, V)
        # [2C, BK]
        b_xw = load_both(xw, first, rows, i_h, i_k, H, K, C)
        b_zb = load_both(zb, first, rows, i_h, i_k, H, K, C)
        # [2C, 2C]: A beside qb, and P in the last quarter
        b_A = load_half(A, first, rows, i_h, i_r, H, 2 * C, C, 0)
        b_P = load_half(P, first, rows, i_h, i_r - C, H, C, C, 1)
        # [2C, BV]
        b_do = load_half(do, first, rows, i_h, i_v, H, V, C, 0)
        b_do = (scale * b_do).to(b_do.dtype)
        b_dS_read = dot(b_zb.to(WIDE), b_dS, PRECISION)
        b_dv = b_dS_read + dot(tl.trans(b_A), b_do, PRECISION)
        store_half(dv, b_dv, first, rows, i_h, i_v, H, V, C, 0)
        b_dv -= dot(tl.trans(b_P), b_dv.to(b_P.dtype), PRECISION)
        store_half(du, b_dv, first, rows, i_h, i_v, H, V, C, 1)
        b_do += tl.where(i_r < C, 0, 1)[:, None] * b_dS_read
        dS = decay * dS + dot(tl.trans(b_xw), b_do.to(b_xw.dtype), PRECISION)
        first -= C
        i_c -= 1
    if dinitial is not None:
        store_state(dinitial, dS, i_nh, i_k, i_v, K, V)


@kernel
def gradients(
    q, k, a, b, g, v, u, do, du, states, dstates, dq, dk, da, db, dg, table, scale, T, NC, H: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dq, dk, da, db, dg [tokens, H, K], all chunks in parallel, from what the two scans kept.

    In pairs, one below the other: what reads the state (q and, one row early, a) and what is written to it (k and b);
    with their gradients and with what they are multiplied with (do and du, v and u). So every product is one product.

    A log decay g_l takes part in every decay that spans it: of pairs i >= l > j (rows of a are one early, so here too),
    of the way from the start to i >= l and of the way from i < l to the end. As in gradients.py, what no decay touches
    stays out of these sums.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    i_kb = tl.program_id(0) % NK
    i_h = (tl.program_id(0) // NK) % H
    i_c = tl.program_id(0) // (NK * H)
    first, rows = chunk_rows(table, i_c, T, NC, C)
    if rows <= 0:
        return
    i_k = i_kb * BK + tl.arange(0, BK)
    i_r = tl.arange(0, 2 * C)
    lower = (i_r % C)[:, None] >= (i_r % C)[None, :]
    dA = tl.zeros([2 * C, 2 * C], tl.float32)
    transposed = tl.zeros([2 * C, 2 * C], tl.float32)
    d_read = tl.zeros([2 * C, BK], tl.float32)
    d_write = tl.zeros([2 * C, BK], tl.float32)
    da_first = tl.zeros([BK], tl.float32)
    overlap = tl.zeros([BK], tl.float32)
    for i in range(0, V, BV):
        i_v = i + tl.arange(0, BV)
        # [2C, BV]
        b_do = load_pair(do, du, first, rows, i_h, i_v, H, V, C, 1)
        b_do = (tl.where(i_r < C, scale, 1)[:, None] * b_do).to(b_do.dtype)
        b_v = load_pair(v, u, first, rows, i_h, i_v, H, V, C, 0)
        # [BK, BV]
        b_S = load_state(states, i_c * H + i_h, i_k, i_v, K, V)
        b_dS = load_state(dstates, i_c * H + i_h, i_k, i_v, K, V)
        dA += dot(b_do, tl.trans(b_v), PRECISION)
        transposed += dot(b_v, tl.trans(b_do), PRECISION)
        d_read += dot(b_do.to(WIDE), tl.trans(b_S), PRECISION)
        d_write += dot(b_v.to(WIDE), tl.trans(b_dS), PRECISION)
        # [BV]
        du_first = tl.load(du + (first * H + i_h) * V + i_v, mask=i_v < V, other=0).to(tl.float32)
        da_first += tl.sum(b_S.to(tl.float32) * du_first[None, :], 1)
        overlap += tl.sum(b_S.to(tl.float32) * b_dS.to(tl.float32), 1)
    # in every quarter dA's lower triangle, and above it its transpose's
    dA = tl.where(lower, dA, transposed).to(k.dtype.element_ty)
    # [2C, BK]
    b_q = load_pair(q, a, first, rows, i_h, i_k, H, K, C, 1)
    b_k = load_pair(k, b, first, rows, i_h, i_k, H, K, C, 0)
    down = load_decay(g, first, rows, i_h, i_k, H, K, C)
    up = tl.zeros_like(down)
    reads = tl.zeros([2 * C, BK], tl.float32)
    writes = tl.zeros([2 * C, BK], tl.float32)
    for n in range(LEVELS):
        b_down, b_up = twice(tl.exp(down)), twice(tl.exp(up))
        reads += b_down * dot(tl.where(pair_level(C, n), dA, 0), (b_k * b_up).to(b_k.dtype), PRECISION)
        writes += b_up * dot(tl.where(pair_level(C, n, 0), dA, 0), (b_q * b_down).to(b_k.dtype), PRECISION)
        down, up = widen_blocks(down, up, 1 << n)
    reads += d_read * twice(tl.exp(down))
    d_write *= twice(tl.exp(up))
    # loaded again behind a store, or they would stay in registers all the while
    tl.store(da + (first * H + i_h) * K + i_k, da_first.to(da.dtype.element_ty), mask=i_k < K)
    b_q = load_pair(q, a, first, rows, i_h, i_k, H, K, C, 1)
    b_k = load_pair(k, b, first, rows, i_h, i_k, H, K, C, 0)
    b_dg = tl.cumsum(sum_pair(b_q * reads - b_k * writes), 0, reverse=True)
    b_dg += shift_down(tl.cumsum(sum_pair(b_k * d_write), 0)) + (tl.exp(last_row(down)) * overlap)[None, :]
    store_tile(dg, b_dg, first, rows, i_h, i_k, H, K, C)
    itself = tl.where(pair_diagonal(C), dA, 0)
    reads += dot(itself, b_k, PRECISION)
    store_half(dq, reads, first, rows, i_h, i_k, H, K, C, 0)
    store_half(da, reads, first + 1, rows - 1, i_h, i_k, H, K, C, 1)
    # of the diagonals, which are their own transposes, two change places
    moved = tl.sum(tl.where(i_r[:, None] == i_r[None, :], 0, itself), 0)
    itself = tl.where((i_r[:, None] != i_r[None, :]) & pair_diagonal(C), moved[:, None], itself)
    writes += d_write + dot(itself, b_q, PRECISION)
    store_half(dk, writes, first, rows, i_h, i_k, H, K, C, 0)
    store_half(db, writes, first, rows, i_h, i_k, H, K, C, 1)


SIZES = ("H", "K", "C", "PRECISION")
SCAN = (*SIZES, "V", "BK", "WIDE")


class Prepared:
    """What `prepare` leaves for the scans; for those of the backward where P is given."""

    def __init__(self, p, q, k, a, b, g, P=None):
        solved, new = P is not None, partial(p.rows, dtype=p.dtype)
        self.P, self.A, self.Y = P if solved else new(p.C), new(2, p.C), new(p.C) if solved else None
        self.xw, self.zb = new(2, p.K), new(2, p.K)
        self.whole = p.empty(p.chunks.count, p.H, p.K)
        launch(
            prepare, (p.chunks.count * p.H,), q, k, a, b, g, self.P, self.A, self.Y, self.xw, self.zb, self.whole,
            p.chunks.table, p.T, p.chunks.per_sequence, **p.sizes(*SIZES, "LEVELS"), SOLVED=solved,
            **p.configure("prepare", BK=p.K),
        )  # fmt: skip

    def scan_for_outputs(self, p, v, initial, o, final):
        """The forward's pass: fills o, and final unless it is None."""
        self._scan(p, v, initial, o, None, None, final)

    def scan_for_states(self, p, v, initial, states, u):
        """The pass that the backward begins with: fills the states before every chunk, and u."""
        self._scan(p, v, initial, None, states, u, None)

    def scan_for_summary(self, p, v, initial, final):
        """The pass that keeps nothing of a chunk: fills final."""
        self._scan(p, v, initial, None, None, None, final)

    def _scan(self, p, v, initial, o, states, u, final):
        options = p.configure("scan_forward", BV=p.V)
        launch(
            scan_forward, (p.N * p.H * triton.cdiv(p.V, options["BV"]),), self.xw, self.zb, self.A, self.Y, self.whole,
            v, initial, o, states, u, final, p.cu_seqlens, p.chunks.starts, p.scale, p.T, p.chunks.per_sequence,
            **p.sizes(*SCAN), **options,
        )  # fmt: skip

    def scan_back(self, p, do, dfinal, dv, du, dstates, dinitial):
        options = p.configure("scan_backward", BV=p.V)
        launch(
            scan_backward, (p.N * p.H * triton.cdiv(p.V, options["BV"]),), self.xw, self.zb, self.A, self.P,
            self.whole, do, dfinal, dv, du, dstates, dinitial, p.cu_seqlens, p.chunks.starts, p.scale, p.T,
            p.chunks.per_sequence, **p.sizes(*SCAN), **options,
        )  # fmt: skip


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, a, b, g, initial, cu_seqlens, scale, return_state):
        p = Problem(k, v, scale, cu_seqlens, tuned_as="dplr_{}")
        prepared = Prepared(p, q, k, a, b, g)
        o, final = torch.empty_like(v), p.states(p.N) if return_state else None
        prepared.scan_for_outputs(p, v, initial, o, final)
        ctx.save_for_backward(q, k, v, a, b, g, initial, prepared.P)
        ctx.problem = p
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal):
        q, k, v, a, b, g, initial, P = ctx.saved_tensors
        p = ctx.problem
        do, dfinal = contiguous(torch.zeros_like(v) if do is None else do, dfinal)
        prepared = Prepared(p, q, k, a, b, g, P)
        gradients = backward(p, prepared, q, k, v, a, b, g, initial, do, dfinal)
        return *gradients, None, None, None


def backward(p, prepared, q, k, v, a, b, g, initial, do, dfinal):
    """The gradients (dq, dk, dv, da, db, dg, dinitial)."""
    states, dstates = (p.states(p.chunks.count, p.wide) for _ in range(2))
    u, dv, du = (torch.empty_like(v) for _ in range(3))
    dinitial = None if initial is None else torch.empty_like(initial)
    prepared.scan_for_states(p, v, initial, states, u)
    prepared.scan_back(p, do, dfinal, dv, du, dstates, dinitial)
    dq, dk, da, db, dg = (torch.empty_like(x) for x in (q, k, a, b, g))
    options = p.configure("gradients", BK=p.K, BV=p.V)
    launch(
        gradients, (p.chunks.count * p.H * triton.cdiv(p.K, options["BK"]),), q, k, a, b, g, v, u, do, du, states,
        dstates, dq, dk, da, db, dg, p.chunks.table, p.scale, p.T, p.chunks.per_sequence,
        **p.sizes(*SIZES, "LEVELS", "V", "WIDE"), **options,
    )  # fmt: skip
    return dq, dk, dv, da, db, dg, dinitial


def dplr(q, k, v, a, b, g, *, scale, initial_state=None, return_state=False, cu_seqlens=None):
    """See api.dplr."""
    operands = contiguous(q, k, v, a, b, g, initial_state)
    return _Rule.apply(*operands, cu_seqlens, scale, return_state)
