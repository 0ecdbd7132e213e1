"""Which rows the mini-batches of a sequence hold. The first one is short where a sequence begins inside a mini-batch.

Their tiles stand upright, [channels, BC]: so few tokens make products that are all taller than wide, as those with the
memory are, and Triton, which spreads all products of a loop over the warps alike, spreads them along the channels.

A sequence's mini-batches have consecutive slots in what is stored a mini-batch. Where they begin is a bound of all
lengths before, found by arithmetic; slots that no mini-batch has hold no rows.
"""

import torch
import triton
import triton.language as tl

from .launch import configure, kernel, launch


def slot_table(B, T, cu_seqlens, offset, C, device):
    """int32 [slots, 4]: a mini-batch's first row, its number of rows (0 for none), the sequence that it begins or -1,
    and whether they complete it.

    cu_seqlens [N + 1] or None for B sequences of T rows each; offset [N] or None: rows of its first mini-batch that
    came before a sequence; C: rows of a mini-batch.
    """
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    table = torch.zeros(B * T // C + 2 * N, 4, dtype=torch.int32, device=device)
    options = configure("slot_table", 0, 0, device)
    launch(_slot_table, (N,), cu_seqlens, offset, table, T, C=C, **options)
    return table


@kernel
def _slot_table(cu_seqlens, offset, table, T, C: tl.constexpr, BN: tl.constexpr):
    i_n = tl.program_id(0)
    first, length, past, count, slot = walk(cu_seqlens, offset, i_n, T, C)
    for i in range(0, count, BN):
        i_m = i + tl.arange(0, BN)
        row, rows, complete = mini_batch_rows(i_m, first, length, past, C)
        entry = table + 4 * (slot + i_m)
        tl.store(entry, row.to(tl.int32), mask=i_m < count)
        tl.store(entry + 1, rows, mask=i_m < count)
        tl.store(entry + 2, tl.where(i_m == 0, i_n, -1), mask=i_m < count)
        tl.store(entry + 3, complete.to(tl.int32), mask=i_m < count)


@triton.jit
def walk(cu_seqlens, offset, i_n, T, C: tl.constexpr):
    """Sequence i_n: first row (int64), rows, how many of its first mini-batch came before, mini-batches, first slot."""
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + i_n).to(tl.int64)
        length = (tl.load(cu_seqlens + i_n + 1) - first).to(tl.int32)
    else:
        first = tl.cast(i_n, tl.int64) * T
        length = T
    past = 0
    if offset is not None:
        past = tl.load(offset + i_n).to(tl.int32)
    count = tl.where(length > 0, (length + past + C - 1) // C, 0)
    return first, length, past, count, first // C + 2 * i_n


@triton.jit
def mini_batch_rows(i, first, length, past, C: tl.constexpr):
    """First row and number of rows of a sequence's mini-batch i, and whether they complete it."""
    start = tl.maximum(i * C - past, 0)
    end = (i + 1) * C - past
    return first + start, tl.minimum(end, length) - start, end <= length


@triton.jit
def slot_rows(table, i_s):
    """First row (int64) and number of rows of a slot."""
    return tl.load(table + 4 * i_s).to(tl.int64), tl.load(table + 4 * i_s + 1)


@triton.jit
def slot_begins(table, i_s):
    """The sequence that a slot begins, or -1."""
    return tl.load(table + 4 * i_s + 2)


@triton.jit
def slot_complete(table, i_s):
    """Whether a slot's rows complete its mini-batch."""
    return tl.load(table + 4 * i_s + 3) != 0


@triton.jit
def load_rows(p, first, rows, i_h, H: tl.constexpr, BC: tl.constexpr):
    """[BC] of x [tokens, H] in float32; 0 outside."""
    i_t = tl.arange(0, BC)
    return tl.load(p + (first + i_t) * H + i_h, mask=i_t < rows, other=0).to(tl.float32)


@triton.jit
def store_rows(p, x, first, rows, i_h, H: tl.constexpr, BC: tl.constexpr):
    i_t = tl.arange(0, BC)
    tl.store(p + (first + i_t) * H + i_h, x, mask=i_t < rows)


@triton.jit
def load_columns(p, first, rows, i_h, i_d, H: tl.constexpr, D: tl.constexpr, BC: tl.constexpr):
    """The tile [len(i_d), BC] of x [tokens, H, D]: channels i_d of head i_h, the mini-batch's rows; 0 outside."""
    i_t = tl.arange(0, BC)
    p_x = p + i_d[:, None] + ((first + i_t) * H + i_h)[None, :] * D
    return tl.load(p_x, mask=(i_d < D)[:, None] & (i_t < rows)[None, :], other=0)


@triton.jit
def store_columns(p, x, first, rows, i_h, i_d, H: tl.constexpr, D: tl.constexpr, BC: tl.constexpr):
    i_t = tl.arange(0, BC)
    p_x = p + i_d[:, None] + ((first + i_t) * H + i_h)[None, :] * D
    tl.store(p_x, x.to(p.dtype.element_ty), mask=(i_d < D)[:, None] & (i_t < rows)[None, :])
