"""Which tokens a chunk holds. Lengths of packed sequences stay on the device: the number of chunks is a bound."""

import torch
import triton
import triton.language as tl

from ..sequences import remembered
from .launch import configure, kernel, launch


class Chunks:
    """Chunks of C tokens of dense [B, T] or packed sequences; a sequence's last chunk may be shorter.

    Kernels take `table` and `starts`: None for dense sequences, whose chunks are found by arithmetic; else int32
    [count, 2] with every chunk's first row and number of rows (0 for chunks beyond the last), and int32 [N + 1] with
    every sequence's first chunk.
    """

    def __init__(self, B, T, cu_seqlens, C):
        self.C, self.T, self.cu_seqlens, self.table, self.starts = C, T, cu_seqlens, None, None
        if cu_seqlens is None:
            self.N, self.per_sequence = B, triton.cdiv(T, C)
            self.count = B * self.per_sequence
        else:
            self.N, self.per_sequence = len(cu_seqlens) - 1, 0
            self.count = T // C + self.N
            self.table, self.starts = remembered(cu_seqlens, ("chunks", T, C), self._tables)

    def _tables(self):
        cu_seqlens = self.cu_seqlens
        table, starts = cu_seqlens.new_empty(self.count, 2), torch.empty_like(cu_seqlens)
        options = configure("chunk_table", 0, 0, cu_seqlens.device)
        launch(_chunk_table, (self.N + 1,), cu_seqlens, table, starts, self.count, self.N, C=self.C, **options)
        return table, starts


@kernel
def _chunk_table(cu_seqlens, table, starts, NC, N, C: tl.constexpr, BN: tl.constexpr):
    """Program n writes sequence n's chunks; program N fills the rest of the table."""
    i_n = tl.program_id(0)
    start = 0
    for i in range(0, i_n, BN):
        i_s = i + tl.arange(0, BN)
        lengths = tl.load(cu_seqlens + i_s + 1, mask=i_s < i_n, other=0)
        lengths -= tl.load(cu_seqlens + i_s, mask=i_s < i_n, other=0)
        start += tl.sum((lengths + C - 1) // C)
    tl.store(starts + i_n, start)
    first, rows = 0, 0
    count = NC - start
    if i_n < N:
        first = tl.load(cu_seqlens + i_n)
        rows = tl.load(cu_seqlens + i_n + 1) - first
        count = tl.cdiv(rows, C)
    for i in range(0, count, BN):
        i_c = i + tl.arange(0, BN)
        entry = table + 2 * (start + i_c)
        tl.store(entry, first + i_c * C, mask=i_c < count)
        tl.store(entry + 1, tl.maximum(tl.minimum(rows - i_c * C, C), 0), mask=i_c < count)


@triton.jit
def chunk_rows(table, i_c, T, NC, C: tl.constexpr):
    """First row (int64) and number of rows of chunk i_c; dense sequences of T tokens have NC chunks each."""
    if table is not None:
        first = tl.load(table + 2 * i_c).to(tl.int64)
        rows = tl.load(table + 2 * i_c + 1)
    else:
        i_t = (i_c % NC) * C
        first = tl.cast(i_c // NC, tl.int64) * T + i_t
        rows = tl.minimum(T - i_t, C)
    return first, rows


@triton.jit
def sequence_rows(cu_seqlens, starts, i_n, T, NC):
    """First row (int64), number of rows and first chunk of sequence i_n."""
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + i_n).to(tl.int64)
        rows = (tl.load(cu_seqlens + i_n + 1) - first).to(tl.int32)
        chunk = tl.load(starts + i_n)
    else:
        first = tl.cast(i_n, tl.int64) * T
        rows = T
        chunk = i_n * NC
    return first, rows, chunk
