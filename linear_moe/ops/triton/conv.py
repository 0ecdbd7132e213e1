"""Gather, short causal convolution, SiLU and L2 norm per head, fused: what a layer does between projection and rule.

Memory bound. A program holds S segments of L neighbouring rows and a block of columns (one head, where heads are
normalised); a segment's rows are loaded once and serve all taps from registers.

For backward only the raw input and index maps are kept; pre-activations and norms are computed again. One pass gives
the gradients of x and weight; two passes where rows are gathered (a token's gradient then sums over its rows) or states
have gradients, with the gradient of the pre-activation [R, D], in x's dtype, in between. Nothing is atomic.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .launch import configure, kernel, launch


def short_conv(
    x,
    weight,
    *,
    activation=None,
    normalize=None,
    initial_state=None,
    return_state=False,
    cu_seqlens=None,
    token=None,
    row=None,
):
    """y_r = norm(act(sum_i weight[:, i] x_{r-W+1+i})), never across a sequence's borders.

    x [B, T, D], a slice of a wider projection as it is; weight [D, W] or None (no convolution); activation "silu" or
    None; normalize: None or the width of the heads that are divided by sqrt(|y|^2 + 1e-6); states [N, D, W-1] as in
    ops.short_conv; cu_seqlens int32 [N+1]. With token [R] and row [B*T, J] int64 (ops.Routes) x holds tokens, row r is
    x[token[r]], and taps and cu_seqlens follow the rows. Returns (y [B, T, D] or [1, R, D] in x's dtype, state or
    None), computed in float32. Nothing is checked here: see api.short_conv.
    """
    place = None
    if cu_seqlens is not None and _width(weight) > 1:
        place = places(cu_seqlens, x.shape[0] * x.shape[1] if token is None else len(token))
    if initial_state is not None:
        initial_state = initial_state.to(x.dtype).contiguous()
    if weight is not None:
        weight = weight.contiguous()
    return _ShortConv.apply(
        x, weight, initial_state, cu_seqlens, place, token, row, activation, normalize, return_state
    )


def places(cu_seqlens, rows):
    """Every row's place in its sequence and its sequence's number: int32 [2, rows]."""
    out = torch.empty(2, rows, dtype=torch.int32, device=cu_seqlens.device)
    tuned = configure("conv_places", 64, 64, cu_seqlens.device)
    launch(_places_kernel, (triton.cdiv(rows, tuned["BR"]),), cu_seqlens, out, rows, len(cu_seqlens) - 1, **tuned)
    return out


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, initial_state, cu_seqlens, place, token, row, activation, normalize, return_state):
        ctx.options = activation, normalize
        ctx.save_for_backward(x, weight, initial_state, cu_seqlens, place, token, row)
        ctx.set_materialize_grads(False)
        y = forward(x, weight, initial_state, place, token, activation, normalize)
        ctx.shape = y.shape
        return y, final_state(x, weight, initial_state, cu_seqlens, token) if return_state else None

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        x, weight, initial_state, cu_seqlens, place, token, row = ctx.saved_tensors
        need_x, need_weight, need_state = ctx.needs_input_grad[:3]
        fused = token is None and not need_state and dstate is None
        if not fused and cu_seqlens is None:  # with states a dense batch is packed sequences of equal length
            B, T, _ = x.shape
            cu_seqlens = torch.arange(B + 1, dtype=torch.int32, device=x.device) * T
            place = places(cu_seqlens, B * T)
        if dy is None:
            dy = x.new_zeros(ctx.shape)
        dx, dweight = _backward(x, weight, initial_state, place, token, *ctx.options, dy, fused, need_weight)
        dinitial = None
        if need_state:
            dinitial = _initial_grad(dx, weight, initial_state, dstate, cu_seqlens)
        if need_x and not fused:
            dx = _spread(x, weight, dx, dstate, cu_seqlens, place, row)
        return dx if need_x else None, dweight, dinitial, *[None] * 7


def _width(weight):
    return 1 if weight is None else weight.shape[1]


def _strided(x):
    """x and the distance of its rows, copied only where they have no common one."""
    B, T, D = x.shape
    if x.stride(2) != 1 or (B > 1 and x.stride(0) != T * x.stride(1)):
        x = x.contiguous()
    return x, x.stride(1) if B * T > 1 else D


def _columns(name, D, normalize, device):
    """The tuned options of a kernel over [rows, D]: blocks of BD columns of which HEAD are used, tiles of S rows."""
    width = min(normalize or 256, 256)
    options = dict(configure(name, width, width, device))
    BD = triton.next_power_of_2(normalize or min(options["BD"], D))
    options |= {"BD": BD, "S": max(1, options.pop("TILE") // BD), "HEAD": normalize or BD, "D": D}
    return options, triton.cdiv(D, options["HEAD"])


def _grid(x, token, options):
    """Sequences of the grid (packed ones are one), their rows, and the blocks of rows of each."""
    B, T = (x.shape[0], x.shape[1]) if token is None else (1, len(token))
    return B, T, triton.cdiv(T, options["S"] * options["L"] * options["STEPS"])


def forward(x, weight, initial_state, place, token, activation, normalize):
    """y, outside autograd."""
    x, stride = _strided(x)
    options, blocks = _columns("conv_forward", x.shape[2], normalize, x.device)
    B, T, NB = _grid(x, token, options)
    y = torch.empty(B, T, x.shape[2], dtype=x.dtype, device=x.device)
    launch(
        _forward_kernel, (B * NB * blocks,), x, weight, initial_state, place, token, y, T, NB,
        SX=stride, W=_width(weight), SILU=activation == "silu", NORM=normalize is not None, **options,
    )  # fmt: skip
    return y


def _backward(x, weight, initial_state, place, token, activation, normalize, dy, fused, need_weight):
    """Gradients of x (not fused: of the pre-activation [1, R, D]) and of weight."""
    x, stride = _strided(x)
    options, blocks = _columns("conv_backward", x.shape[2], normalize, x.device)
    D, W = x.shape[2], _width(weight)
    B, T, NB = _grid(x, token, options)
    if place is not None:  # dense batches that were packed for the states' sake
        B, T, NB = 1, place.shape[1], triton.cdiv(place.shape[1], options["S"] * options["L"] * options["STEPS"])
    dx = torch.empty(dy.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(B * NB, D, W, dtype=torch.float32, device=x.device) if need_weight else None
    launch(
        _backward_kernel, (B * NB * blocks,), x, weight, initial_state, place, token, dy.contiguous(), dx, partial,
        T, NB, SX=stride, W=W, SILU=activation == "silu", NORM=normalize is not None, FUSED=fused, **options,
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype) if need_weight else None


def _spread(x, weight, dpre, dstate, cu_seqlens, place, row):
    """The gradient of x [B, T, D] from that of the pre-activation and, maybe, of the final state."""
    D, T, R = x.shape[2], x.shape[0] * x.shape[1], dpre.shape[1] * dpre.shape[0]
    options, blocks = _columns("conv_spread", D, None, x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dstate = None if dstate is None else dstate.contiguous()
    launch(
        _spread_kernel, (triton.cdiv(T, options["S"]) * blocks,), dpre, weight, dstate, cu_seqlens, place, row, dx,
        T, R, W=_width(weight), J=1 if row is None else row.shape[1], **options,
    )  # fmt: skip
    return dx


def final_state(x, weight, initial_state, cu_seqlens, token):
    """The last W-1 inputs of every sequence: [N, D, W-1], oldest first."""
    x, stride = _strided(x)
    W, T, N = _width(weight), x.shape[1], len(x) if cu_seqlens is None else len(cu_seqlens) - 1
    options, blocks = _columns("conv_state", x.shape[2], None, x.device)
    state = torch.empty(N, x.shape[2], W - 1, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(N, options["S"]) * blocks if W > 1 else 0,)
    launch(_state_kernel, grid, x, initial_state, cu_seqlens, token, state, N, T, SX=stride, W=W, **options)
    return state


def _initial_grad(dpre, weight, initial_state, dstate, cu_seqlens):
    """The gradient of the initial state: through the first rows' taps, and of what short sequences keep of it."""
    N, D, past = initial_state.shape
    options, blocks = _columns("conv_state", D, None, dpre.device)
    dinitial = torch.empty(N, D, past, dtype=initial_state.dtype, device=dpre.device)
    dstate = None if dstate is None else dstate.contiguous()
    grid = (triton.cdiv(N, options["S"]) * blocks if past else 0,)
    launch(_initial_kernel, grid, dpre, weight, dstate, cu_seqlens, dinitial, N, W=past + 1, **options)
    return dinitial


