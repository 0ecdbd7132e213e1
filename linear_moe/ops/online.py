"""Rules that learn online, mini-batch by mini-batch, in torch: TTT-Linear and Titans' linear memory with momentum.

Gradients are taken at the memory with which a mini-batch begins, so a mini-batch is a chunk of layout.py, and the steps
are those of chunk.py. The states hold what a sequence that ends inside a mini-batch leaves unfinished; autograd does
the backward.

Suffixes: R rows, one a (mini-batch, head); C tokens of a mini-batch; K, V key and value channels; E = D + 1, TTT's D
channels and the bias; P a mini-batch's start and its tokens, 1 + C.
"""

import torch

from .layout import Layout
from .reference import compute_dtype, norm_loss_gradient
from .sequences import sequence_of
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
            token, more = torch.arange(B * T, device=v.device), C - 1
            if cu_seqlens is None:
                sequence = token.div(max(T, 1), rounding_mode="floor")
                T += more
            else:
                sequence = sequence_of(T, cu_seqlens)
                T += more * (len(cu_seqlens) - 1)
                cu_seqlens = cu_seqlens + more * torch.arange(len(cu_seqlens), device=v.device, dtype=cu_seqlens.dtype)
            self.place = token + more * sequence + offset.long()[sequence]
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
    o = W^T [q, 1] - s_t (acc^T [q, 1] + sum_(j<=t) ([q_t, 1].[k_j, 1]) u_j), s the token_scale."""
    dtype, (*_, H, D) = v.dtype, v.shape
    q, k, v, eta, weight, bias = (x.to(compute_dtype(v)) for x in (q, k, v, eta, weight, bias))
    batches = _MiniBatches(v, offset, cu_seqlens, mini_batch)
    one = torch.ones_like(k[..., :1])
    q_RCE = batches.pack(torch.cat([scale * q, one], -1))
    k_RCE = batches.pack(torch.cat([k, one], -1))
    target_RCD = batches.pack(v - k)
    eta_RC1 = batches.pack(eta.unsqueeze(-1))
    s_RC1 = batches.pack(one if token_scale is None else token_scale.to(v.dtype).unsqueeze(-1))
    if initial_state is None:
        initial_state = v.new_zeros(batches.layout.N, H, 2, D + 1, D)

    # 2. States: a complete mini-batch becomes W - s acc, and acc 0; in one that is not, W stays and acc goes on
    complete_R11 = k_RCE[:, -1:, -1:]  # 1 where the mini-batch's last place holds a token, else 0
    step_R11, unfinished_R11 = complete_R11 * s_RC1[:, -1:], 1 - complete_R11
    mix_R22 = _matrices(
        [torch.ones_like(step_R11), -step_R11],
        [torch.zeros_like(step_R11), unfinished_R11],
    )
    k_end = torch.cat([-step_R11 * k_RCE, unfinished_R11 * k_RCE], -1)

    # 3. Across mini-batches; W and acc lie side by side, [R, 2 E, D]
    def update(memory, target, k, eta, k_end, mix):
        z = (k @ memory[:, : D + 1]).unflatten(0, (-1, H))
        target = target.unflatten(0, (-1, H))
        u = eta * norm_loss_gradient(z, target, weight[:, None], bias[:, None], eps).flatten(0, 1)
        return _advance(memory, mix, k_end, u), u

    initial = initial_state.to(v.dtype).flatten(2, 3)
    before, u_RCD, final = batches.layout.scan(update, initial, target_RCD, k_RCE, eta_RC1, k_end, mix_R22)
    # 4. Outputs, from W and acc before the mini-batch, and 1. from inside
    o_RCD = torch.cat([q_RCE, -s_RC1 * q_RCE], -1) @ before
    inside_RCC = s_RC1 * (q_RCE @ k_RCE.mT).tril()
    o_RCD = torch.baddbmm(o_RCD, inside_RCC, u_RCD, alpha=-1)
    return batches.unpack(o_RCD).to(dtype), final.unflatten(2, (2, D + 1)) if return_state else None


def titans_linear(
    q, k, v, theta, g, m, *,
    scale, mini_batch, initial_state=None, offset=None, return_state=False, cu_seqlens=None,
):  # fmt: skip
    """See api.titans_linear. With u_j = theta_j (v_j - S_0^T k_j), S_t = e^(G_t) S + f_t Z + sum_(j<=t) c_tj k_j u_j^T,
    where c_tj = sum_(j<=i<=t) e^(G_t - G_i) e^(M_i - M_j), and f_t is c_tj with the start of the mini-batch for j."""
    dtype, (*_, H, V), K = v.dtype, v.shape, k.shape[-1]
    q, k, v, theta, g, m = (x.to(compute_dtype(v)) for x in (q, k, v, theta, g, m))
    batches = _MiniBatches(v, offset, cu_seqlens, mini_batch)
    q_RCK, k_RCK, v_RCV = (batches.pack(x) for x in (scale * q, k, v))
    theta_RC1, g_RC1, m_RC1 = (batches.pack(x.unsqueeze(-1)) for x in (theta, g, m))
    held_RC1 = batches.pack(torch.ones_like(k[..., :1]))  # 1 where a place holds a token, else 0
    if initial_state is None:
        initial_state = v.new_zeros(batches.layout.N, H, 3, K, V)

    # 1. Inside the mini-batch: what is left at t of S, and of Z, as they were at the start and as a token left them
    keep_RCP, momentum_RCP = _decays(g_RC1), _decays(m_RC1)
    keep_RCC = keep_RCP[..., 1:] * held_RC1.mT  # an empty place adds no Z to S
    f_RC1, c_RCC = (keep_RCC @ momentum_RCP).split([1, mini_batch], -1)
    keep_start_RC1 = keep_RCP[..., :1]

    # 2. States: what it writes to S_0, S and Z, and what it makes of them. Where it is complete S_0 becomes S
    complete_R11 = held_RC1[:, -1:]
    write_S_RC1, write_Z_RC1 = c_RCC[:, -1].unsqueeze(-1), momentum_RCP[:, -1, 1:].unsqueeze(-1)
    k_end = torch.cat([complete_R11 * write_S_RC1 * k_RCK, write_S_RC1 * k_RCK, write_Z_RC1 * k_RCK], -1)
    S_of_S, S_of_Z = keep_start_RC1[:, -1:], f_RC1[:, -1:]
    Z_of_Z, zero = momentum_RCP[:, -1:, :1], torch.zeros_like(complete_R11)
    mix_R33 = _matrices(
        [1 - complete_R11, complete_R11 * S_of_S, complete_R11 * S_of_Z],
        [zero, S_of_S, S_of_Z],
        [zero, zero, Z_of_Z],
    )

    # 3. Across mini-batches; S_0, S and Z lie side by side, [R, 3 K, V]
    def update(memory, v, k, theta, k_end, mix):
        u = theta * torch.baddbmm(v, k, memory[:, :K], alpha=-1)
        return _advance(memory, mix, k_end, u), u

    initial = initial_state.to(v.dtype).flatten(2, 3)
    before, u_RCV, final = batches.layout.scan(update, initial, v_RCV, k_RCK, theta_RC1, k_end, mix_R33)
    # 4. Outputs, from inside and from S and Z before the mini-batch
    inside_RCV = (c_RCC * (q_RCK @ k_RCK.mT)) @ u_RCV
    q_start = torch.cat([q_RCK * keep_start_RC1, q_RCK * f_RC1], -1)
    o_RCV = torch.baddbmm(inside_RCV, q_start, before[:, K:])
    return batches.unpack(o_RCV).to(dtype), final.unflatten(2, (3, K)) if return_state else None


def _matrices(*rows):
    """Rows of [R, 1, 1] as matrices [R, n, n]."""
    joined = [torch.cat(row, -1) for row in rows]
    return torch.cat(joined, 1)


def _advance(S, mix, k_end, u):
    """The n matrices of a memory [R, n K, V], mixed with the coefficients [R, n, n], plus a mini-batch's writes."""
    writes, n = k_end.mT @ u, mix.shape[1]
    return writes.view(len(S), n, -1).baddbmm_(mix, S.view(len(S), n, -1)).view(S.shape)


def _decays(g):
    """[R, C, 1] -> [R, C, P]: how much of the chunk's start, and of every token i, is left at t >= i; else 0.

    Sums over the tokens between, never differences of running sums: those lose a weak decay behind a strong one.
    """
    between = g.expand(-1, -1, g.shape[1] + 1).tril().cumsum(1)
    return between.exp().tril(1)
