"""Rules that learn online, mini-batch by mini-batch, in torch: TTT-Linear and Titans' linear memory with momentum.

Gradients are taken at the memory with which a mini-batch begins, so a mini-batch is a chunk of layout.py. The states
hold what a sequence that ends inside a mini-batch leaves unfinished; autograd does the backward.
"""

import torch

from .layout import Layout
from .reference import compute_dtype, norm_loss_gradient
from .take import put, take

MAX_WIDTH, MAX_MINI_BATCH = 128, 64  # of the kernels in triton/online.py


class _MiniBatches:
    """Tokens [B, T, H, D] as mini-batches [rows, C, D], one row a (mini-batch, head).

    With offsets every sequence gets C - 1 more places: as many in front as its offset, the others behind. So nothing
    that is on a device need be read. Places without a token are zero.
    """

    def __init__(self, v, offset, cu_seqlens, C):
        self.place, self.lead = None, v.shape[:2]
        B, T, H, _ = v.shape
        if offset is not None:
            token = torch.arange(B * T, device=v.device)
            if cu_seqlens is None:
                sequence, T = token.div(max(T, 1), rounding_mode="floor"), T + C - 1
            else:
                sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token.to(cu_seqlens.dtype), right=True)
                shift = torch.arange(len(cu_seqlens), device=v.device, dtype=cu_seqlens.dtype) * (C - 1)
                cu_seqlens, T = cu_seqlens + shift, T + (len(cu_seqlens) - 1) * (C - 1)
            self.place = token + (C - 1) * sequence + offset.long()[sequence]
        self.line = (B, T)
        self.layout = Layout(v.new_empty(B, T, H, 0), cu_seqlens, C)

    def pack(self, x):
        if self.place is not None:
            B, T = self.line
            x = put(x.flatten(0, 1), self.place, B * T).view(B, T, *x.shape[2:])
        return self.layout.pack(x)

    def unpack(self, x):
        x = self.layout.unpack(x)
        return x if self.place is None else take(x.flatten(0, 1), self.place).view(*self.lead, *x.shape[2:])


def ttt_linear(
    q, k, v, eta, token_scale, weight, bias, *,
    eps, scale, mini_batch, initial_state=None, offset=None, return_state=False, cu_seqlens=None,
):  # fmt: skip
    """See api.ttt_linear. In its dual form: with u_j = eta_j grad_j, W and acc as the mini-batch finds them,
    o = W^T [q, 1] - token_scale (acc^T [q, 1] + sum_(j<=t) ([q_t, 1].[k_j, 1]) u_j)."""
    dtype, (*_, H, D) = v.dtype, v.shape
    q, k, v, eta, weight, bias = (x.to(compute_dtype(v)) for x in (q, k, v, eta, weight, bias))
    batches, one = _MiniBatches(v, offset, cu_seqlens, mini_batch), torch.ones_like(k[..., :1])
    token_scale = one if token_scale is None else token_scale.to(v.dtype).unsqueeze(-1)
    operands = (torch.cat([scale * q, one], -1), torch.cat([k, one], -1), v - k, eta.unsqueeze(-1), token_scale)
    q, k, target, eta, token_scale = (batches.pack(x) for x in operands)
    complete = k[:, -1:, -1:]  # 1 where the mini-batch's last place holds a token, else 0
    step, unfinished = complete * token_scale[:, -1:], 1 - complete
    mix = _rows([torch.ones_like(step), -step], [torch.zeros_like(step), unfinished])
    k_end = torch.cat([-step * k, unfinished * k], -1)
    if initial_state is None:
        initial_state = v.new_zeros(batches.layout.N, H, 2, D + 1, D)

    def update(S, target, k, eta, k_end, mix):
        z, target = ((x.unflatten(0, (-1, H))) for x in (k @ S[:, : D + 1], target))
        u = eta * norm_loss_gradient(z, target, weight[:, None], bias[:, None], eps).flatten(0, 1)
        return _advance(S, mix, k_end, u), u

    before, u, state = batches.layout.scan(update, initial_state.to(v.dtype).flatten(2, 3), target, k, eta, k_end, mix)
    o = torch.baddbmm(torch.cat([q, -token_scale * q], -1) @ before, token_scale * (q @ k.mT).tril(), u, alpha=-1)
    return batches.unpack(o).to(dtype), state.unflatten(2, (2, D + 1)) if return_state else None