@kernel
def _places_kernel(cu, out, R, N, BR: tl.constexpr):
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    sequence = tl.zeros([BR], tl.int32)  # the last one known to start at or before the row
    ahead = N  # how many behind it are still in question
    while ahead > 0:
        half = (ahead + 1) // 2
        middle = sequence + half
        start = tl.load(cu + middle, mask=middle <= N, other=2**31 - 1)
        sequence = tl.where(start <= row, middle, sequence)
        ahead -= half
    tl.store(out + row, row - tl.load(cu + sequence), mask=row < R)
    tl.store(out + tl.cast(R, tl.int64) + row, sequence, mask=row < R)


@triton.jit
def _block(D: tl.constexpr, HEAD: tl.constexpr, BD: tl.constexpr):
    """This program's block of rows and its columns [BD], with their mask."""
    blocks: tl.constexpr = (D + HEAD - 1) // HEAD
    lane = tl.arange(0, BD)
    column = tl.program_id(0) % blocks * HEAD + lane
    return tl.program_id(0) // blocks, column, (lane < HEAD) & (column < D)


@triton.jit
def _load_weight(weight, column, wanted, W: tl.constexpr):
    """W tiles [BD]; without a weight one tap of 1."""
    taps = ()
    for i in tl.static_range(W):
        if weight is None:
            taps += (tl.where(wanted, 1.0, 0.0),)
        else:
            taps += (tl.load(weight + column * W + i, mask=wanted, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _load_rows(x, token, base, t, T, column, wanted, COUNT: tl.constexpr, SX: tl.constexpr):
    """COUNT tiles [S, BD]: rows t, t + 1, ... of the sequence that starts at row `base`, zeros outside of it."""
    rows = ()
    for i in tl.static_range(COUNT):
        inside = (t + i >= 0) & (t + i < T)
        source = base + t + i
        if token is not None:
            source = tl.load(token + t + i, mask=inside, other=0)
        # [S, BD]
        p_x = x + source.to(tl.int64)[:, None] * SX + column[None, :]
        rows += (tl.load(p_x, mask=inside[:, None] & wanted[None, :], other=0.0).to(tl.float32),)
    return rows


@triton.jit
def _load_place(place, sequence, t, T):
    """Place and sequence of rows t [S]: given (packed), or a grid's sequence and t itself (dense)."""
    b_place, b_sequence = t, sequence + tl.zeros_like(t)
    if place is not None:
        b_place = tl.load(place + t, mask=t < T, other=0)
        b_sequence = tl.load(place + tl.cast(T, tl.int64) + t, mask=t < T, other=0)
    return b_place, b_sequence


@triton.jit
def _taps(rows, first: tl.constexpr, place, sequence, inside, state, column, wanted, D: tl.constexpr, W: tl.constexpr,
          PACKED: tl.constexpr):  # fmt: skip
    """The W inputs [S, BD] that end with tile `first` + W - 1; those before a sequence come from its state."""
    taps = ()
    for i in tl.static_range(W):
        tap = rows[first + i]
        if PACKED and i < W - 1:
            tap = tl.where((place >= W - 1 - i)[:, None], tap, 0.0)
        if state is not None and i < W - 1:
            p_state = state + (sequence.to(tl.int64)[:, None] * D + column[None, :]) * (W - 1) + place[:, None] + i
            before = (inside & (place < W - 1 - i))[:, None] & wanted[None, :]
            tap += tl.load(p_state, mask=before, other=0.0).to(tl.float32)
        taps += (tap,)
    return taps


@triton.jit
def _convolve(taps, weight, W: tl.constexpr):
    y = taps[0] * weight[0][None, :]
    for i in tl.static_range(1, W):
        y += taps[i] * weight[i][None, :]
    return y


@triton.jit
def _finish(pre, SILU: tl.constexpr, NORM: tl.constexpr):
    if SILU:
        pre *= tl.sigmoid(pre)
    if NORM:
        pre *= tl.rsqrt(tl.sum(pre * pre, 1) + 1e-6)[:, None]
    return pre


@triton.jit
def _finish_grad(pre, dy, SILU: tl.constexpr, NORM: tl.constexpr):
    """The gradient of `pre` from that of `_finish(pre)`."""
    act = pre
    if SILU:
        sigmoid = tl.sigmoid(pre)
        act = pre * sigmoid
    if NORM:
        scale = tl.rsqrt(tl.sum(act * act, 1) + 1e-6)
        along = tl.sum(act * dy, 1) * scale * scale
        dy = scale[:, None] * (dy - act * along[:, None])
    if SILU:
        dy *= sigmoid + act * (1.0 - sigmoid)
    return dy


@kernel
def _forward_kernel(x, weight, state, place, token, y, T, NB, SX: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr,
                    NORM: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, BD: tl.constexpr, S: tl.constexpr,
                    L: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    i_block, column, wanted = _block(D, HEAD, BD)
    sequence, first = i_block // NB, i_block % NB * (S * L * STEPS)
    base = sequence.to(tl.int64) * T
    b_weight = _load_weight(weight, column, wanted, W)
    for step in range(tl.minimum(STEPS, tl.cdiv(T - first, S * L))):
        t = first + step * (S * L) + tl.arange(0, S) * L
        rows = _load_rows(x, token, base, t - (W - 1), T, column, wanted, L + W - 1, SX)
        for i in tl.static_range(L):
            b_place, b_sequence = _load_place(place, sequence, t + i, T)
            inside = t + i < T
            taps = _taps(rows, i, b_place, b_sequence, inside, state, column, wanted, D, W, place is not None)
            b_y = _finish(_convolve(taps, b_weight, W), SILU, NORM)
            # [S, BD]
            p_y = y + (base + t + i)[:, None] * D + column[None, :]
            tl.store(p_y, b_y.to(y.dtype.element_ty), mask=inside[:, None] & wanted[None, :])


@kernel
def _backward_kernel(x, weight, state, place, token, dy, dx, dweight, T, NB, SX: tl.constexpr, W: tl.constexpr,
                     SILU: tl.constexpr, NORM: tl.constexpr, FUSED: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr,
                     BD: tl.constexpr, S: tl.constexpr, L: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    """dx: of x if FUSED, which needs the gradients of the W-1 rows after a segment too, else of the pre-activation."""
    HALO: tl.constexpr = W - 1 if FUSED else 0
    i_block, column, wanted = _block(D, HEAD, BD)
    sequence, first = i_block // NB, i_block % NB * (S * L * STEPS)
    base = sequence.to(tl.int64) * T
    b_weight = _load_weight(weight, column, wanted, W)
    b_dweight = ()
    for _ in tl.static_range(W):
        b_dweight += (tl.zeros([S, BD], tl.float32),)
    for step in range(tl.minimum(STEPS, tl.cdiv(T - first, S * L))):
        t = first + step * (S * L) + tl.arange(0, S) * L
        rows = _load_rows(x, token, base, t - (W - 1), T, column, wanted, L + W - 1 + HALO, SX)
        later = ()  # gradients of this row and the W-1 before it
        for i in tl.static_range(L + HALO):
            b_place, b_sequence = _load_place(place, sequence, t + i, T)
            inside = t + i < T
            taps = _taps(rows, i, b_place, b_sequence, inside, state, column, wanted, D, W, place is not None)
            # [S, BD]
            p_dy = dy + (base + t + i)[:, None] * D + column[None, :]
            b_dy = tl.load(p_dy, mask=inside[:, None] & wanted[None, :], other=0.0).to(tl.float32)
            b_dpre = _finish_grad(_convolve(taps, b_weight, W), b_dy, SILU, NORM)
            if dweight is not None and i < L:
                total = ()
                for j in tl.static_range(W):
                    total += (b_dweight[j] + taps[j] * b_dpre,)
                b_dweight = total
            # what this row gives to itself and to the HALO rows before it; the oldest of them is complete now
            sums = ()
            for j in tl.static_range(HALO + 1):
                part = b_dpre
                if FUSED:
                    part = b_dpre * b_weight[W - 1 - j][None, :]
                    if place is not None and j > 0:
                        part = tl.where((b_place >= j)[:, None], part, 0.0)
                if j > 0 and i > 0:
                    part += later[j - 1]
                sums += (part,)
            later = sums
            if i >= HALO:
                done = t + i - HALO
                # [S, BD]
                p_dx = dx + (base + done)[:, None] * D + column[None, :]
                tl.store(p_dx, later[HALO].to(dx.dtype.element_ty), mask=(done < T)[:, None] & wanted[None, :])
    if dweight is not None:
        for i in tl.static_range(W):
            p_dweight = dweight + (i_block.to(tl.int64) * D + column) * W + i
            tl.store(p_dweight, tl.sum(b_dweight[i], 0), mask=wanted)


@kernel
def _spread_kernel(dpre, weight, dstate, cu, place, row, dx, T, R, W: tl.constexpr, J: tl.constexpr, D: tl.constexpr,
                   HEAD: tl.constexpr, BD: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """dx of T tokens: over a token's J rows and the up to W rows of the same sequence that each of them enters."""
    i_block, column, wanted = _block(D, HEAD, BD)
    t = i_block.to(tl.int64) * S + tl.arange(0, S)
    b_weight = _load_weight(weight, column, wanted, W)
    b_dx = tl.zeros([S, BD], tl.float32)
    for j in range(J):
        b_row = t
        if row is not None:
            b_row = tl.load(row + t * J + j, mask=t < T, other=0)
        for i in tl.static_range(W):
            inside = (t < T) & (b_row + i < R)
            if i > 0:
                inside &= tl.load(place + b_row + i, mask=inside, other=0) >= i
            # [S, BD]
            p_dpre = dpre + (b_row + i)[:, None] * D + column[None, :]
            b_dpre = tl.load(p_dpre, mask=inside[:, None] & wanted[None, :], other=0.0).to(tl.float32)
            b_dx += b_dpre * b_weight[W - 1 - i][None, :]
        if dstate is not None and W > 1:
            sequence = tl.load(place + R + b_row, mask=t < T, other=0)
            slot = W - 1 - (tl.load(cu + sequence + 1) - b_row)
            # [S, BD]
            p_dstate = dstate + (sequence.to(tl.int64)[:, None] * D + column[None, :]) * (W - 1) + slot[:, None]
            kept = ((t < T) & (slot >= 0))[:, None] & wanted[None, :]
            b_dx += tl.load(p_dstate, mask=kept, other=0.0).to(tl.float32)
    tl.store(
        dx + t[:, None] * D + column[None, :], b_dx.to(dx.dtype.element_ty), mask=(t < T)[:, None] & wanted[None, :]
    )


@triton.jit
def _load_ends(cu, n, N, T):
    """First rows and lengths of sequences n [S]; length 0 for those there are not."""
    if cu is None:
        start, length = n * T, tl.where(n < N, T, 0)
    else:
        start = tl.load(cu + n, mask=n < N, other=0).to(tl.int64)
        length = (tl.load(cu + n + 1, mask=n < N, other=0) - start).to(tl.int32)
    return start, length


@kernel
def _state_kernel(x, initial, cu, token, state, N, T, SX: tl.constexpr, W: tl.constexpr, D: tl.constexpr,
                  HEAD: tl.constexpr, BD: tl.constexpr, S: tl.constexpr):  # fmt: skip
    i_block, column, wanted = _block(D, HEAD, BD)
    n = i_block.to(tl.int64) * S + tl.arange(0, S)
    start, length = _load_ends(cu, n, N, T)
    p_state = (n[:, None] * D + column[None, :]) * (W - 1)
    for slot in tl.static_range(W - 1):
        place = length - (W - 1) + slot  # before the sequence if negative: then in the initial state
        source, inside = start + place, (n < N) & (place >= 0)
        if token is not None:
            source = tl.load(token + source, mask=inside, other=0)
        # [S, BD]
        p_x = x + source[:, None] * SX + column[None, :]
        b_state = tl.load(p_x, mask=inside[:, None] & wanted[None, :], other=0.0)
        if initial is not None:
            kept = ((n < N) & (place < 0))[:, None] & wanted[None, :]
            b_state += tl.load(initial + p_state + length[:, None] + slot, mask=kept, other=0.0)
        tl.store(state + p_state + slot, b_state, mask=(n < N)[:, None] & wanted[None, :])


@kernel
def _initial_kernel(dpre, weight, dstate, cu, dinitial, N, W: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr,
                    BD: tl.constexpr, S: tl.constexpr):  # fmt: skip
    i_block, column, wanted = _block(D, HEAD, BD)
    n = i_block.to(tl.int64) * S + tl.arange(0, S)
    start, length = _load_ends(cu, n, N, 0)
    b_weight = _load_weight(weight, column, wanted, W)
    p_state = (n[:, None] * D + column[None, :]) * (W - 1)
    for slot in tl.static_range(W - 1):
        b_dinitial = tl.zeros([S, BD], tl.float32)
        if dstate is not None:
            kept = ((n < N) & (length <= slot))[:, None] & wanted[None, :]
            b_dinitial += tl.load(dstate + p_state + slot - length[:, None], mask=kept, other=0.0).to(tl.float32)
        for i in tl.static_range(slot + 1):
            reached = (slot - i < length)[:, None] & wanted[None, :]
            # [S, BD]
            p_dpre = dpre + (start + slot - i)[:, None] * D + column[None, :]
            b_dinitial += tl.load(p_dpre, mask=reached, other=0.0).to(tl.float32) * b_weight[i][None, :]
        p_dinitial = dinitial + p_state + slot
        tl.store(p_dinitial, b_dinitial.to(dinitial.dtype.element_ty), mask=(n < N)[:, None] & wanted[None, :])
