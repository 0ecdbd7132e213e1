"""TTT-Linear: a walk along one sequence's mini-batches with the model [V + 1, V] of one head in registers, and back.

Legend, one mini-batch: z = k W + b (the bias b is the last row of a state), x the normalised z, r = 1 / std,
e = w y with y = w x + bias - (v - k), grad = r (e - <e> - x <e x>) with <.> the mean over channels, u = eta grad,
s = token_scale, P = tril(scale q k^T + 1), o = scale q W + b - s (P u + scale q A + a), where A, a is what acc was
before: 0 but in a sequence's first mini-batch, so it is not carried in registers. Likewise behind all but the last.
Tiles [V, tokens] and matrices [V, V] are the transposes of these.
"""

import triton
import triton.language as tl

from .launch import kernel
from .mini_batches import (
    load_columns,
    load_rows,
    mini_batch_rows,
    slot_complete,
    slot_rows,
    store_columns,
    store_rows,
    walk,
)
from .prepare import dot, load_tile, store_tile
from .scan import load_state, store_state


@triton.jit
def load_model(p, i, i_v, V: tl.constexpr):
    """Transposed weights [BV, BV] and bias [BV] of the model i of [.., V + 1, V], in float32."""
    p_s = p + tl.cast(i, tl.int64) * (V + 1) * V
    inside = i_v < V
    weights = tl.load(p_s + i_v[:, None] + i_v[None, :] * V, mask=inside[:, None] & inside[None, :], other=0)
    return weights.to(tl.float32), tl.load(p_s + V * V + i_v, mask=inside, other=0).to(tl.float32)


@triton.jit
def store_model(p, weights, bias, i, i_v, V: tl.constexpr):
    p_s = p + tl.cast(i, tl.int64) * (V + 1) * V
    inside = i_v < V
    tl.store(p_s + i_v[:, None] + i_v[None, :] * V, weights, mask=inside[:, None] & inside[None, :])
    tl.store(p_s + V * V + i_v, bias, mask=inside)


@triton.jit
def load_head(p, i_h, i_v, V: tl.constexpr):
    """[BV, 1] of x [H, V] in float32; 0 outside."""
    return tl.load(p + i_h * V + i_v, mask=i_v < V, other=0).to(tl.float32)[:, None]


@triton.jit
def project(x, y, inside, V: tl.constexpr):
    """y - <y> - x <x y>, and <x y> [1, BC]: LN's symmetric projection of y [BV, BC], V channels of which are inside."""
    along = tl.sum(x * y, 0)[None, :] / V
    return tl.where(inside[:, None], y - tl.sum(y, 0)[None, :] / V - x * along, 0), along


@triton.jit
def normalize(z, rows, inside, eps, V: tl.constexpr):
    """x and r of the legend, [BV, BC] and [1, BC]; 0 for tokens that are not there, also without eps."""
    x = tl.where(inside[:, None], z - tl.sum(z, 0)[None, :] / V, 0)
    there = (tl.arange(0, z.shape[1]) < rows)[None, :]
    r = tl.where(there, tl.rsqrt(tl.sum(x * x, 0)[None, :] / V + eps), 0)
    return x * r, r


@triton.jit
def last_scale(token_scale, row, rows, i_h, H: tl.constexpr):
    """token_scale of a mini-batch's last token, 1 where it is None."""
    step = tl.full([], 1, tl.float32)
    if token_scale is not None:
        step = tl.load(token_scale + (row + rows - 1) * H + i_h).to(tl.float32)
    return step


@triton.jit
def share_of_acc(token_scale, complete, row, rows, i_h, H: tl.constexpr):
    """The factor of M in the gradient of acc."""
    return tl.where(complete, -last_scale(token_scale, row, rows, i_h, H), 1)


