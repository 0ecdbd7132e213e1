"""Decays inside a chunk of C tokens. Only sums of log decays between two tokens are exponentiated, all of them <= 0.

DECAY is NONE, CONSTANT (g [HV]), SCALAR (g [T, HV]) or CHANNEL (g [T, HV, K]).
"""

import triton
import triton.language as tl

NONE, CONSTANT, SCALAR, CHANNEL = (tl.constexpr(i) for i in range(4))


@triton.jit
def scalar_decay(g, first, rows, i_h, HV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr):
    """Decay between tokens [C, C] (symmetric), from the start [C], to the end [C], and whole."""
    i_t = tl.arange(0, C)
    if DECAY == NONE:
        between, start, end = tl.full([C, C], 1, tl.float32), tl.full([C], 1, tl.float32), tl.full([C], 1, tl.float32)
        left = tl.full([], 1, tl.float32)
    else:
        if DECAY == CONSTANT:
            b_g = tl.where(i_t < rows, tl.load(g + i_h).to(tl.float64), 0)
        else:
            b_g = tl.load(g + (first + i_t) * HV + i_h, mask=i_t < rows, other=0).to(tl.float64)
        b_g = tl.maximum(b_g, -1e4)  # as good as -inf, whose differences are not numbers
        # float64, then two float32: where strong and weak decays meet, small differences of large sums must survive
        running = tl.cumsum(b_g, 0)
        whole = tl.sum(b_g, 0)
        high = running.to(tl.float32)
        low = (running - high.to(tl.float64)).to(tl.float32)
        between = tl.exp(-tl.abs((high[:, None] - high[None, :]) + (low[:, None] - low[None, :])))
        start, end, left = tl.exp(high), tl.exp((whole - running).to(tl.float32)), tl.exp(whole.to(tl.float32))
    return between, start, end, left


@triton.jit
def widen_blocks(down, up, h):
    """From sums inside blocks of h tokens to sums inside blocks of 2h.

    down [C, D]: log decay of a token from its block's start, itself included; up [C, D]: from behind it to its block's
    end.
    """
    C: tl.constexpr = down.shape[0]
    i_t = tl.arange(0, C)
    start = i_t // (2 * h) * 2 * h
    second = (i_t // h % 2 == 1)[:, None]
    left = tl.gather(down, tl.broadcast_to((start + h - 1)[:, None], down.shape), 0)
    right = tl.gather(down, tl.broadcast_to((start + 2 * h - 1)[:, None], down.shape), 0)
    return down + tl.where(second, left, 0), up + tl.where(second, 0, right)


@triton.jit
def last_row(x):
    """x [C, D] -> [D]."""
    C: tl.constexpr = x.shape[0]
    return tl.sum(tl.where((tl.arange(0, C) == C - 1)[:, None], x, 0), 0)


@triton.jit
def level(C: tl.constexpr, h, ROW: tl.constexpr = 1):
    """[C, C]: the pairs of a block of 2h tokens whose row is in its second half and whose column is in its first, or
    with ROW = 0 the reverse."""
    i_t = tl.arange(0, C)
    same = (i_t // (2 * h))[:, None] == (i_t // (2 * h))[None, :]
    return same & (i_t // h % 2 == ROW)[:, None] & (i_t // h % 2 == 1 - ROW)[None, :]
