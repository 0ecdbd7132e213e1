"""What a chunk's tokens have to do with each other, all chunks in parallel, before any state is known.

With M the strict triangle of k_i.k_j e^(G_i - G_j) and b the delta rule's beta, P = M (I + diag(b) M)^-1 turns the
values z = v - (k e^G) S_0 into the rule's writes: r = z - P (b z), v' = b r (the WY form of arXiv 2406.06484, kept
beta-free so that nothing is ever divided by beta and the identity in (I + M b)^-1 = I - P b is never rounded).
"""

import triton
import triton.language as tl

from .chunks import chunk_rows
from .decay import NONE, last_row, level, scalar_decay, widen_blocks
from .launch import kernel


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_tile(p, first, rows, i_h, i_d, HEADS: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """The tile [C, len(i_d)] of x [tokens, HEADS, D]: the chunk's rows, channels i_d of head i_h; 0 outside."""
    i_t = tl.arange(0, C)
    p_x = p + ((first + i_t) * HEADS + i_h)[:, None] * D + i_d[None, :]
    return tl.load(p_x, mask=(i_t < rows)[:, None] & (i_d < D)[None, :], other=0)


@triton.jit
def store_tile(p, x, first, rows, i_h, i_d, HEADS: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    i_t = tl.arange(0, C)
    p_x = p + ((first + i_t) * HEADS + i_h)[:, None] * D + i_d[None, :]
    tl.store(p_x, x.to(p.dtype.element_ty), mask=(i_t < rows)[:, None] & (i_d < D)[None, :])


@triton.jit
def solve(M, b, PRECISION: tl.constexpr):
    """P = (I + M diag(b))^-1 M for M [C, C] strictly lower triangular: blocks of 16 by substitution, then halves."""
    C: tl.constexpr = M.shape[0]
    NB: tl.constexpr = C // 16
    i_b = tl.arange(0, NB)
    i_r = tl.arange(0, 16)
    N = M * b[None, :]
    own = (i_b[:, None] == i_b[None, :])[:, None, :, None]
    blocks = tl.sum(tl.where(own, tl.reshape(N, [NB, 16, NB, 16]), 0), 2)
    row, column = i_r[None, :, None], i_r[None, None, :]
    X = (row == column).to(tl.float32) + tl.zeros([NB, 16, 16], tl.float32)
    for i in tl.static_range(1, 16):
        factors = tl.sum(tl.where(row == i, blocks, 0), 1)  # [NB, 16]: row i
        update = tl.sum(factors[:, :, None] * X, 1)
        X -= tl.where(row == i, update[:, None, :], 0)
    X = tl.reshape(tl.where(own, X[:, :, None, :], 0), [C, C])
    # the inverse of [[A, 0], [B, D]] is that of its diagonal, X, minus X [[0, 0], [B, 0]] X
    for n in tl.static_range(4, 8):
        if 2**n < C:
            X -= dot(dot(X, tl.where(level(C, 2**n), N, 0), PRECISION), X, PRECISION)
    return dot(X, M, PRECISION)


@kernel
def prepare_heads(
    q, k, beta, g, A, P, from_start, to_end, whole, table, T, NC, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For no, a constant or a scalar decay: A [tokens, HV, C], the lower triangle of q_i.k_j e^(G_i - G_j) in a chunk;
    P (unless None) likewise; and with a decay e^G and e^(G_end - G) [tokens, HV] and e^G_end [chunks, HV]."""
    i_c, i_h = tl.program_id(0) // HV, tl.program_id(0) % HV
    first, rows = chunk_rows(table, i_c, T, NC, C)
    if rows <= 0:
        return
    i_t = tl.arange(0, C)
    # [C, BK]
    b_q = load_tile(q, first, rows, i_h // (HV // H), tl.arange(0, BK), H, K, C)
    b_k = load_tile(k, first, rows, i_h // (HV // H), tl.arange(0, BK), H, K, C)
    between, b_start, b_end, b_whole = scalar_decay(g, first, rows, i_h, HV, C, DECAY)
    b_A = tl.where(i_t[:, None] >= i_t[None, :], dot(b_q, tl.trans(b_k), PRECISION) * between, 0)
    store_tile(A, b_A, first, rows, i_h, i_t, HV, C, C)
    if DECAY != NONE:
        i_r = (first + i_t) * HV + i_h
        tl.store(from_start + i_r, b_start, mask=i_t < rows)
        tl.store(to_end + i_r, b_end, mask=i_t < rows)
        tl.store(whole + i_c * HV + i_h, b_whole)
    if P is not None:
        b_beta = tl.load(beta + (first + i_t) * HV + i_h, mask=i_t < rows, other=0).to(tl.float32)
        M = tl.where(i_t[:, None] > i_t[None, :], dot(b_k, tl.trans(b_k), PRECISION) * between, 0)
        store_tile(P, solve(M, b_beta, PRECISION), first, rows, i_h, i_t, HV, C, C)


@kernel
def prepare_channels(
    q, k, beta, g, A, P, q_start, k_start, k_end, whole, table, T, NC, H: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For a decay a channel: A and P as in prepare_heads, and the decayed operands q e^G, k e^G (unless None) and
    k e^(G_end - G) [tokens, HV, K] and e^G_end [chunks, HV, K].

    Halves of halves: at a level of h tokens, rows of a block's second half meet columns of its first, both decayed
    towards the border between them. A loop, not unrolled: six levels' masks at once do not fit the registers.
    """
    i_c, i_h = tl.program_id(0) // HV, tl.program_id(0) % HV
    first, rows = chunk_rows(table, i_c, T, NC, C)
    if rows <= 0:
        return
    i_t = tl.arange(0, C)
    scores = tl.zeros([C, C], tl.float32)
    keys = tl.zeros([C, C], tl.float32)
    for i_k in range(0, K, BK):
        i_d = i_k + tl.arange(0, BK)
        # [C, BK]
        b_q = load_tile(q, first, rows, i_h // (HV // H), i_d, H, K, C)
        b_k = load_tile(k, first, rows, i_h // (HV // H), i_d, H, K, C)
        down = tl.maximum(load_tile(g, first, rows, i_h, i_d, HV, K, C).to(tl.float32), -1e4)
        up = tl.zeros_like(down)
        itself = tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32), 1)
        scores += tl.where(i_t[:, None] == i_t[None, :], itself[:, None], 0)
        for n in range(LEVELS):
            pairs = level(C, 1 << n)
            b_down = tl.exp(down)
            right = tl.trans((b_k * tl.exp(up)).to(b_k.dtype))
            scores += tl.where(pairs, dot((b_q * b_down).to(b_k.dtype), right, PRECISION), 0)
            if P is not None:
                keys += tl.where(pairs, dot((b_k * b_down).to(b_k.dtype), right, PRECISION), 0)
            down, up = widen_blocks(down, up, 1 << n)
        store_tile(q_start, b_q * tl.exp(down), first, rows, i_h, i_d, HV, K, C)
        store_tile(k_end, b_k * tl.exp(up), first, rows, i_h, i_d, HV, K, C)
        if k_start is not None:
            store_tile(k_start, b_k * tl.exp(down), first, rows, i_h, i_d, HV, K, C)
        p_whole = whole + (tl.cast(i_c, tl.int64) * HV + i_h) * K + i_d
        tl.store(p_whole, tl.exp(last_row(down)), mask=i_d < K)
    store_tile(A, scores, first, rows, i_h, i_t, HV, C, C)
    if P is not None:
        b_beta = tl.load(beta + (first + i_t) * HV + i_h, mask=i_t < rows, other=0).to(tl.float32)
        store_tile(P, solve(keys, b_beta, PRECISION), first, rows, i_h, i_t, HV, C, C)
