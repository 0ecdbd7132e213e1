"""The update rules, chunk-parallel in torch (MATHS.md, "Chunk-parallel forms"); autograd does the backward.

Each in the four steps of arXiv 2405.21060: 1. inside the chunk, what its tokens have to do with each other; 2. states,
what a chunk adds to the state; 3. across chunks, the state before every chunk; 4. outputs, from inside the chunk and
from the state before it. Where what a chunk adds depends on the state before it, as a delta rule's writes, 2 is part
of 3.

Suffixes, of chunked tensors: R rows, one a (chunk, head); C tokens of a chunk; K, V key and value channels; D the
channels of a decay, K or 1. Only differences of running decays that are <= 0 are ever exponentiated, so nothing
overflows.
"""

import math
from itertools import product

import torch
from torch.nn.functional import pad, threshold

from .layout import Layout
from .reference import compute_dtype

MIN_CHUNK, MAX_CHUNK = 16, 64


def _chunk_length(tokens, sequences):
    """A power of two near a quarter of the mean length: short sequences would fill long chunks with padding."""
    quarter = min(max(tokens // max(sequences, 1) // 4, MIN_CHUNK), MAX_CHUNK)
    return 1 << (quarter.bit_length() - 1)


def _prepare(q, k, v, g, beta, scale, initial_state, cu_seqlens):
    """The layout; then, as chunks, q (scaled; or None), k [R, C, K], v [R, C, V], g [R, C, D], beta [R, C, 1]; and the
    initial states [N, HV, K, V]."""
    dtype, (B, T, HV, V) = compute_dtype(v), v.shape
    sequences, tokens = (B, B * T) if cu_seqlens is None else (len(cu_seqlens) - 1, T)
    layout = Layout(v, cu_seqlens, _chunk_length(tokens, sequences))

    def pack_keys(x):
        """One key head per value head."""
        groups = HV // x.shape[2]
        x = x if groups == 1 else x.repeat_interleave(groups, dim=2)
        return layout.pack(x.to(dtype))

    q = None if q is None else pack_keys(q) * scale
    k, v = pack_keys(k), layout.pack(v.to(dtype))
    if g is not None:
        g = g.to(dtype).clamp_min(-1e4)  # as good as -inf, whose differences are not numbers
        g = layout.pack(g if g.ndim == 4 else g.expand(B, T, HV).unsqueeze(-1))
    if beta is not None:
        beta = layout.pack(beta.to(dtype).unsqueeze(-1))
    if initial_state is None:
        initial_state = v.new_zeros(layout.N, HV, k.shape[-1], V)
    return layout, q, k, v, g, beta, initial_state.to(dtype)


def _exp(x, dtype):
    """e^x, and exactly 0 near the least normal number: arithmetic on subnormal ones is many times slower on a CPU."""
    return threshold(x.to(dtype), math.log(torch.finfo(dtype).tiny) + 7, -math.inf).exp()


def _decays(g):
    """G, the running sum of g [R, C, D] inside the chunk (float64), e^G and the decay of each token to the end."""
    # float64: where strong and weak decays meet, the small differences of large sums must survive
    G = g.double().cumsum(1)
    # Tokens that reach the end undecayed (the last one, and the last before padding) and a token by itself stay out of
    # G's gradient: their large terms would cancel there only up to rounding, and hide what decays strongly.
    to_end = pad(g[:, 1:].flip(1).cumsum(1).flip(1), (0, 0, 0, 1))
    return G, _exp(G, g.dtype), _exp(to_end, g.dtype)


def _products(lefts, rights, g):
    """The decayed products of a chunk, and the decays that tie it to its first and to its last state.

    Returns, with G the running sum of g inside the chunk: for every x of lefts and y of rights [R, C, K] the lower
    triangular [R, C, C] sum_c x_ic y_jc e^(G_ic - G_jc), all of a left together; every right decayed to the chunk's end
    [R, C, K]; e^G [R, C, K or 1] or None without decay.
    """
    if g is None:
        return [(x @ y.mT).tril() for x in lefts for y in rights], rights, None
    G, from_start, to_end = _decays(g)
    ends = [y * to_end for y in rights]
    if g.shape[-1] > 1:
        return _channel_products(lefts, rights, G), ends, from_start
    itself = torch.eye(g.shape[1], dtype=g.dtype, device=g.device)
    not_before = torch.ones_like(itself, dtype=torch.bool).triu()
    decay = _exp((G - G.mT).masked_fill(not_before, -math.inf), g.dtype) + itself
    return [(x @ y.mT) * decay for x in lefts for y in rights], ends, from_start


def _channel_products(lefts, rights, G):
    """As _products, for a decay a channel: halves of halves, so that every exponent is taken from between i and j.

    The triangle of 2h tokens is [[first h, 0], [second x first, second h]]; both factors of the square are decayed
    towards the first half's last token.
    """
    R, C, K = G.shape
    # h = 1: every token by itself
    blocks = [(x * y).sum(-1).view(R, C, 1, 1) for x in lefts for y in rights]
    h = 1
    while h < C:
        (Ga, Gb), *halves = (x.view(R, C // (2 * h), 2, h, K).unbind(2) for x in (G, *lefts, *rights))
        middle, dtype = Ga[:, :, -1:], lefts[0].dtype
        down, up = _exp(Gb - middle, dtype), _exp(middle - Ga, dtype)
        rows = [second * down for _, second in halves[: len(lefts)]]
        columns = [(first * up).mT for first, _ in halves[len(lefts) :]]
        for n, (x, y) in enumerate(product(rows, columns)):
            first, second = blocks[n].view(R, C // (2 * h), 2, h, h).unbind(2)
            upper = torch.cat([first, torch.zeros_like(first)], -1)
            blocks[n] = torch.cat([upper, torch.cat([x @ y, second], -1)], -2)
        h *= 2
    return [x.view(R, C, C) for x in blocks]


def _decayed(x, decay):
    return x if decay is None else x * decay


def _last(decay):
    """[R, C, D] -> [R, D, 1]: the decay of a whole chunk, as it acts on a state [R, K, V]."""
    return decay[:, -1].unsqueeze(-1)


def _with_decay(*tensors, decay):
    """What a walk takes of every chunk: the tensors and, where there is one, the decay of the whole chunk."""
    return tensors if decay is None else (*tensors, _last(decay))


def _walk_attention(layout, initial, k_end, v, decay, keep=True):
    """Steps 2 and 3 of linear_attention: the state before every chunk and the final states; keep as in Layout.scan."""
    # 2. States
    writes_RKV = k_end.mT @ v

    # 3. Across chunks
    def update(S, write, whole=None):
        kept = S if whole is None else whole * S
        return kept + write, None

    before_RKV, _, final = layout.scan(update, initial, *_with_decay(writes_RKV, decay=decay), keep=keep)
    return before_RKV, final


def _walk_delta(layout, initial, kk, k, k_end, v, beta, decay, keep=True):
    """The steps of delta_rule behind the products kk of its keys: the state before every chunk, the values that the
    chunk writes and the final states; keep as in Layout.scan."""
    # 1. Inside the chunk
    targets = beta * torch.cat([v, _decayed(k, decay)], -1)
    # unitriangular: the diagonal of kk is never read, neither here nor in the backward
    solved = torch.linalg.solve_triangular(beta * kk, targets, upper=False, unitriangular=True)
    u_RCV, w_RCK = solved.split([v.shape[-1], k.shape[-1]], -1)

    # 2. States and 3. across chunks
    def update(S, u, w, k_end, whole=None):
        values = torch.baddbmm(u, w, S, alpha=-1)
        kept = S if whole is None else whole * S
        return torch.baddbmm(kept, k_end.mT, values), values

    return layout.scan(update, initial, *_with_decay(u_RCV, w_RCK, k_end, decay=decay), keep=keep)


def _early(a):
    """a [R, C, K] one row early: a_{t+1} reads S_t, as q_t does."""
    return pad(a[:, 1:], (0, 0, 0, 1))


def _walk_dplr(layout, initial, products, ends, a, v, decay, keep=True):
    """The steps of dplr behind the products of _early(a) with k and with b: as _walk_delta, but u for the values."""
    # 1. Inside the chunk
    ak_RCC, ab_RCC = (pad(x[:, :-1], (0, 0, 1, 0)) for x in products)
    start_RCK = torch.cat([a[:, :1], a[:, 1:] * decay[:, :-1]], 1)
    targets = torch.cat([ak_RCC @ v, start_RCK], -1)
    # unitriangular, as in _walk_delta
    solved = torch.linalg.solve_triangular(-ab_RCC, targets, upper=False, unitriangular=True)
    u_RCV, w_RCK = solved.split([v.shape[-1], a.shape[-1]], -1)

    # 2. States and 3. across chunks; u now with what the state before the chunk adds, ends of k and, below, of b
    def update(S, u, w, v, ends, whole):
        u = torch.baddbmm(u, w, S)
        return torch.baddbmm(whole * S, ends.mT, torch.cat([v, u], 1)), u

    return layout.scan(update, initial, *_with_decay(u_RCV, w_RCK, v, torch.cat(ends, 1), decay=decay), keep=keep)


def linear_attention(q, k, v, g=None, *, scale, initial_state=None, return_state=False, cu_seqlens=None):
    """See api.linear_attention."""
    layout, q_RCK, k_RCK, v_RCV, g_RCD, _, initial = _prepare(q, k, v, g, None, scale, initial_state, cu_seqlens)
    # 1. Inside the chunk
    (qk_RCC,), (k_end_RCK,), decay_RCD = _products([q_RCK], [k_RCK], g_RCD)
    # 2. States and 3. across chunks
    before_RKV, final = _walk_attention(layout, initial, k_end_RCK, v_RCV, decay_RCD)
    # 4. Outputs
    o_RCV = torch.baddbmm(qk_RCC @ v_RCV, _decayed(q_RCK, decay_RCD), before_RKV)
    return layout.unpack(o_RCV).to(v.dtype), final if return_state else None


def delta_rule(q, k, v, beta, g=None, *, scale, initial_state=None, return_state=False, cu_seqlens=None):
    """See api.delta_rule. WY form (arXiv 2406.06484): with A the strict triangle of b_i k_i.k_j e^(G_i - G_j),
    u = (I+A)^-1 (b v), w = (I+A)^-1 (b e^G k), the rule on a chunk is linear attention over the values u - w S_0."""
    layout, q_RCK, k_RCK, v_RCV, g_RCD, beta_RC1, initial = _prepare(q, k, v, g, beta, scale, initial_state, cu_seqlens)
    # 1. Inside the chunk
    (qk_RCC, kk_RCC), (k_end_RCK,), decay_RCD = _products([q_RCK, k_RCK], [k_RCK], g_RCD)
    # 2. States and 3. across chunks
    chunks = kk_RCC, k_RCK, k_end_RCK, v_RCV, beta_RC1, decay_RCD
    before_RKV, values_RCV, final = _walk_delta(layout, initial, *chunks)
    # 4. Outputs
    o_RCV = torch.baddbmm(qk_RCC @ values_RCV, _decayed(q_RCK, decay_RCD), before_RKV)
    return layout.unpack(o_RCV).to(v.dtype), final if return_state else None


def dplr(q, k, v, a, b, g, *, scale, initial_state=None, return_state=False, cu_seqlens=None):
    """See api.dplr. a_{t+1} reads S_t, as q_t does: one row early, a is a second query, and no decay is its own.

    u_t = a_t^T S_{t-1} solves u = (I - A_ab)^-1 (A_ak v + a~ S_0), strict triangles and a~_i = a_i e^(G_{i-1}).
    """
    layout, q_RCK, k_RCK, v_RCV, g_RCK, _, initial = _prepare(q, k, v, g, None, scale, initial_state, cu_seqlens)
    a_RCK, b_RCK = (layout.pack(x.to(v_RCV.dtype)) for x in (a, b))
    # 1. Inside the chunk
    products, ends, decay_RCK = _products([q_RCK, _early(a_RCK)], [k_RCK, b_RCK], g_RCK)
    qk_RCC, qb_RCC, *of_early = products
    # 2. States and 3. across chunks
    before_RKV, u_RCV, final = _walk_dplr(layout, initial, of_early, ends, a_RCK, v_RCV, decay_RCK)
    # 4. Outputs
    inside_RCV = torch.baddbmm(qk_RCC @ v_RCV, qb_RCC, u_RCV)
    o_RCV = torch.baddbmm(inside_RCV, q_RCK * decay_RCK, before_RKV)
    return layout.unpack(o_RCV).to(v.dtype), final if return_state else None