def titans_linear(
    q, k, v, theta, g, m, *,
    scale, mini_batch, initial_state=None, offset=None, return_state=False, cu_seqlens=None,
):  # fmt: skip
    """See api.titans_linear. With u_j = theta_j (v_j - S_0^T k_j), S_t = e^(G_t) S + f_t Z + sum_(j<=t) c_tj k_j u_j^T,
    where c_tj = sum_(j<=i<=t) e^(G_t - G_i) e^(M_i - M_j), and f_t is c_tj with the start of the mini-batch for j."""
    dtype, (*_, H, V), K = v.dtype, v.shape, k.shape[-1]
    q, k, v, theta, g, m = (x.to(compute_dtype(v)) for x in (q, k, v, theta, g, m))
    batches, one = _MiniBatches(v, offset, cu_seqlens, mini_batch), torch.ones_like(k[..., :1])
    operands = (scale * q, k, v, theta.unsqueeze(-1), g.unsqueeze(-1), m.unsqueeze(-1), one)
    q, k, v, theta, g, m, held = (batches.pack(x) for x in operands)
    g, m = _decays(g), _decays(m)
    (f, c), of_S = ((g[..., 1:] * held.mT) @ m).split([1, mini_batch], -1), g[..., :1]  # an empty place adds no Z to S
    if initial_state is None:
        initial_state = v.new_zeros(batches.layout.N, H, 3, K, V)

    complete, to_S, to_Z = held[:, -1:], c[:, -1].unsqueeze(-1), m[:, -1, 1:].unsqueeze(-1)
    k_end = torch.cat([complete * to_S * k, to_S * k, to_Z * k], -1)
    S_end, Z_end, nothing = [of_S[:, -1:], f[:, -1:]], m[:, -1:, :1], torch.zeros_like(complete)
    mix = _rows([1 - complete, *(complete * x for x in S_end)], [nothing, *S_end], [nothing, nothing, Z_end])

    def update(S, v, k, theta, k_end, mix):
        u = theta * torch.baddbmm(v, k, S[:, :K], alpha=-1)
        return _advance(S, mix, k_end, u), u

    before, u, state = batches.layout.scan(update, initial_state.to(v.dtype).flatten(2, 3), v, k, theta, k_end, mix)
    o = torch.baddbmm((c * (q @ k.mT)) @ u, torch.cat([q * of_S, q * f], -1), before[:, K:])
    return batches.unpack(o).to(dtype), state.unflatten(2, (3, K)) if return_state else None


def _rows(*rows):
    """Rows of [R, 1, 1] as matrices [R, n, n]."""
    return torch.cat([torch.cat(row, -1) for row in rows], 1)


def _advance(S, mix, k_end, u):
    """The n matrices of a state [R, n K, V], mixed with the coefficients [R, n, n], plus the writes of a mini-batch."""
    writes, n = k_end.mT @ u, mix.shape[1]
    return writes.view(len(S), n, -1).baddbmm_(mix, S.view(len(S), n, -1)).view(S.shape)


def _decays(g):
    """[R, C, 1] -> [R, C, 1 + C]: how much of the chunk's start, and of every token i, is left at t >= i; else 0.

    Sums over the tokens between, never differences of running sums: those lose a weak decay behind a strong one.
    """
    between = g.expand(-1, -1, g.shape[1] + 1).tril().cumsum(1)
    return between.exp().tril(1)
