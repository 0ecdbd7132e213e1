"""One token of a rule, for decoding, in one launch: a state is read once and written once; without a backward.

The functions take what those of ops/step.py take, checked by decoding.py, and slots: None, and they return new states,
or where the states of the rows lie in a store that is written in place.
"""

import torch
import triton
import triton.language as tl

from .launch import configure, kernel, launch
from .problem import contiguous


def linear_attention(state, q, k, v, g, *, scale, slots):
    return _matrix_step(state, q, k, v, g, scale=scale, slots=slots)


def delta_rule(state, q, k, v, beta, g, *, scale, slots):
    return _matrix_step(state, q, k, v, g, beta=beta, scale=scale, slots=slots)


def dplr(state, q, k, v, a, b, g, *, scale, slots):
    return _matrix_step(state, q, k, v, g, a=a, b=b, scale=scale, slots=slots)


def rwkv6(state, q, k, v, g, u, *, scale, slots):
    return _matrix_step(state, q, k, v, g, u=u, scale=scale, slots=slots)


def _matrix_step(state, q, k, v, g, *, beta=None, a=None, b=None, u=None, scale, slots):
    """The rules whose state is one matrix, read behind the token's write or, with a bonus u, before it."""
    (R, HV, V), (H, K) = v.shape, k.shape[1:]
    state, new = _states(state, slots)
    q, k, v = _slices(q, k, v)
    beta, g = (None if x is None else x.expand(R, HV, *x.shape[2:]) for x in (beta, g))
    (g,) = _slices(g)
    batch, heads = zip(*((0, 0) if x is None else x.stride()[:2] for x in (q, k, v, beta, g)))
    strides = dict(zip(("H_Q", "H_K", "H_V", "H_BETA", "H_G"), heads))  # the model's; a batch's follow the sequences
    a, b, u = contiguous(a, b, u)  # made, not cut from a projection: no copy
    o, options = v.new_empty(R, HV, V), configure("step", K, V, v.device)
    launch(
        _step, (R * HV * triton.cdiv(V, options["BV"]),), state, slots, q, k, v, beta, g, a, b, u, o, new, *batch,
        SCALE=float(scale), H=H, HV=HV, K=K, V=V, BK=triton.next_power_of_2(K), **strides,
        CHANNELS=g is not None and g.ndim == 3, **options,
    )  # fmt: skip
    return o, new


def gsa(state, q, k, v, s, g, *, scale, slots):
    (R, H, V), K, M = v.shape, k.shape[-1], s.shape[-1]
    (keys, new_keys), (values, new_values) = (_states(x, slots) for x in state)
    q, k, v = _slices(q, k, v)
    s, g = contiguous(s, g)
    o, options = v.new_empty(R, H, V), configure("step_gsa", K, V, v.device)
    launch(
        _gsa_step, (R * H,), keys, values, slots, q, k, v, s, g, o, new_keys, new_values, *_strides(q, k, v),
        SCALE=float(scale), H=H, K=K, V=V, M=M, BK=triton.next_power_of_2(K), BV=triton.next_power_of_2(V),
        **_head_strides(q, k, v), **options,
    )  # fmt: skip
    return o, (new_keys, new_values)


def ttt_linear(state, q, k, v, eta, token_scale, weight, bias, *, scale, eps, mini_batch, offset, slots):
    R, H, D = v.shape
    state, new = _states(state, slots)
    q, k, v = _slices(q, k, v)
    eta, token_scale, weight, bias, offset = contiguous(eta, token_scale, weight, bias, offset)
    o = v.new_empty(R, H, D)
    launch(
        _ttt_step, (R * H,), state, slots, offset, q, k, v, eta, token_scale, weight, bias, o, new,
        *_strides(q, k, v), SCALE=float(scale), EPS=float(eps), C=mini_batch, H=H, D=D, BD=triton.next_power_of_2(D),
        **_head_strides(q, k, v), **configure("step_ttt", D, D, v.device),
    )  # fmt: skip
    return o, new


