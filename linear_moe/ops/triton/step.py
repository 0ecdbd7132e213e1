"""One token of a rule, for decoding, in one launch: the state is read once and written once."""

import torch
import triton
import triton.language as tl

from .launch import configure, kernel, launch


def step(rule, state, q, k, v, beta, g, a=None, b=None, *, scale, out_state=None):
    """One token of `rule` for every sequence of a batch; without a backward.

    state [B, HV, K, V] float32; q, k [B, H, K], HV a multiple of H; v [B, HV, V]; beta [B, HV] for the delta rule, else
    None; g, the log decay, None, [HV], [B, HV] or [B, HV, K]; a, b [B, HV, K] for dplr, else None. Returns (o
    [B, HV, V] in v's dtype, the new state), which is `out_state` if that is given: contiguous, and `state` itself to
    update it in place. Raises ValueError for an out_state that does not fit; all else api.step checks.
    """
    if out_state is not None and not (
        out_state.shape == state.shape and out_state.dtype == torch.float32 and out_state.is_contiguous()
    ):
        raise ValueError(
            f"step: out_state must be contiguous float32 {[*state.shape]}, not {out_state.dtype} "
            f"{[*out_state.shape]} with strides {out_state.stride()}"
        )
    (B, HV, K, V), H = state.shape, q.shape[1]
    new = torch.empty(state.shape, dtype=torch.float32, device=state.device) if out_state is None else out_state
    o = v.new_empty(B, HV, V)
    # Slices of a fused projection are read where they lie: any stride but that of channels.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    beta, decay = (None if x is None else x.expand(B, HV, *x.shape[2:]) for x in (beta, g))
    if decay is not None and decay.ndim == 3 and decay.stride(-1) != 1:
        decay = decay.contiguous()
    batch, heads = zip(*((0, 0) if x is None else x.stride()[:2] for x in (q, k, v, beta, decay)))
    strides = dict(zip(("H_Q", "H_K", "H_V", "H_BETA", "H_G"), heads))  # the model's; a batch's follow the sequences
    a, b = (None if x is None else x.contiguous() for x in (a, b))  # made, not cut from a projection: no copy
    options = configure("step", K, V, state.device)
    launch(
        _step, (B * HV * triton.cdiv(V, options["BV"]),), state.contiguous(), q, k, v, beta, decay, a, b, o, new,
        *batch, SCALE=float(scale), H=H, HV=HV, K=K, V=V, BK=triton.next_power_of_2(K), **strides,
        CHANNELS=decay is not None and decay.ndim == 3, **options,
    )  # fmt: skip
    return o, new


@kernel
def _step(
    p_state, p_q, p_k, p_v, p_beta, p_g, p_a, p_b, p_o, p_new, S_Q, S_K, S_V, S_BETA, S_G,
    SCALE: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    H_Q: tl.constexpr, H_K: tl.constexpr, H_V: tl.constexpr, H_BETA: tl.constexpr, H_G: tl.constexpr,
    CHANNELS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A program updates K x BV of one head's state, in registers."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_s = (tl.program_id(0) // NV).to(tl.int64)
    i_b, i_h = i_s // HV, i_s % HV
    i_hk = i_h // (HV // H)
    o_k, o_v = tl.arange(0, BK), tl.program_id(0) % NV * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    o_S = (i_s * K + o_k[:, None]) * V + o_v[None, :]
    m_S = m_k[:, None] & m_v[None, :]
    # [BK, BV]
    b_S = tl.load(p_state + o_S, mask=m_S, other=0).to(tl.float32)
    # [BK]
    b_q = tl.load(p_q + i_b * S_Q + i_hk * H_Q + o_k, mask=m_k, other=0).to(tl.float32)
    b_k = tl.load(p_k + i_b * S_K + i_hk * H_K + o_k, mask=m_k, other=0).to(tl.float32)
    # [BV]
    b_v = tl.load(p_v + i_b * S_V + i_h * H_V + o_v, mask=m_v, other=0).to(tl.float32)
    if p_a is not None:
        # [BK]
        b_a = tl.load(p_a + i_s * K + o_k, mask=m_k, other=0).to(tl.float32)
        b_b = tl.load(p_b + i_s * K + o_k, mask=m_k, other=0).to(tl.float32)
        b_u = tl.sum(b_a[:, None] * b_S, 0)
    if p_g is not None:
        p_g += i_b * S_G + i_h * H_G
        if CHANNELS:
            # [BK]
            b_S *= tl.exp(tl.load(p_g + o_k, mask=m_k, other=0).to(tl.float32))[:, None]
        else:
            b_S *= tl.exp(tl.load(p_g).to(tl.float32))
    if p_beta is not None:
        b_beta = tl.load(p_beta + i_b * S_BETA + i_h * H_BETA).to(tl.float32)
        b_v = b_beta * (b_v - tl.sum(b_k[:, None] * b_S, 0))
    b_S += b_k[:, None] * b_v[None, :]
    if p_a is not None:
        b_S += b_b[:, None] * b_u[None, :]
    b_o = SCALE * tl.sum(b_q[:, None] * b_S, 0)
    tl.store(p_o + i_s * V + o_v, b_o.to(p_o.dtype.element_ty), mask=m_v)
    tl.store(p_new + o_S, b_S, mask=m_S)
