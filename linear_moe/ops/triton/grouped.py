"""One linear map for each group of consecutive rows, which gathers its rows itself: x[token] is never written."""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .launch import configure, kernel, launch, precision


def grouped_linear(x, weight, offsets, token=None, row=None):
    """Row r of group m becomes ``x[token[r]] @ weight[m].T``, or ``x[r] @ weight[m].T`` without token.

    x [tokens, D] and weight [G, E, D] of one dtype, bfloat16, float16 or float32; offsets int32 [G], the END of every
    group's rows, the last one R; token int64 [R], row -> token, and its inverse row int64 [tokens, J], token -> its
    rows. Returns [R, E] in that dtype; products are summed in float32. Nothing is checked here: see api.grouped_linear.
    """
    return _GroupedLinear.apply(x, weight, offsets, token, row)


class _GroupedLinear(torch.autograd.Function):
    """Saves x if the weight needs a gradient, the weight if x does, and the maps; rows are gathered again."""

    @staticmethod
    def forward(ctx, x, weight, offsets, token, row):
        x, weight = x.contiguous(), weight.contiguous()
        for_x, for_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None, offsets, token, row)
        return _multiply(x, weight, offsets, token, transposed=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, offsets, token, row = ctx.saved_tensors
        dy, dx, dweight = dy.contiguous(), None, None
        if weight is not None:
            dx = _multiply(dy, weight, offsets, None, transposed=True)
            dx = dx if row is None else _sum_rows(dx, row)
        if x is not None:
            dweight = _weight_gradient(x, dy, offsets, token)
        return dx, dweight, None, None, None


def _options(name, x, weight_shape):
    """The tuned options of a product in x's dtype.

    Tiles are small for float32, which takes twice the registers and shared memory, and for rows that are no multiple
    of 16 bytes, which cannot be copied to shared memory past the registers.
    """
    aligned = all(width * x.element_size() % 16 == 0 for width in weight_shape[1:])
    name = name if aligned and x.dtype != torch.float32 else f"{name}_small"
    return {"PRECISION": precision(torch.float32, x.device), **configure(name, 0, 0, x.device)}


def _multiply(x, weight, offsets, token, *, transposed):
    """Rows of x (or x[token]) times weight[m].T, or times weight[m] if transposed: [R, E] or [R, D]."""
    G, E, D = weight.shape
    R = len(x) if token is None else len(token)
    IN, OUT, S_IN, S_OUT = (E, D, D, 1) if transposed else (D, E, 1, D)
    options = _options("grouped_rows", x, weight.shape)
    tiles = R // options["BM"] + G  # a bound: every group may end in a tile that is not full
    y = x.new_empty(R, OUT)
    grid = (tiles * triton.cdiv(OUT, options["BN"]),)
    fixed = {"G": G, "IN": IN, "OUT": OUT, "S_IN": S_IN, "S_OUT": S_OUT, "GP": triton.next_power_of_2(G)}
    launch(_grouped_rows, grid, x, weight, y, offsets, token, tiles, **fixed, **options)
    return y


def _weight_gradient(x, dy, offsets, token):
    """dy.T @ x[token] of every group: [G, E, D]."""
    G, E, D = len(offsets), dy.shape[1], x.shape[1]
    options = _options("grouped_weight", x, (G, E, D))
    dweight = x.new_empty(G, E, D)
    grid = (G * triton.cdiv(E, options["BE"]) * triton.cdiv(D, options["BD"]),)
    launch(_grouped_weight, grid, x, dy, dweight, offsets, token, G=G, E=E, D=D, **options)
    return dweight


def _sum_rows(x, row):
    """Every token's rows, added in the order of `row` [tokens, J] in float32: x [R, D] -> [tokens, D]."""
    (T, J), D = row.shape, x.shape[1]
    options = configure("sum_rows", 0, 0, x.device)
    y = x.new_empty(T, D)
    grid = (triton.cdiv(T, options["BT"]) * triton.cdiv(D, options["BD"]),)
    launch(_sum, grid, x, row.contiguous(), y, T, J=J, D=D, **options)
    return y


@triton.jit
def _below(o, size: tl.constexpr, tile: tl.constexpr):
    """The mask o < size, which costs nothing where tiles divide the size."""
    if size % tile == 0:
        return tl.full(o.shape, 1, tl.int1)
    else:
        return o < size


@triton.jit
def _tile_of_rows(p_offsets, i_tile, G: tl.constexpr, GP: tl.constexpr, BM: tl.constexpr):
    """The group of a tile of rows, the tile's first row and the group's end; an empty range beyond the last tile."""
    o_g = tl.arange(0, GP)
    # [GP]
    b_end = tl.load(p_offsets + o_g, mask=o_g < G, other=0)
    b_start = tl.load(p_offsets + o_g - 1, mask=(o_g > 0) & (o_g < G), other=0)
    b_tiles = (b_end - b_start + BM - 1) // BM
    b_last = tl.cumsum(b_tiles, 0)
    i_g = tl.sum((b_last <= i_tile).to(tl.int32))
    b_first = b_start + (i_tile - b_last + b_tiles) * BM
    return i_g, tl.sum(tl.where(o_g == i_g, b_first, 0)), tl.sum(tl.where(o_g == i_g, b_end, 0))


@triton.jit
def _sources(p_token, o_r, m_r):
    """The rows of x that rows o_r read, int64; row 0 for those that are masked."""
    if p_token is None:
        return tl.where(m_r, o_r, 0).to(tl.int64)
    else:
        return tl.load(p_token + o_r, mask=m_r, other=0)


@kernel
def _grouped_rows(
    p_x, p_w, p_y, p_offsets, p_token, NB,
    G: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, S_IN: tl.constexpr, S_OUT: tl.constexpr, GP: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """y[r] = x[token[r]] @ w[m] for BM rows of one group and BN of OUT columns; w[m] [IN, OUT] with given strides."""
    # Programs that run together share the x of BAND tiles of rows and a few tiles of the weight: both stay in L2.
    band: tl.constexpr = BAND * ((OUT + BN - 1) // BN)
    pid = tl.program_id(0)
    first = pid // band * BAND
    size = tl.minimum(NB - first, BAND)
    i_n = pid % band // size
    i_g, start, end = _tile_of_rows(p_offsets, first + pid % band % size, G, GP, BM)
    if start >= end:
        return
    o_r, o_n, o_k = start + tl.arange(0, BM), i_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    m_r, m_n = o_r < end, _below(o_n, OUT, BN)
    p_x += _sources(p_token, o_r, m_r)[:, None] * IN + o_k[None, :]
    p_w += i_g.to(tl.int64) * IN * OUT + o_k[:, None] * S_IN + o_n[None, :] * S_OUT
    b_y = tl.zeros([BM, BN], tl.float32)
    for i_k in range(0, IN, BK):
        m_k = _below(i_k + o_k, IN, BK)
        # [BM, BK]; rows beyond the end read row 0, and are not stored
        b_x = tl.load(p_x, mask=m_k[None, :], other=0)
        # [BK, BN]
        b_w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0)
        b_y = tl.dot(b_x, b_w, b_y, input_precision=PRECISION)
        p_x += BK
        p_w += BK * S_IN
    p_y += o_r[:, None].to(tl.int64) * OUT + o_n[None, :]
    tl.store(p_y, b_y.to(p_y.dtype.element_ty), mask=m_r[:, None] & m_n[None, :])


@kernel
def _grouped_weight(
    p_x, p_dy, p_dw, p_offsets, p_token,
    G: tl.constexpr, E: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BE: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dw[m] = dy.T @ x[token] over the rows of group m, for BE x BD of it."""
    ND: tl.constexpr = (D + BD - 1) // BD
    tiles: tl.constexpr = ((E + BE - 1) // BE) * ND
    pid = tl.program_id(0)
    i_g = G - 1 - pid // tiles  # the last group, MoM's shared memory, is the longest: it starts first
    start = tl.load(p_offsets + i_g - 1, mask=i_g > 0, other=0)
    end = tl.load(p_offsets + i_g)
    o_e, o_d = pid % tiles // ND * BE + tl.arange(0, BE), pid % ND * BD + tl.arange(0, BD)
    m_e, m_d = _below(o_e, E, BE), _below(o_d, D, BD)
    b_dw = tl.zeros([BE, BD], tl.float32)
    o_r = start + tl.arange(0, BR)
    b_source = _sources(p_token, o_r, o_r < end)
    for i_r in range(start, end, BR):
        o_r = i_r + tl.arange(0, BR)
        m_r = o_r < end
        # [BE, BR]
        b_dy = tl.load(p_dy + o_r[None, :].to(tl.int64) * E + o_e[:, None], mask=m_r[None, :] & m_e[:, None], other=0)
        # [BR, BD]; masked too: a row that is not the group's may hold a NaN
        b_x = tl.load(p_x + b_source[:, None] * D + o_d[None, :], mask=m_r[:, None] & m_d[None, :], other=0)
        b_source = _sources(p_token, o_r + BR, o_r + BR < end)  # of the next turn: x does not wait for its addresses
        b_dw = tl.dot(b_dy, b_x, b_dw, input_precision=PRECISION)
    p_dw += (i_g.to(tl.int64) * E + o_e[:, None]) * D + o_d[None, :]
    tl.store(p_dw, b_dw.to(p_dw.dtype.element_ty), mask=m_e[:, None] & m_d[None, :])


@kernel
def _sum(p_x, p_row, p_y, T, J: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """y[t] = sum_j x[row[t, j]] for BT tokens and BD channels."""
    ND: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    o_t, o_d = (pid // ND * BT + tl.arange(0, BT)).to(tl.int64), pid % ND * BD + tl.arange(0, BD)
    m_t, m_d = o_t < T, _below(o_d, D, BD)
    b_y = tl.zeros([BT, BD], tl.float32)
    for j in tl.static_range(J):
        b_row = tl.load(p_row + o_t * J + j, mask=m_t, other=0)
        # [BT, BD]
        b_x = tl.load(p_x + b_row[:, None] * D + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0)
        b_y += b_x.to(tl.float32)
    p_y += o_t[:, None] * D + o_d[None, :]
    tl.store(p_y, b_y.to(p_y.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])
