"""Reading a state by its values, chunk-parallel in torch; autograd does the backward. Legend: see chunk.py."""

import torch

from .chunk import _decays, _exp, _last, _prepare


def read_by_value(x, k, v, g, *, scale, initial_state=None, return_state=False, cu_seqlens=None):
    """S_t = Diag(e^g_t) S_{t-1} + k_t v_t^T,  r_t = scale S_t x_t: how much of x_t each channel of the keys holds.

    x, v [B, T, H, V]; k, g [B, T, H, K]. Returns (r [B, T, H, K] float32 (float64 for float64 values), final state or
    None). It is what linear_attention's backward computes for the queries when x is the output's gradient.
    """
    layout, x, k, v, g, _, state = _prepare(x, k, v, g, None, scale, initial_state, cu_seqlens)
    G, decay, to_end = _decays(g)
    writes = (k * to_end).mT @ v
    before, _, state = layout.scan(lambda S, d, write: (d * S + write, None), state, _last(decay), writes)
    r = _inside(x, k, v, G) + decay * (x @ before.mT)
    return layout.unpack(r), state if return_state else None


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