def titans_linear(state, q, k, v, theta, g, m, *, scale, mini_batch, offset, slots):
    (R, H, V), K = v.shape, k.shape[-1]
    state, new = _states(state, slots)
    q, k, v = _slices(q, k, v)
    theta, g, m, offset = contiguous(theta, g, m, offset)
    o, options = v.new_empty(R, H, V), configure("step_titans", K, V, v.device)
    launch(
        _titans_step, (R * H * triton.cdiv(V, options["BV"]),), state, slots, offset, q, k, v, theta, g, m, o, new,
        *_strides(q, k, v), SCALE=float(scale), C=mini_batch, H=H, K=K, V=V, BK=triton.next_power_of_2(K),
        **_head_strides(q, k, v), **options,
    )  # fmt: skip
    return o, new


def _states(state, slots):
    """What a kernel reads and where it writes: rows' states and room for new ones, or twice the same store."""
    if slots is not None:
        return state, state
    return state.contiguous(), torch.empty(state.shape, dtype=torch.float32, device=state.device)


def _slices(*tensors):
    """Slices of a fused projection are read where they lie: any stride but that of channels."""
    return [x if x is None or x.ndim < 3 or x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _strides(q, k, v):
    """From row to row, which may change from step to step: in the order S_Q, S_K, S_V."""
    return q.stride(0), k.stride(0), v.stride(0)


def _head_strides(q, k, v):
    return {"H_Q": q.stride(1), "H_K": k.stride(1), "H_V": v.stride(1)}


@triton.jit
def state_of(slots, i_r):
    """The state of row i_r."""
    i_n = i_r
    if slots is not None:
        i_n = tl.load(slots + i_r).to(tl.int64)
    return i_n


@triton.jit
def load_wide(p, o, mask):
    """In float32, 0 outside."""
    return tl.load(p + o, mask=mask, other=0).to(tl.float32)


@triton.jit
def completes(offset, i_n, C: tl.constexpr):
    """Whether this token is the last of its mini-batch of C."""
    seen = tl.full([], 0, tl.int32)
    if offset is not None:
        seen = tl.load(offset + i_n).to(tl.int32)
    return seen + 1 == C


@kernel
def _step(
    p_state, p_slots, p_q, p_k, p_v, p_beta, p_g, p_a, p_b, p_u, p_o, p_new, S_Q, S_K, S_V, S_BETA, S_G,
    SCALE: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    H_Q: tl.constexpr, H_K: tl.constexpr, H_V: tl.constexpr, H_BETA: tl.constexpr, H_G: tl.constexpr,
    CHANNELS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A program updates K x BV of one head's state, in registers."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_rh = (tl.program_id(0) // NV).to(tl.int64)
    i_r, i_h = i_rh // HV, i_rh % HV
    i_hk = i_h // (HV // H)
    o_k, o_v = tl.arange(0, BK), tl.program_id(0) % NV * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    o_S = ((state_of(p_slots, i_r) * HV + i_h) * K + o_k[:, None]) * V + o_v[None, :]
    m_S = m_k[:, None] & m_v[None, :]
    # [BK, BV]
    b_S = load_wide(p_state, o_S, m_S)
    # [BK]
    b_q = load_wide(p_q + i_r * S_Q + i_hk * H_Q, o_k, m_k)
    b_k = load_wide(p_k + i_r * S_K + i_hk * H_K, o_k, m_k)
    # [BV]
    b_v = load_wide(p_v + i_r * S_V + i_h * H_V, o_v, m_v)
    if p_u is not None:
        # [BK]
        b_u = load_wide(p_u + i_h * K, o_k, m_k)
        b_o = tl.sum(b_q[:, None] * b_S, 0) + tl.sum(b_q * b_u * b_k, 0) * b_v
    if p_a is not None:
        # [BK]
        b_a = load_wide(p_a + i_rh * K, o_k, m_k)
        b_b = load_wide(p_b + i_rh * K, o_k, m_k)
        b_w = tl.sum(b_a[:, None] * b_S, 0)
    if p_g is not None:
        p_g += i_r * S_G + i_h * H_G
        if CHANNELS:
            # [BK]
            b_S *= tl.exp(load_wide(p_g, o_k, m_k))[:, None]
        else:
            b_S *= tl.exp(tl.load(p_g).to(tl.float32))
    if p_beta is not None:
        b_beta = tl.load(p_beta + i_r * S_BETA + i_h * H_BETA).to(tl.float32)
        b_v = b_beta * (b_v - tl.sum(b_k[:, None] * b_S, 0))
    b_S += b_k[:, None] * b_v[None, :]
    if p_a is not None:
        b_S += b_b[:, None] * b_w[None, :]
    if p_u is None:
        b_o = tl.sum(b_q[:, None] * b_S, 0)
    tl.store(p_o + i_rh * V + o_v, (SCALE * b_o).to(p_o.dtype.element_ty), mask=m_v)
    tl.store(p_new + o_S, b_S, mask=m_S)


@kernel
def _gsa_step(
    p_keys, p_values, p_slots, p_q, p_k, p_v, p_s, p_g, p_o, p_new_keys, p_new_values, S_Q, S_K, S_V,
    SCALE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, H_Q: tl.constexpr, H_K: tl.constexpr, H_V: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """A program updates one head's memory slots, BM at a time, under a softmax whose maximum runs along."""
    i_rh = tl.program_id(0).to(tl.int64)
    i_r, i_h = i_rh // H, i_rh % H
    i_nh = state_of(p_slots, i_r) * H + i_h
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    # [BK]
    b_q = SCALE * load_wide(p_q + i_r * S_Q + i_h * H_Q, o_k, m_k)
    b_k = load_wide(p_k + i_r * S_K + i_h * H_K, o_k, m_k)
    # [BV]
    b_v = load_wide(p_v + i_r * S_V + i_h * H_V, o_v, m_v)
    b_o = tl.zeros([BV], tl.float32)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0, tl.float32)
    for i_m in range(0, M, BM):
        o_m = i_m + tl.arange(0, BM)
        m_m = o_m < M
        # [BM]
        b_s = load_wide(p_s + i_rh * M, o_m, m_m)[:, None]
        b_decay = tl.exp(load_wide(p_g + i_rh * M, o_m, m_m))[:, None]
        # [BM, BK]
        p_block = (i_nh * M + o_m[:, None]) * K + o_k[None, :]
        inside = m_m[:, None] & m_k[None, :]
        b_keys = b_decay * load_wide(p_keys, p_block, inside) + b_s * b_k[None, :]
        tl.store(p_new_keys + p_block, b_keys, mask=inside)
        r = tl.where(m_m, tl.sum(b_keys * b_q[None, :], 1), float("-inf"))
        raised = tl.maximum(top, tl.max(r, 0))
        p = tl.exp(r - raised)
        fade = tl.exp(top - raised)
        top = raised
        total = fade * total + tl.sum(p, 0)
        # [BM, BV]
        p_block = (i_nh * M + o_m[:, None]) * V + o_v[None, :]
        inside = m_m[:, None] & m_v[None, :]
        b_values = b_decay * load_wide(p_values, p_block, inside) + b_s * b_v[None, :]
        tl.store(p_new_values + p_block, b_values, mask=inside)
        b_o = fade * b_o + tl.sum(p[:, None] * b_values, 0)
    tl.store(p_o + i_rh * V + o_v, (b_o / total).to(p_o.dtype.element_ty), mask=m_v)


@kernel
def _ttt_step(
    p_state, p_slots, p_offset, p_q, p_k, p_v, p_eta, p_scale, p_weight, p_bias, p_o, p_new, S_Q, S_K, S_V,
    SCALE: tl.constexpr, EPS: tl.constexpr, C: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    H_Q: tl.constexpr, H_K: tl.constexpr, H_V: tl.constexpr,
):  # fmt: skip
    """A program updates one head's model, W with bias b, and acc, A with a; W is written only where it changes."""
    i_rh = tl.program_id(0).to(tl.int64)
    i_r, i_h = i_rh // H, i_rh % H
    i_n = state_of(p_slots, i_r)
    COPY: tl.constexpr = p_slots is None
    complete = completes(p_offset, i_n, C)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_S = m_d[:, None] & m_d[None, :]
    o_W = 2 * (i_n * H + i_h) * (D + 1) * D + o_d[:, None] * D + o_d[None, :]
    o_b = 2 * (i_n * H + i_h) * (D + 1) * D + D * D + o_d
    o_A, o_a = o_W + (D + 1) * D, o_b + (D + 1) * D
    # [BD]
    b_q = SCALE * load_wide(p_q + i_r * S_Q + i_h * H_Q, o_d, m_d)
    b_k = load_wide(p_k + i_r * S_K + i_h * H_K, o_d, m_d)
    b_v = load_wide(p_v + i_r * S_V + i_h * H_V, o_d, m_d)
    b_weight = load_wide(p_weight + i_h * D, o_d, m_d)
    b_bias = load_wide(p_bias + i_h * D, o_d, m_d)
    # [BD, BD] and [BD]
    b_W = load_wide(p_state, o_W, m_S)
    b_b = load_wide(p_state, o_b, m_d)
    # The gradient at z
    b_z = tl.sum(b_k[:, None] * b_W, 0) + b_b
    b_x = tl.where(m_d, b_z - tl.sum(b_z, 0) / D, 0)
    r = tl.rsqrt(tl.sum(b_x * b_x, 0) / D + EPS)
    b_x *= r
    b_e = b_weight * (b_weight * b_x + b_bias - (b_v - b_k))
    b_grad = tl.where(m_d, r * (b_e - tl.sum(b_e, 0) / D - b_x * (tl.sum(b_e * b_x, 0) / D)), 0)
    b_u = tl.load(p_eta + i_rh).to(tl.float32) * b_grad
    b_A = load_wide(p_state, o_A, m_S) + b_k[:, None] * b_u[None, :]
    b_a = load_wide(p_state, o_a, m_d) + b_u
    s = tl.full([], 1, tl.float32)
    if p_scale is not None:
        s = tl.load(p_scale + i_rh).to(tl.float32)
    b_o = tl.sum(b_q[:, None] * b_W, 0) + b_b - s * (tl.sum(b_q[:, None] * b_A, 0) + b_a)
    tl.store(p_o + i_rh * D + o_d, b_o.to(p_o.dtype.element_ty), mask=m_d)
    if complete:
        b_W -= s * b_A
        b_b -= s * b_a
        b_A = tl.zeros([BD, BD], tl.float32)
        b_a = tl.zeros([BD], tl.float32)
    if complete | COPY:
        tl.store(p_new + o_W, b_W, mask=m_S)
        tl.store(p_new + o_b, b_b, mask=m_d)
    tl.store(p_new + o_A, b_A, mask=m_S)
    tl.store(p_new + o_a, b_a, mask=m_d)


@kernel
def _titans_step(
    p_state, p_slots, p_offset, p_q, p_k, p_v, p_theta, p_g, p_m, p_o, p_new, S_Q, S_K, S_V, SCALE: tl.constexpr,
    C: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, H_Q: tl.constexpr,
    H_K: tl.constexpr, H_V: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A program updates K x BV of one head's S_0, S and Z; S_0 is written only where it changes."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_rh = (tl.program_id(0) // NV).to(tl.int64)
    i_r, i_h = i_rh // H, i_rh % H
    i_n = state_of(p_slots, i_r)
    COPY: tl.constexpr = p_slots is None
    complete = completes(p_offset, i_n, C)
    o_k, o_v = tl.arange(0, BK), tl.program_id(0) % NV * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    o_S0 = (3 * (i_n * H + i_h) * K + o_k[:, None]) * V + o_v[None, :]
    o_S, o_Z = o_S0 + K * V, o_S0 + 2 * K * V
    m_S = m_k[:, None] & m_v[None, :]
    # [BK]
    b_q = load_wide(p_q + i_r * S_Q + i_h * H_Q, o_k, m_k)
    b_k = load_wide(p_k + i_r * S_K + i_h * H_K, o_k, m_k)
    # [BV]
    b_v = load_wide(p_v + i_r * S_V + i_h * H_V, o_v, m_v)
    # [BK, BV]
    b_S0 = load_wide(p_state, o_S0, m_S)
    b_u = tl.load(p_theta + i_rh).to(tl.float32) * (b_v - tl.sum(b_k[:, None] * b_S0, 0))
    b_Z = tl.exp(tl.load(p_m + i_rh).to(tl.float32)) * load_wide(p_state, o_Z, m_S) + b_k[:, None] * b_u[None, :]
    b_S = tl.exp(tl.load(p_g + i_rh).to(tl.float32)) * load_wide(p_state, o_S, m_S) + b_Z
    b_o = SCALE * tl.sum(b_q[:, None] * b_S, 0)
    tl.store(p_o + i_rh * V + o_v, b_o.to(p_o.dtype.element_ty), mask=m_v)
    tl.store(p_new + o_S, b_S, mask=m_S)
    tl.store(p_new + o_Z, b_Z, mask=m_S)
    if complete:
        b_S0 = b_S
    if complete | COPY:
        tl.store(p_new + o_S0, b_S0, mask=m_S)
