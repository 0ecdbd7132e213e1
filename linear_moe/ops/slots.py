"""Reading a state by its values, chunk-parallel in torch; autograd does the backward. Steps, suffixes: see chunk.py."""

import torch

from .chunk import _decays, _exp, _last, _prepare


def read_by_value(x, k, v, g, *, scale, initial_state=None, return_state=False, cu_seqlens=None):
    """S_t = Diag(e^g_t) S_{t-1} + k_t v_t^T,  r_t = scale S_t x_t: how much of x_t each channel of the keys holds.

    x, v [B, T, H, V]; k, g [B, T, H, K]. Returns (r [B, T, H, K] float32 (float64 for float64 values), final state or
    None). It is what linear_attention's backward computes for the queries when x is the output's gradient.
    """
    layout, x_RCV, k_RCK, v_RCV, g_RCK, _, initial = _prepare(x, k, v, g, None, scale, initial_state, cu_seqlens)
    # 2. States
    G_RCK, decay_RCK, to_end_RCK = _decays(g_RCK)
    writes_RKV = (k_RCK * to_end_RCK).mT @ v_RCV

    # 3. Across chunks
    def update(S, write, whole):
        return whole * S + write, None

    before_RKV, _, final = layout.scan(update, initial, writes_RKV, _last(decay_RCK))
    # 1. Inside the chunk and 4. outputs
    r_RCK = _inside(x_RCV, k_RCK, v_RCV, G_RCK) + decay_RCK * (x_RCV @ before_RKV.mT)
    return layout.unpack(r_RCK), final if return_state else None


def _inside(x, k, v, G):
    """[R, C, K]: sum_{j<=i} (x_i . v_j) e^(G_ic - G_jc) k_jc, by halves of halves as in chunk.py: rows of a block's
    second half meet columns of its first, whose keys are decayed towards the border, and the sum from there on."""
    R, C, K = k.shape
    r = (x * v).sum(-1, keepdim=True) * k
    h = 1
    while h < C:
        (_, xb), (va, _), (ka, _), (Ga, Gb) = (
            y.view(R, C // (2 * h), 2, h, y.shape[-1]).unbind(2) for y in (x, v, k, G)
        )
        first, second = r.view(R, C // (2 * h), 2, h, K).unbind(2)
        middle = Ga[:, :, -1:]
        columns = (xb @ va.mT) @ (ka * _exp(middle - Ga, k.dtype))
        r = torch.stack([first, second + columns * _exp(Gb - middle, k.dtype)], 2)
        h *= 2
    return r.view(R, C, K)
