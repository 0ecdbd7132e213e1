"""Routes by counting, in two launches and without a sort: see linear_moe.ops.routing for what they are.

Rows are memory-major and keep the order of tokens, so a row is the first row of its memory plus the number of earlier
tokens that chose the memory. The first kernel counts choices per block of tokens; the second adds up the blocks before
its own and ranks the tokens within. Nothing here depends on a sequence's length: any number of blocks is summed.
"""

import torch
import triton
import triton.language as tl

from ..check import made_here
from ..routing import Routes
from .launch import configure, kernel, launch


def route(indices, weights, *, num_memories, shared, cu_seqlens=None):
    """Sorts tokens into buckets, stably: the arguments and results of linear_moe.ops.routing.route.

    Integers come from two kernels; the weights pass through differentiably.
    """
    (B, T, k), device = indices.shape, indices.device
    tokens, groups = B * T, num_memories + bool(shared)
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    weights = weights.reshape(tokens, k)
    if shared:
        weights = torch.cat([weights, weights.new_ones(tokens, 1)], 1)
    indices = indices.reshape(tokens, k)
    indices = indices if indices.stride(1) == 1 else indices.contiguous()
    token = torch.empty(tokens * (k + bool(shared)), dtype=torch.int64, device=device)
    row = torch.empty(tokens, k + bool(shared), dtype=torch.int64, device=device)
    cu = torch.empty(groups * N + 1, dtype=torch.int32, device=device)
    offsets = torch.empty(groups, dtype=torch.int32, device=device)
    made_here(cu, offsets)

    options = dict(configure("route", 0, 0, device))
    MP = triton.next_power_of_2(num_memories)
    BT = min(options.pop("BT"), options.pop("TILE") // MP)
    fixed = {"STRIDE": indices.stride(0), "k": k, "MP": MP, "BT": BT, **options}
    blocks = triton.cdiv(tokens, BT)
    counts = torch.empty(blocks, MP, dtype=torch.int32, device=device)
    launch(_count, (blocks,), indices, counts, B, T, **fixed)
    fixed |= {"M": num_memories, "SHARED": bool(shared)}
    launch(_place, (blocks + N + 1,), indices, counts, cu_seqlens, token, row, cu, offsets, B, T, N, blocks, **fixed)
    return Routes(token, row, weights, cu, offsets, groups)


@triton.jit
def _slots(p_indices, o_t, tokens, STRIDE: tl.constexpr, k: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr):
    """[MP, BT]: which of its choices a memory is to a token, -1 where the token did not choose it."""
    o_m = tl.arange(0, MP)
    b_slots = tl.full([MP, BT], -1, tl.int32)
    for j in tl.static_range(k):
        # [BT]
        b_choice = tl.load(p_indices + o_t.to(tl.int64) * STRIDE + j, mask=o_t < tokens, other=-1).to(tl.int32)
        b_slots = tl.where(b_choice[None, :] == o_m[:, None], j, b_slots)
    return b_slots


@kernel
def _count(p_indices, p_counts, B, T, STRIDE: tl.constexpr, k: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr):
    """Program i counts the choices of BT tokens: counts [blocks, MP]."""
    i_b, o_m = tl.program_id(0), tl.arange(0, MP)
    b_slots = _slots(p_indices, i_b * BT + tl.arange(0, BT), B * T, STRIDE, k, MP, BT)
    tl.store(p_counts + i_b.to(tl.int64) * MP + o_m, tl.sum((b_slots >= 0).to(tl.int32), 1))


@triton.jit
def _first_rows(p_counts, i_b, NB, MP: tl.constexpr, BT: tl.constexpr):
    """[MP]: for every memory the row of the first token of block i_b or later that chose it."""
    o_m = tl.arange(0, MP)
    b_before, b_total = tl.zeros([MP], tl.int32), tl.zeros([MP], tl.int32)
    for i in range(0, NB, BT):
        o_b = i + tl.arange(0, BT)
        # [BT, MP], as many blocks as a block has tokens
        b_counts = tl.load(p_counts + o_b[:, None].to(tl.int64) * MP + o_m[None, :], mask=o_b[:, None] < NB, other=0)
        b_before += tl.sum(tl.where(o_b[:, None] < i_b, b_counts, 0), 0)
        b_total += tl.sum(b_counts, 0)
    return tl.cumsum(b_total, 0) - b_total + b_before


@kernel
def _place(
    p_indices, p_counts, p_cu_seqlens, p_token, p_row, p_cu, p_offsets, B, T, N, NB,
    STRIDE: tl.constexpr, k: tl.constexpr, M: tl.constexpr, SHARED: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Program i < NB writes the rows of a block of tokens; program NB + n where sequence n's buckets start.

    The last one, n = N, starts where all tokens end, so it writes every memory's end.
    """
    i, tokens = tl.program_id(0), B * T
    start = i * BT
    if i >= NB:
        start = (i - NB) * T
        if p_cu_seqlens is not None:
            start = tl.load(p_cu_seqlens + i - NB)
    i_b = start // BT
    o_t, o_m = i_b * BT + tl.arange(0, BT), tl.arange(0, MP)
    b_slots = _slots(p_indices, o_t, tokens, STRIDE, k, MP, BT)
    b_first = _first_rows(p_counts, i_b, NB, MP, BT)
    b_chosen = (b_slots >= 0).to(tl.int32)
    if i < NB:
        p_mine = p_row + o_t.to(tl.int64) * (k + SHARED)
        b_rows = b_first[:, None] + tl.cumsum(b_chosen, 1) - b_chosen
        tl.store(p_mine[None, :] + b_slots, b_rows.to(tl.int64), mask=b_slots >= 0)
        tl.store(p_token + b_rows, tl.broadcast_to(o_t.to(tl.int64)[None, :], [MP, BT]), mask=b_slots >= 0)
        if SHARED:
            b_row, m_t = tokens * k + o_t, o_t < tokens
            tl.store(p_mine + k, b_row.to(tl.int64), mask=m_t)
            tl.store(p_token + b_row, o_t.to(tl.int64), mask=m_t)
    else:
        i_n = i - NB
        b_first += tl.sum(tl.where(o_t[None, :] < start, b_chosen, 0), 1)
        # one memory's end is the next one's start: both programs write it, and both write the same
        tl.store(p_cu + o_m * N + i_n, b_first, mask=o_m < M)
        if SHARED:
            tl.store(p_cu + M * N + i_n, tokens * k + start)
        if i_n == N:
            tl.store(p_offsets + o_m, b_first, mask=o_m < M)
            if SHARED:
                tl.store(p_offsets + M, tokens * k + tokens)
