"""Titans' linear memory: a walk along one sequence's mini-batches with S and Z of one head and one block of values in
registers, and back. S_0 is S when a mini-batch begins, but in the first one of a given state and behind an unfinished
last one; so it is never carried in registers.

Legend, one mini-batch: r = k S_0 - v, u = -theta r; keep, momentum the lower triangles of e^(G_t - G_i) and
e^(M_t - M_i): c = keep momentum are the coefficients of the writes k_j u_j^T in S_t, and f = keep e^M those of Z;
o = scale (e^G q S + f q Z + (c q k^T) u). Tiles [channels, tokens] and [tokens, tokens] are the transposes of these.
No product takes the transpose of another one (see gradients.py), so the walk forward holds S and Z transposed, and on
the way back what is added to their gradients is not.
"""

import triton
import triton.language as tl

from .decay import SCALAR, last_row, scalar_decay
from .launch import kernel
from .mini_batches import (
    load_columns,
    load_rows,
    mini_batch_rows,
    slot_begins,
    slot_rows,
    store_columns,
    store_rows,
    walk,
)
from .prepare import dot, load_tile, store_tile
from .scan import load_state, load_transposed, store_state, store_transposed


@triton.jit
def last(x):
    """x [BC] -> its last element."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0]) == x.shape[0] - 1, x, 0))


@triton.jit
def decays(g, m, row, rows, i_h, H: tl.constexpr, BC: tl.constexpr):
    """keep, momentum [BC, BC], both from the start [BC], momentum to the end [BC].

    Places behind the last row keep everything and add no Z to S, so the last place is the mini-batch's end.
    """
    keep, keep_start, _, _ = scalar_decay(g, row, rows, i_h, H, BC, SCALAR)
    momentum, momentum_start, momentum_end, _ = scalar_decay(m, row, rows, i_h, H, BC, SCALAR)
    i_t = tl.arange(0, BC)
    lower = i_t[:, None] >= i_t[None, :]
    keep, momentum = tl.where(lower & (i_t < rows)[None, :], keep, 0), tl.where(lower, momentum, 0)
    return keep, keep_start, momentum, momentum_start, momentum_end


@kernel
def titans_prepare(
    q, k, g, m, table, A, c, vectors, ends, H: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All mini-batches in parallel: A = c q k^T and c [tokens, H, BC]; vectors [tokens, H, 4]: e^G, f, the last row of
    c, momentum to the end; ends [slots, H, 3]: e^G, f and e^M of the end."""
    i_s, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    row, rows = slot_rows(table, i_s)
    if rows <= 0:
        return
    keep, keep_start, momentum, momentum_start, momentum_end = decays(g, m, row, rows, i_h, H, BC)
    b_c = dot(keep, momentum, PRECISION)
    f = tl.sum(keep * momentum_start[None, :], 1)
    i_t = tl.arange(0, BC)
    store_tile(c, b_c, row, rows, i_h, i_t, H, BC, BC)
    b_q = load_tile(q, row, rows, i_h, tl.arange(0, BK), H, K, BC)
    b_k = load_tile(k, row, rows, i_h, tl.arange(0, BK), H, K, BC)
    store_tile(A, b_c * dot(b_q, tl.trans(b_k), PRECISION), row, rows, i_h, i_t, H, BC, BC)
    store_rows(vectors, keep_start, row, rows, 4 * i_h, 4 * H, BC)
    store_rows(vectors, f, row, rows, 4 * i_h + 1, 4 * H, BC)
    store_rows(vectors, last_row(b_c), row, rows, 4 * i_h + 2, 4 * H, BC)
    store_rows(vectors, momentum_end, row, rows, 4 * i_h + 3, 4 * H, BC)
    p_end = ends + (tl.cast(i_s, tl.int64) * H + i_h) * 3
    tl.store(p_end, last(keep_start))
    tl.store(p_end + 1, last(f))
    tl.store(p_end + 2, last(momentum_start))


