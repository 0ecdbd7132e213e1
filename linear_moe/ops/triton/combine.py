"""The weighted sum of every token's rows, alone or with the output norm and gate of a mixer, fused.

Memory bound: every row is read once and, backward, its gradient written once, as it belongs to one token. Kept for
backward are the arguments; the combined and the normalised answer are computed again. A program holds whole tokens, so
the gradient of a token's weights needs nobody else; that of the norm's weight is summed from one partial a program.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .launch import configure, kernel, launch


def combine(rows, row, weights):
    """o[t] = sum_j weights[t, j] rows[row[t, j]]: rows [R, ...] -> [tokens, ...] in rows' dtype, summed in float32.

    row int64 and weights (any float dtype) [tokens, J]; every row belongs to exactly one token and j.
    Nothing is checked here: see api.combine.
    """
    o = _Combine.apply(rows.flatten(1).unsqueeze(1), row.contiguous(), weights.contiguous(), None, None, 0.0, None)
    return o.view(len(row), *rows.shape[1:])


def combine_norm(rows, row, weights, gate, norm_weight, *, eps, activation):
    """combine, then o rsqrt(mean(o^2) + eps) norm_weight per head, times act(gate): [tokens, HV, V] in rows' dtype.

    rows [R, HV, V]; row int64 and weights [tokens, J], or both None where rows are tokens; norm_weight [V]; gate None
    or [tokens, HV, V], a slice of a wider projection as it is; activation "silu" or "sigmoid". All in float32.
    Nothing is checked here: see api.gated_norm.
    """
    if row is not None:
        row, weights = row.contiguous(), weights.contiguous()
    return _Combine.apply(rows, row, weights, gate, norm_weight.contiguous(), eps, activation)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, row, weights, gate, norm_weight, eps, activation):
        ctx.save_for_backward(rows, row, weights, gate, norm_weight)
        ctx.options = eps, activation
        return forward(rows, row, weights, gate, norm_weight, eps, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        rows, row, weights, gate, norm_weight = ctx.saved_tensors
        need = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4)]
        drows, dweights, dgate, dnorm = _backward(rows, row, weights, gate, norm_weight, *ctx.options, do, need)
        return drows, None, dweights, dgate, dnorm, None, None


def _strided(gate):
    """gate and the distance of its tokens, copied only where the channels of a token do not lie side by side."""
    if gate is None:
        return None, 0
    tokens, HV, V = gate.shape
    if gate.stride(2) != 1 or (HV > 1 and gate.stride(1) != V):
        gate = gate.contiguous()
    return gate, gate.stride(0) if tokens > 1 else HV * V


def _arguments(name, rows, row, stride, norm_weight, eps, activation):
    """Number of tokens and the kernel's constants. Without a norm a token is one line, cut into blocks like heads."""
    HV, V = rows.shape[1:]
    options = dict(configure(name, min(V, 256), min(V, 256), rows.device))
    width = min(options.pop("BD"), triton.next_power_of_2(HV * V))
    HEAD = width if norm_weight is None else V
    BV = triton.next_power_of_2(HEAD)
    options |= {"HEAD": HEAD, "BV": BV, "BT": max(1, options.pop("TILE") // BV), "D": HV * V, "EPS": eps}
    options |= {"SG": stride, "SILU": activation == "silu", "J": 1 if row is None else row.shape[1]}
    return len(rows) if row is None else len(row), options


def forward(rows, row, weights, gate, norm_weight, eps, activation):
    """The output, outside autograd."""
    rows, (gate, stride) = rows.contiguous(), _strided(gate)
    T, options = _arguments("combine_forward", rows, row, stride, norm_weight, eps, activation)
    out = torch.empty(T, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    blocks = triton.cdiv(options["D"], options["HEAD"])
    grid = (triton.cdiv(T, options["BT"]) * blocks,)
    launch(_forward_kernel, grid, rows, row, weights, gate, norm_weight, out, T, **options)
    return out


def _backward(rows, row, weights, gate, norm_weight, eps, activation, do, need):
    """Gradients of rows, weights, gate and norm_weight; None for those that are not needed."""
    rows, (gate, stride) = rows.contiguous(), _strided(gate)
    T, options = _arguments("combine_backward", rows, row, stride, norm_weight, eps, activation)
    programs = triton.cdiv(T, options["BT"])
    new = {"device": rows.device}
    drows = torch.empty(rows.shape, dtype=rows.dtype, **new) if need[0] else None
    dweights = torch.empty(weights.shape, dtype=weights.dtype, **new) if need[1] else None
    dgate = torch.empty(gate.shape, dtype=gate.dtype, **new) if need[2] else None
    partial = torch.empty(programs, len(norm_weight), dtype=torch.float32, **new) if need[3] else None
    launch(
        _backward_kernel, (programs,), rows, row, weights, gate, norm_weight, do.contiguous(),
        drows, dweights, dgate, partial, T, **options,
    )  # fmt: skip
    return drows, dweights, dgate, partial.sum(0).to(norm_weight.dtype) if need[3] else None


@triton.jit
def _load_routes(row, weights, t, T, J: tl.constexpr):
    """J tiles [BT] each: the tokens' rows and their weights (the token itself and 1 without routes)."""
    where, share = (), ()
    for j in tl.static_range(J):
        if row is None:
            where += (t,)
            share += (tl.full(t.shape, 1.0, tl.float32),)
        else:
            where += (tl.load(row + t * J + j, mask=t < T, other=0),)
            share += (tl.load(weights + t * J + j, mask=t < T, other=0.0).to(tl.float32),)
    return where, share


@triton.jit
def _load_rows(rows, where, share, column, mask, J: tl.constexpr, D: tl.constexpr):
    """The J rows' tiles [BT, BV] and their weighted sum."""
    tiles = ()
    o = tl.zeros(mask.shape, tl.float32)
    for j in tl.static_range(J):
        # [BT, BV]
        b_rows = tl.load(rows + where[j][:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
        tiles += (b_rows,)
        o += share[j][:, None] * b_rows
    return tiles, o


@triton.jit
def _activate(gate, SILU: tl.constexpr):
    """act(gate) and its derivative."""
    sigmoid = tl.sigmoid(gate)
    if SILU:
        act = gate * sigmoid
        slope = sigmoid + act * (1.0 - sigmoid)
    else:
        act = sigmoid
        slope = sigmoid * (1.0 - sigmoid)
    return act, slope


@kernel
def _forward_kernel(rows, row, weights, gate, norm_weight, out, T, J: tl.constexpr, D: tl.constexpr,
                    HEAD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, SG: tl.constexpr, EPS: tl.constexpr,
                    SILU: tl.constexpr):  # fmt: skip
    blocks: tl.constexpr = (D + HEAD - 1) // HEAD
    t = (tl.program_id(0) // blocks).to(tl.int64) * BT + tl.arange(0, BT)
    lane = tl.arange(0, BV)
    column = tl.program_id(0) % blocks * HEAD + lane
    mask = (t < T)[:, None] & ((lane < HEAD) & (column < D))[None, :]
    where, share = _load_routes(row, weights, t, T, J)
    _, y = _load_rows(rows, where, share, column, mask, J, D)
    if norm_weight is not None:
        b_norm = tl.load(norm_weight + lane, mask=lane < HEAD, other=0.0).to(tl.float32)
        y *= tl.rsqrt(tl.sum(y * y, 1) / HEAD + EPS)[:, None] * b_norm[None, :]
    if gate is not None:
        # [BT, BV]
        b_gate = tl.load(gate + t[:, None] * SG + column[None, :], mask=mask, other=0.0).to(tl.float32)
        act, _ = _activate(b_gate, SILU)
        y *= act
    tl.store(out + t[:, None] * D + column[None, :], y.to(out.dtype.element_ty), mask=mask)


@kernel
def _backward_kernel(rows, row, weights, gate, norm_weight, do, drows, dweights, dgate, dnorm, T, J: tl.constexpr,
                     D: tl.constexpr, HEAD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, SG: tl.constexpr,
                     EPS: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    lane = tl.arange(0, BV)
    where, share = _load_routes(row, weights, t, T, J)
    b_dshare = ()
    for _ in tl.static_range(J):
        b_dshare += (tl.zeros([BT, BV], tl.float32),)
    b_dnorm = tl.zeros([BT, BV], tl.float32)
    if norm_weight is not None:
        b_norm = tl.load(norm_weight + lane, mask=lane < HEAD, other=0.0).to(tl.float32)
    for head in range((D + HEAD - 1) // HEAD):
        column = head * HEAD + lane
        mask = (t < T)[:, None] & ((lane < HEAD) & (column < D))[None, :]
        tiles, n = _load_rows(rows, where, share, column, mask, J, D)
        # [BT, BV]
        b_do = tl.load(do + t[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if norm_weight is not None:
            # tokens that are not there are in b_dnorm's sum: without eps their norm would make it 0 * inf
            scale = tl.where(t < T, tl.rsqrt(tl.sum(n * n, 1) / HEAD + EPS), 0)
            n *= scale[:, None]
        if gate is not None:
            # [BT, BV]
            b_gate = tl.load(gate + t[:, None] * SG + column[None, :], mask=mask, other=0.0).to(tl.float32)
            act, slope = _activate(b_gate, SILU)
            if dgate is not None:
                b_dgate = b_do * n * b_norm[None, :] * slope
                tl.store(dgate + t[:, None] * D + column[None, :], b_dgate.to(dgate.dtype.element_ty), mask=mask)
            b_do *= act
        if norm_weight is not None:
            b_dnorm += b_do * n
            b_do *= b_norm[None, :]
            b_do = scale[:, None] * (b_do - n * (tl.sum(b_do * n, 1) / HEAD)[:, None])
        if drows is not None:
            for j in tl.static_range(J):
                b_drows = (share[j][:, None] * b_do).to(drows.dtype.element_ty)
                tl.store(drows + where[j][:, None] * D + column[None, :], b_drows, mask=mask)
        if dweights is not None:
            sums = ()
            for j in tl.static_range(J):
                sums += (b_dshare[j] + tiles[j] * b_do,)
            b_dshare = sums
    if dweights is not None:
        for j in tl.static_range(J):
            b_dweights = tl.sum(b_dshare[j], 1).to(dweights.dtype.element_ty)
            tl.store(dweights + t * J + j, b_dweights, mask=t < T)
    if dnorm is not None:
        p_dnorm = dnorm + tl.program_id(0).to(tl.int64) * HEAD + lane
        tl.store(p_dnorm, tl.sum(b_dnorm, 0), mask=lane < HEAD)