@kernel
def ttt_prepare(
    q, k, table, P, scale, H: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """P [tokens, H, BC] of the legend, all mini-batches in parallel."""
    i_s, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    row, rows = slot_rows(table, i_s)
    if rows <= 0:
        return
    i_v, i_t = tl.arange(0, BV), tl.arange(0, BC)
    b_q = load_columns(q, row, rows, i_h, i_v, H, V, BC)
    b_k = load_columns(k, row, rows, i_h, i_v, H, V, BC)
    b_P = tl.where(i_t[:, None] <= i_t[None, :], scale * dot(tl.trans(b_k), b_q, PRECISION) + 1, 0)
    store_columns(P, b_P, row, rows, i_h, i_t, H, BC, BC)


@kernel
def ttt_acc(
    q, token_scale, initial, offset, o, cu_seqlens, scale, T, H: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BC: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes what A, a of a given state take part in, - s (scale q A + a), to a sequence's first mini-batch of o."""
    i_nh = tl.program_id(0)
    i_n, i_h = i_nh // H, i_nh % H
    i_v = tl.arange(0, BV)
    first, length, past, count, _slot = walk(cu_seqlens, offset, i_n, T, C)
    if count == 0:
        return
    row, rows, _ = mini_batch_rows(0, first, length, past, C)
    A, a = load_model(initial, 2 * i_nh + 1, i_v, V)
    b_q = load_columns(q, row, rows, i_h, i_v, H, V, BC)
    moved = scale * dot(A.to(WIDE), b_q.to(WIDE), PRECISION) + a[:, None]
    if token_scale is not None:
        moved *= load_rows(token_scale, row, rows, i_h, H, BC)[None, :]
    store_columns(o, -moved, row, rows, i_h, i_v, H, V, BC)


@kernel
def ttt_forward(
    q, k, v, eta, token_scale, weight, bias, initial, offset, P, o, states, biases, final, cu_seqlens, scale, eps, T,
    H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Writes o [tokens, H, V] (with a given state, ttt_acc has written its share) and final [N, H, 2, V + 1, V] (or
    None; zeros before) or in the pass for states (where o is None), which the backward begins with, the memory before
    every mini-batch: states [slots, H, V, V], transposed, and biases [slots, H, V]."""
    FOR_STATES: tl.constexpr = o is None
    i_nh = tl.program_id(0)
    i_n, i_h = i_nh // H, i_nh % H
    i_v, i_t = tl.arange(0, BV), tl.arange(0, BC)
    inside = i_v < V
    first, length, past, count, slot = walk(cu_seqlens, offset, i_n, T, C)
    b_weight, b_bias = load_head(weight, i_h, i_v, V), load_head(bias, i_h, i_v, V)
    W = tl.zeros([BV, BV], tl.float32)
    b = tl.zeros([BV], tl.float32)
    if initial is not None:
        W, b = load_model(initial, 2 * i_nh, i_v, V)
    unfinished = 0
    for i in range(0, count):
        row, rows, complete = mini_batch_rows(i, first, length, past, C)
        step = last_scale(token_scale, row, rows, i_h, H)
        # [BV, BC]
        b_k = load_columns(k, row, rows, i_h, i_v, H, V, BC)
        b_W = W.to(WIDE)
        b_b = b[:, None]
        x, r = normalize(dot(b_W, b_k.to(WIDE), PRECISION) + b_b, rows, inside, eps, V)
        target = load_columns(v, row, rows, i_h, i_v, H, V, BC).to(tl.float32) - b_k.to(tl.float32)
        grad, _ = project(x, b_weight * (b_weight * x + b_bias - target), inside, V)
        u = load_rows(eta, row, rows, i_h, H, BC)[None, :] * r * grad
        if FOR_STATES:
            i_s = (slot + i) * H + i_h
            store_state(states, b_W, i_s, i_v, i_v, V, V)
            tl.store(biases + i_s * V + i_v, b, mask=inside)
        else:
            b_q = load_columns(q, row, rows, i_h, i_v, H, V, BC)
            b_o = scale * dot(b_W, b_q.to(WIDE), PRECISION) + b_b
            moved = dot(u.to(WIDE), load_columns(P, row, rows, i_h, i_t, H, BC, BC), PRECISION)
            if token_scale is not None:
                moved *= load_rows(token_scale, row, rows, i_h, H, BC)[None, :]
            b_o -= moved
            if initial is not None:
                if i == 0:
                    b_o += load_columns(o, row, rows, i_h, i_v, H, V, BC)
            store_columns(o, b_o, row, rows, i_h, i_v, H, V, BC)
        if final is not None:
            if not complete:  # what is left in W is acc
                store_model(final, W, b, 2 * i_nh, i_v, V)
                W = tl.zeros([BV, BV], tl.float32)
                b = tl.zeros([BV], tl.float32)
                step = tl.full([], -1, tl.float32)
                unfinished = 1
        if initial is not None:
            if i == 0:
                A, a = load_model(initial, 2 * i_nh + 1, i_v, V)
                W -= step * A
                b -= step * a
        u *= step
        W -= dot(u.to(WIDE), tl.trans(b_k).to(WIDE), PRECISION)
        b -= tl.sum(u, 1)
    if final is not None:
        store_model(final, W, b, 2 * i_nh + unfinished, i_v, V)
        if initial is not None:
            if count == 0:
                A, a = load_model(initial, 2 * i_nh + 1, i_v, V)
                store_model(final, A, a, 2 * i_nh + 1, i_v, V)


@kernel
def ttt_prepare_back(
    q, k, v, eta, token_scale, weight, bias, table, P, states, biases, do, x, y, vectors, pull, dq, dk, dscale, scale,
    eps, H: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """What of the backward needs no gradient of the memory, all mini-batches in parallel: x, y [tokens, H, V] and, as
    vectors [tokens, H, 3], r, <e> and <x e> of the legend; pull = P^T (s do), dq, and the parts of dk [tokens, H, V]
    and of dscale [tokens, H] (unless None) that come from o."""
    i_s, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    row, rows = slot_rows(table, i_s)
    if rows <= 0:
        return
    i_v, i_t = tl.arange(0, BV), tl.arange(0, BC)
    inside = i_v < V
    i_s = tl.cast(i_s, tl.int64) * H + i_h
    b_weight, b_bias = load_head(weight, i_h, i_v, V), load_head(bias, i_h, i_v, V)
    # [BV, BV]
    b_W = load_state(states, i_s, i_v, i_v, V, V)
    # [BV, BC]
    b_k = load_columns(k, row, rows, i_h, i_v, H, V, BC)
    b_q = load_columns(q, row, rows, i_h, i_v, H, V, BC)
    z = dot(b_W, b_k.to(WIDE), PRECISION) + tl.load(biases + i_s * V + i_v, mask=inside, other=0)[:, None]
    b_x, b_r = normalize(z, rows, inside, eps, V)
    target = load_columns(v, row, rows, i_h, i_v, H, V, BC).to(tl.float32) - b_k.to(tl.float32)
    b_y = b_weight * b_x + b_bias - target
    b_e = b_weight * b_y
    grad, e_x = project(b_x, b_e, inside, V)
    store_columns(x, b_x, row, rows, i_h, i_v, H, V, BC)
    store_columns(y, b_y, row, rows, i_h, i_v, H, V, BC)
    store_rows(vectors, tl.sum(b_r, 0), row, rows, 3 * i_h, 3 * H, BC)
    store_rows(vectors, tl.sum(b_e, 0) / V, row, rows, 3 * i_h + 1, 3 * H, BC)
    store_rows(vectors, tl.sum(e_x, 0), row, rows, 3 * i_h + 2, 3 * H, BC)
    b_u = (load_rows(eta, row, rows, i_h, H, BC)[None, :] * b_r * grad).to(WIDE)
    b_do = load_columns(do, row, rows, i_h, i_v, H, V, BC)
    b_s = b_do.to(WIDE)
    if token_scale is not None:
        b_s = (b_do * load_rows(token_scale, row, rows, i_h, H, BC)[None, :]).to(WIDE)
    b_P = load_columns(P, row, rows, i_h, i_t, H, BC, BC)
    store_columns(pull, dot(b_s, tl.trans(b_P), PRECISION), row, rows, i_h, i_v, H, V, BC)
    if token_scale is not None:
        store_rows(dscale, -tl.sum(dot(b_u, b_P, PRECISION) * b_do, 0), row, rows, i_h, H, BC)
    # [BC, BC] and [BC, BV]: not upright, so that no product takes the transpose of another one (see gradients.py)
    dP = tl.where(i_t[:, None] >= i_t[None, :], -scale * dot(tl.trans(b_s), b_u, PRECISION), 0).to(b_k.dtype)
    store_columns(dk, dot(b_q, dP, PRECISION), row, rows, i_h, i_v, H, V, BC)
    b_dq = dot(dP, tl.trans(b_k), PRECISION) + scale * dot(tl.trans(b_do).to(WIDE), b_W, PRECISION)
    store_tile(dq, b_dq, row, rows, i_h, i_v, H, V, BC)


@kernel
def ttt_backward(
    q, k, eta, token_scale, weight, offset, x, y, vectors, pull, do, dfinal, dz, du, dstates, dbiases, dinitial,
    cu_seqlens, scale, T, H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes dz and du, the gradients of z and u, [tokens, H, V], and M: dstates [slots, H, V, V], transposed, and
    dbiases [slots, H, V]. dinitial (unless None) gets the gradient of W, and of A where there are no tokens. dfinal
    may be None.

    M is the gradient of the memory behind a mini-batch, and behind an unfinished last one that of acc.
    """
    i_nh = tl.program_id(0)
    i_n, i_h = i_nh // H, i_nh % H
    i_v = tl.arange(0, BV)
    inside = i_v < V
    first, length, past, count, slot = walk(cu_seqlens, offset, i_n, T, C)
    b_weight = load_head(weight, i_h, i_v, V)
    M = tl.zeros([BV, BV], tl.float32)
    b_m = tl.zeros([BV], tl.float32)
    if dfinal is not None:
        M, b_m = load_model(dfinal, 2 * i_nh + tl.where((count > 0) & (count * C == length + past), 0, 1), i_v, V)
        if count == 0:
            if dinitial is not None:
                store_model(dinitial, M, b_m, 2 * i_nh + 1, i_v, V)
            M, b_m = load_model(dfinal, 2 * i_nh, i_v, V)
    for j in range(0, count):
        i = count - 1 - j
        row, rows, complete = mini_batch_rows(i, first, length, past, C)
        # [1, BC]
        b_r = load_rows(vectors, row, rows, 3 * i_h, 3 * H, BC)[None, :]
        e_x = load_rows(vectors, row, rows, 3 * i_h + 2, 3 * H, BC)[None, :]
        b_eta = load_rows(eta, row, rows, i_h, H, BC)[None, :]
        # [BV, BC]
        b_k = load_columns(k, row, rows, i_h, i_v, H, V, BC)
        b_x = load_columns(x, row, rows, i_h, i_v, H, V, BC)
        b_e = b_weight * load_columns(y, row, rows, i_h, i_v, H, V, BC)
        b_M = M.to(WIDE)
        i_s = (slot + i) * H + i_h
        store_state(dstates, b_M, i_s, i_v, i_v, V, V)
        tl.store(dbiases + i_s * V + i_v, b_m, mask=inside)
        factor = share_of_acc(token_scale, complete, row, rows, i_h, H)
        b_du = factor * (dot(b_M, b_k.to(WIDE), PRECISION) + b_m[:, None])
        if dfinal is not None:
            if not complete:
                M, b_m = load_model(dfinal, 2 * i_nh, i_v, V)
        b_du -= load_columns(pull, row, rows, i_h, i_v, H, V, BC)
        store_columns(du, b_du, row, rows, i_h, i_v, H, V, BC)
        # through the gradient of the loss, whose own gradient is eta du
        h = b_r * b_eta * b_du
        de, h_x = project(b_x, h, inside, V)
        h_grad = b_r * tl.sum(de * b_e, 0)[None, :] / V  # <h grad>: the projection is symmetric
        dx, _ = project(b_x, b_weight * b_weight * de - h * e_x - b_e * h_x, inside, V)
        b_dz = b_r * dx - b_x * h_grad
        store_columns(dz, b_dz, row, rows, i_h, i_v, H, V, BC)
        b_q = load_columns(q, row, rows, i_h, i_v, H, V, BC)
        b_do = load_columns(do, row, rows, i_h, i_v, H, V, BC)
        M += dot(b_dz.to(WIDE), tl.trans(b_k).to(WIDE), PRECISION)
        M += dot((scale * b_do).to(b_do.dtype).to(WIDE), tl.trans(b_q).to(WIDE), PRECISION)
        b_m += tl.sum(b_dz + b_do, 1)
    if dinitial is not None:
        store_model(dinitial, M, b_m, 2 * i_nh, i_v, V)


@kernel
def ttt_finish_back(
    k, eta, token_scale, weight, table, states, x, y, vectors, dz, du, dstates, dbiases, dk_part, dk, dv, deta,
    dscale, dweight, dbias, H: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What follows from dz, du and M, all mini-batches in parallel: dv and, with dk_part, dk [tokens, H, V], deta
    [tokens, H], and dweight, dbias [slots, H, V], to be summed up (zeros before). Adds to dscale (unless None)."""
    i_s, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    row, rows = slot_rows(table, i_s)
    if rows <= 0:
        return
    i_v = tl.arange(0, BV)
    inside = i_v < V
    i_s = tl.cast(i_s, tl.int64) * H + i_h
    b_weight = load_head(weight, i_h, i_v, V)
    # [1, BC]
    b_r = load_rows(vectors, row, rows, 3 * i_h, 3 * H, BC)[None, :]
    e_mean = load_rows(vectors, row, rows, 3 * i_h + 1, 3 * H, BC)[None, :]
    e_x = load_rows(vectors, row, rows, 3 * i_h + 2, 3 * H, BC)[None, :]
    b_eta = load_rows(eta, row, rows, i_h, H, BC)[None, :]
    # [BV, BC]
    b_x = load_columns(x, row, rows, i_h, i_v, H, V, BC)
    b_y = load_columns(y, row, rows, i_h, i_v, H, V, BC)
    b_du = load_columns(du, row, rows, i_h, i_v, H, V, BC).to(tl.float32)
    grad = b_r * (b_weight * b_y - e_mean - b_x * e_x)
    store_rows(deta, tl.sum(b_du * grad, 0), row, rows, i_h, H, BC)
    de, _ = project(b_x, b_eta * b_r * b_du, inside, V)
    tl.store(dweight + i_s * V + i_v, tl.sum(de * (b_y + b_weight * b_x), 1), mask=inside)
    tl.store(dbias + i_s * V + i_v, tl.sum(b_weight * de, 1), mask=inside)
    de *= b_weight
    b_W = load_state(states, i_s, i_v, i_v, V, V)
    b_dk = load_columns(dk_part, row, rows, i_h, i_v, H, V, BC) + de
    b_dk += dot(tl.trans(b_W), load_columns(dz, row, rows, i_h, i_v, H, V, BC), PRECISION)
    complete = slot_complete(table, i_s // H)
    b_M = load_state(dstates, i_s, i_v, i_v, V, V)
    pulled = dot(tl.trans(b_M), (b_eta * grad).to(b_M.dtype), PRECISION)
    b_dk += share_of_acc(token_scale, complete, row, rows, i_h, H) * pulled
    if token_scale is not None:
        if complete:
            b_m = tl.load(dbiases + i_s * V + i_v, mask=inside, other=0)[:, None]
            along = tl.sum(pulled * load_columns(k, row, rows, i_h, i_v, H, V, BC) + b_m * (b_eta * grad))
            p_last = dscale + (row + rows - 1) * H + i_h
            tl.store(p_last, tl.load(p_last) - along)
    store_columns(dk, b_dk, row, rows, i_h, i_v, H, V, BC)
    store_columns(dv, -de, row, rows, i_h, i_v, H, V, BC)


@kernel
def ttt_acc_back(
    q, token_scale, initial, offset, do, dstates, dbiases, dq, dscale, dinitial, cu_seqlens, scale, T,
    H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What A, a of a given state take part in, a sequence's first mini-batch: adds to dq and dscale (unless None), and
    writes their gradient to dinitial."""
    i_nh = tl.program_id(0)
    i_n, i_h = i_nh // H, i_nh % H
    i_v, i_t = tl.arange(0, BV), tl.arange(0, BC)
    inside = i_v < V
    first, length, past, count, slot = walk(cu_seqlens, offset, i_n, T, C)
    if count == 0:
        return
    row, rows, complete = mini_batch_rows(0, first, length, past, C)
    factor = share_of_acc(token_scale, complete, row, rows, i_h, H)
    i_s = slot * H + i_h
    p_A = initial + tl.cast(2 * i_nh + 1, tl.int64) * (V + 1) * V
    p_dA = dinitial + tl.cast(2 * i_nh + 1, tl.int64) * (V + 1) * V
    b_a = tl.load(p_A + V * V + i_v, mask=inside, other=0).to(tl.float32)
    b_m = tl.load(dbiases + i_s * V + i_v, mask=inside, other=0)
    # [BC, BV]
    b_do = load_tile(do, row, rows, i_h, i_v, H, V, BC)
    b_ds = b_do.to(tl.float32)
    if token_scale is not None:
        b_ds *= load_rows(token_scale, row, rows, i_h, H, BC)[:, None]
    b_s = b_ds.to(WIDE)
    moved = tl.zeros([BC, BV], tl.float32) + b_a[None, :]
    along = b_m * b_a
    for i in range(0, V, BK):
        i_k = i + tl.arange(0, BK)
        # [BC, BK]
        b_q = load_tile(q, row, rows, i_h, i_k, H, V, BC)
        # [BK, BV]
        A = load_state(p_A, 0, i_k, i_v, V, V).to(tl.float32)
        M = tl.trans(load_state(dstates, i_s, i_v, i_k, V, V)).to(tl.float32)
        along += tl.sum(M * A, 0)
        moved += scale * dot(b_q.to(WIDE), A.to(WIDE), PRECISION)
        b_dq = load_tile(dq, row, rows, i_h, i_k, H, V, BC) - scale * dot(b_s, tl.trans(A.to(WIDE)), PRECISION)
        store_tile(dq, b_dq, row, rows, i_h, i_k, H, V, BC)
        dA = factor * M - scale * dot(tl.trans(b_q).to(WIDE), b_s, PRECISION)
        store_state(p_dA, dA, 0, i_k, i_v, V, V)
    tl.store(p_dA + V * V + i_v, factor * b_m - tl.sum(b_ds, 0), mask=inside)
    if token_scale is not None:
        b_dscale = load_rows(dscale, row, rows, i_h, H, BC) - tl.sum(moved * b_do, 1)
        b_dscale -= tl.where((i_t == rows - 1) & complete, tl.sum(along), 0)
        store_rows(dscale, b_dscale, row, rows, i_h, H, BC)