@kernel
def titans_forward(
    q, k, v, theta, initial, offset, A, vectors, ends, o, r, S_states, Z_states, final, cu_seqlens, scale, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes o [tokens, H, V] and final [N, H, 3, K, V] (or None; zeros before), or in the pass for states (where o is
    None), which the backward begins with, r [tokens, H, V] and S and Z before every mini-batch, [slots, H, K, V]."""
    FOR_STATES: tl.constexpr = o is None
    NV: tl.constexpr = (V + BV - 1) // BV
    i_nh = tl.program_id(0) // NV
    i_v = (tl.program_id(0) % NV) * BV + tl.arange(0, BV)
    i_n, i_h = i_nh // H, i_nh % H
    i_k, i_t = tl.arange(0, BK), tl.arange(0, BC)
    first, length, past, count, slot = walk(cu_seqlens, offset, i_n, T, C)
    S = tl.zeros([BV, BK], tl.float32)
    Z = tl.zeros([BV, BK], tl.float32)
    if initial is not None:
        S = load_transposed(initial, 3 * i_nh + 1, i_k, i_v, K, V).to(tl.float32)
        Z = load_transposed(initial, 3 * i_nh + 2, i_k, i_v, K, V).to(tl.float32)
    for i in range(0, count):
        row, rows, complete = mini_batch_rows(i, first, length, past, C)
        i_s = (slot + i) * H + i_h
        # [BK, BC]
        b_k = load_columns(k, row, rows, i_h, i_k, H, K, BC)
        # [BV, BC]
        b_v = load_columns(v, row, rows, i_h, i_v, H, V, BC)
        b_S = S.to(WIDE)
        b_Z = Z.to(WIDE)
        b_S0 = b_S
        if initial is not None:
            if i == 0:
                b_S0 = load_transposed(initial, 3 * i_nh, i_k, i_v, K, V).to(WIDE)
        b_r = dot(b_S0, b_k.to(WIDE), PRECISION) - b_v
        u = -load_rows(theta, row, rows, i_h, H, BC)[None, :] * b_r
        if FOR_STATES:
            store_transposed(S_states, b_S, i_s, i_k, i_v, K, V)
            store_transposed(Z_states, b_Z, i_s, i_k, i_v, K, V)
            store_columns(r, b_r, row, rows, i_h, i_v, H, V, BC)
        else:
            b_q = load_columns(q, row, rows, i_h, i_k, H, K, BC)
            b_o = dot(u.to(WIDE), load_columns(A, row, rows, i_h, i_t, H, BC, BC), PRECISION)
            b_start = load_rows(vectors, row, rows, 4 * i_h, 4 * H, BC)[None, :]
            b_f = load_rows(vectors, row, rows, 4 * i_h + 1, 4 * H, BC)[None, :]
            b_o += b_start * dot(b_S, b_q.to(WIDE), PRECISION)
            b_o += b_f * dot(b_Z, b_q.to(WIDE), PRECISION)
            store_columns(o, scale * b_o, row, rows, i_h, i_v, H, V, BC)
        if final is not None:
            if not complete:
                S0 = S
                if initial is not None:
                    if i == 0:
                        S0 = load_transposed(initial, 3 * i_nh, i_k, i_v, K, V).to(tl.float32)
                store_transposed(final, S0, 3 * i_nh, i_k, i_v, K, V)
        c_end = load_rows(vectors, row, rows, 4 * i_h + 2, 4 * H, BC)[None, :]
        b_end = load_rows(vectors, row, rows, 4 * i_h + 3, 4 * H, BC)[None, :]
        S = tl.load(ends + 3 * i_s) * S + tl.load(ends + 3 * i_s + 1) * Z
        S += dot((c_end * u).to(WIDE), tl.trans(b_k).to(WIDE), PRECISION)
        Z = tl.load(ends + 3 * i_s + 2) * Z + dot((b_end * u).to(WIDE), tl.trans(b_k).to(WIDE), PRECISION)
    if final is not None:
        store_transposed(final, S, 3 * i_nh + 1, i_k, i_v, K, V)
        store_transposed(final, Z, 3 * i_nh + 2, i_k, i_v, K, V)
        if count == 0:
            if initial is not None:
                store_state(final, load_state(initial, 3 * i_nh, i_k, i_v, K, V), 3 * i_nh, i_k, i_v, K, V)
        elif count * C == length + past:
            store_transposed(final, S, 3 * i_nh, i_k, i_v, K, V)


@kernel
def titans_backward(
    q, k, theta, offset, A, c, vectors, ends, r, S_states, Z_states, do, dfinal, dq, dk, dv, dA, dvectors, dends,
    dinitial, cu_seqlens, scale, T, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes dv and dinitial (unless None) and what titans_finish_back adds up: dq, dk [tokens, H, blocks, K],
    dA [tokens, H, blocks, BC], dvectors [tokens, H, blocks, 5] and dends [slots, H, blocks, 3]. dfinal may be None."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_nh, i_vb = tl.program_id(0) // NV, tl.program_id(0) % NV
    i_v = i_vb * BV + tl.arange(0, BV)
    i_n, i_h = i_nh // H, i_nh % H
    i_hv = i_h * NV + i_vb
    i_k, i_t = tl.arange(0, BK), tl.arange(0, BC)
    causal = i_t[:, None] <= i_t[None, :]
    first, length, past, count, slot = walk(cu_seqlens, offset, i_n, T, C)
    dS = tl.zeros([BK, BV], tl.float32)
    dZ = tl.zeros([BK, BV], tl.float32)
    if dfinal is not None:
        dS = load_state(dfinal, 3 * i_nh + 1, i_k, i_v, K, V).to(tl.float32)
        dZ = load_state(dfinal, 3 * i_nh + 2, i_k, i_v, K, V).to(tl.float32)
        if (count > 0) & (count * C == length + past):
            dS += load_state(dfinal, 3 * i_nh, i_k, i_v, K, V)
    for j in range(0, count):
        i = count - 1 - j
        row, rows, complete = mini_batch_rows(i, first, length, past, C)
        i_s = (slot + i) * H + i_h
        # [BC]
        b_start = load_rows(vectors, row, rows, 4 * i_h, 4 * H, BC)
        b_f = load_rows(vectors, row, rows, 4 * i_h + 1, 4 * H, BC)
        c_end = load_rows(vectors, row, rows, 4 * i_h + 2, 4 * H, BC)
        b_end = load_rows(vectors, row, rows, 4 * i_h + 3, 4 * H, BC)
        b_theta = load_rows(theta, row, rows, i_h, H, BC)
        # [BK, BC]
        b_q = load_columns(q, row, rows, i_h, i_k, H, K, BC)
        b_k = load_columns(k, row, rows, i_h, i_k, H, K, BC)
        # [BC, BV]
        b_do = load_tile(do, row, rows, i_h, i_v, H, V, BC)
        b_do = (scale * b_do).to(b_do.dtype).to(WIDE)
        b_r = load_tile(r, row, rows, i_h, i_v, H, V, BC)
        b_u = (-b_theta[:, None] * b_r).to(WIDE)
        # [BK, BV]
        b_S = load_state(S_states, i_s, i_k, i_v, K, V)
        # through S and Z: read by queries, and by what follows
        p_end = dends + 3 * ((slot + i) * H * NV + i_hv)
        tl.store(p_end, tl.sum(dS * b_S))
        b_dS = dS.to(WIDE)
        along = dot(tl.trans(b_k).to(WIDE), b_dS, PRECISION)
        store_rows(dvectors, -b_theta * tl.sum(b_r * along, 1), row, rows, 5 * i_hv + 2, 5 * H * NV, BC)
        du = c_end[:, None] * along
        b_dk = c_end[None, :] * dot(b_dS, tl.trans(b_u), PRECISION)
        back = dot(b_S, tl.trans(b_do), PRECISION)
        store_rows(dvectors, tl.sum(back * b_q, 0), row, rows, 5 * i_hv, 5 * H * NV, BC)
        b_dq = b_start[None, :] * back
        b_Z = load_state(Z_states, i_s, i_k, i_v, K, V)
        tl.store(p_end + 1, tl.sum(dS * b_Z))
        tl.store(p_end + 2, tl.sum(dZ * b_Z))
        b_dZ = dZ.to(WIDE)
        along = dot(tl.trans(b_k).to(WIDE), b_dZ, PRECISION)
        store_rows(dvectors, -b_theta * tl.sum(b_r * along, 1), row, rows, 5 * i_hv + 3, 5 * H * NV, BC)
        du += b_end[:, None] * along
        b_dk += b_end[None, :] * dot(b_dZ, tl.trans(b_u), PRECISION)
        back = dot(b_Z, tl.trans(b_do), PRECISION)
        store_rows(dvectors, tl.sum(back * b_q, 0), row, rows, 5 * i_hv + 1, 5 * H * NV, BC)
        b_dq += b_f[None, :] * back
        # inside the mini-batch
        b_dA = dot(b_u, tl.trans(b_do), PRECISION) * load_columns(c, row, rows, i_h, i_t, H, BC, BC)
        b_dq += dot(b_k, tl.where(causal, b_dA, 0).to(b_k.dtype), PRECISION)
        store_columns(dq, b_dq, row, rows, i_hv, i_k, H * NV, K, BC)
        du += dot(load_columns(A, row, rows, i_h, i_t, H, BC, BC), b_do, PRECISION)
        store_rows(dvectors, -tl.sum(b_r * du, 1), row, rows, 5 * i_hv + 4, 5 * H * NV, BC)
        b_dv = b_theta[:, None] * du
        store_tile(dv, b_dv, row, rows, i_h, i_v, H, V, BC)
        pairs = tl.where(i_t[:, None] >= i_t[None, :], dot(b_do, tl.trans(b_u), PRECISION), 0)
        store_tile(dA, pairs, row, rows, i_hv, i_t, H * NV, BC, BC)
        b_dA = (pairs * load_tile(c, row, rows, i_h, i_t, H, BC, BC)).to(b_k.dtype)
        b_dk += dot(b_q, b_dA, PRECISION)
        store_columns(dk, b_dk, row, rows, i_hv, i_k, H * NV, K, BC)
        # of S and Z before the mini-batch
        dZ = tl.load(ends + 3 * i_s + 2) * dZ + tl.load(ends + 3 * i_s + 1) * dS
        dZ += dot(b_q.to(WIDE), (b_f[:, None] * b_do).to(WIDE), PRECISION)
        dS = tl.load(ends + 3 * i_s) * dS
        dS += dot(b_q.to(WIDE), (b_start[:, None] * b_do).to(WIDE), PRECISION)
        if dinitial is not None:
            if i == 0:  # S_0 is apart: what is left in dS is its gradient
                store_state(dinitial, dS, 3 * i_nh + 1, i_k, i_v, K, V)
                dS = tl.zeros([BK, BV], tl.float32)
        dS -= dot(b_k.to(WIDE), b_dv.to(WIDE), PRECISION)
        if dfinal is not None:
            if not complete:
                dS += load_state(dfinal, 3 * i_nh, i_k, i_v, K, V)
    if dinitial is not None:
        store_state(dinitial, dS, 3 * i_nh + tl.where(count > 0, 0, 1), i_k, i_v, K, V)
        store_state(dinitial, dZ, 3 * i_nh + 2, i_k, i_v, K, V)
        if dfinal is not None:
            if count == 0:
                store_state(dinitial, load_state(dfinal, 3 * i_nh, i_k, i_v, K, V), 3 * i_nh, i_k, i_v, K, V)


@triton.jit
def log_decay_gradient(dbetween, dstart):
    """[BC]: of log decays, from those of their sums between tokens i < t [BC, BC] and from the start to t [BC].

    The l-th takes part where i < l <= t. Only such terms are added up, so that a small gradient is not lost.
    """
    i_t = tl.arange(0, dstart.shape[0])
    strict = i_t[:, None] > i_t[None, :]
    between = tl.cumsum(tl.where(strict, dbetween, 0), 0, reverse=True)
    return tl.sum(tl.where(strict, between, 0), 1) + tl.cumsum(dstart, 0, reverse=True)


@kernel
def titans_finish_back(
    q, k, g, m, initial, table, S_states, dv, dq_parts, dk_parts, dA, dvectors, dends, dq, dk, dtheta, dg, dm,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dq, dk [tokens, H, K] and dtheta, dg, dm [tokens, H] from what titans_backward wrote for blocks of BV values, all
    mini-batches in parallel."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_s, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    row, rows = slot_rows(table, i_s)
    if rows <= 0:
        return
    begins = slot_begins(table, i_s)
    i_k, i_t = tl.arange(0, BK), tl.arange(0, BC)
    end = i_t == BC - 1
    b_dq = tl.zeros([BK, BC], tl.float32)
    b_dk = tl.zeros([BK, BC], tl.float32)
    b_dc = tl.zeros([BC, BC], tl.float32)
    dkeep_start = tl.zeros([BC], tl.float32)
    df = tl.zeros([BC], tl.float32)
    dc_end = tl.zeros([BC], tl.float32)
    dmomentum_end = tl.zeros([BC], tl.float32)
    dmomentum_start = tl.zeros([BC], tl.float32)
    b_dtheta = tl.zeros([BC], tl.float32)
    for i in range(0, NV):
        i_hv = i_h * NV + i
        i_v = i * BV + tl.arange(0, BV)
        b_dq += load_columns(dq_parts, row, rows, i_hv, i_k, H * NV, K, BC)
        b_dk += load_columns(dk_parts, row, rows, i_hv, i_k, H * NV, K, BC)
        S0 = load_state(S_states, tl.cast(i_s, tl.int64) * H + i_h, i_k, i_v, K, V)
        if initial is not None:
            if begins >= 0:
                S0 = load_state(initial, 3 * (begins * H + i_h), i_k, i_v, K, V).to(WIDE)
        b_dk -= dot(S0, load_columns(dv, row, rows, i_h, i_v, H, V, BC).to(WIDE), PRECISION)
        b_dc += load_tile(dA, row, rows, i_hv, i_t, H * NV, BC, BC)
        dkeep_start += load_rows(dvectors, row, rows, 5 * i_hv, 5 * H * NV, BC)
        df += load_rows(dvectors, row, rows, 5 * i_hv + 1, 5 * H * NV, BC)
        dc_end += load_rows(dvectors, row, rows, 5 * i_hv + 2, 5 * H * NV, BC)
        dmomentum_end += load_rows(dvectors, row, rows, 5 * i_hv + 3, 5 * H * NV, BC)
        b_dtheta += load_rows(dvectors, row, rows, 5 * i_hv + 4, 5 * H * NV, BC)
        p_end = dends + 3 * (tl.cast(i_s, tl.int64) * H * NV + i_hv)
        dkeep_start += tl.where(end, tl.load(p_end), 0)
        df += tl.where(end, tl.load(p_end + 1), 0)
        dmomentum_start += tl.where(end, tl.load(p_end + 2), 0)
    store_columns(dq, b_dq, row, rows, i_h, i_k, H, K, BC)
    store_columns(dk, b_dk, row, rows, i_h, i_k, H, K, BC)
    b_q = load_tile(q, row, rows, i_h, i_k, H, K, BC)
    b_k = load_tile(k, row, rows, i_h, i_k, H, K, BC)
    b_dc *= dot(b_q, tl.trans(b_k), PRECISION)
    keep, keep_start, momentum, momentum_start, _ = decays(g, m, row, rows, i_h, H, BC)
    b_dc += tl.where(end[:, None], dc_end[None, :], 0)
    dkeep = dot(b_dc, tl.trans(momentum), PRECISION) + df[:, None] * momentum_start[None, :]
    dmomentum = dot(tl.trans(keep), b_dc, PRECISION) + tl.where(end[:, None], dmomentum_end[None, :], 0)
    dmomentum_start += tl.sum(keep * df[:, None], 0)
    store_rows(dtheta, b_dtheta, row, rows, i_h, H, BC)
    store_rows(dg, log_decay_gradient(dkeep * keep, dkeep_start * keep_start), row, rows, i_h, H, BC)
    store_rows(dm, log_decay_gradient(dmomentum * momentum, dmomentum_start * momentum_start), row, rows, i_h, H, BC)
