"""Rules that are made of other rules, of any backend: `attention` is its linear_attention."""

from .reference import compute_dtype
from .shift import token_shift


def rwkv6(attention, q, k, v, g, u, *, scale, initial_state=None, return_state=False, cu_seqlens=None):
    """See api.rwkv6. What token t asks of S_{t-1}, token t - 1 asks early, and the answer is moved one token on."""
    dtype = compute_dtype(v)
    options = {"initial_state": initial_state, "return_state": return_state, "cu_seqlens": cu_seqlens}
    # 1. Answers, one token early [B, T, H, V]. A sequence's last token asks with a stranger's query: see 2.
    early, state = attention(q.roll(-1, 1), k, v, g, scale=scale, **options)
    # 2. One token on, which drops a sequence's last one; its first one gets what the initial state answers [N, H V]
    first = None
    if initial_state is not None:
        first = scale * _first_answers(q, initial_state.to(dtype), cu_seqlens).flatten(1)
    answers, _ = token_shift(early.flatten(2), initial_state=first, cu_seqlens=cu_seqlens)
    # 3. The token's own bonus [B, T, H, 1]
    bonus = scale * (q.to(dtype) * u.to(dtype) * k.to(dtype)).sum(-1, keepdim=True)
    return (answers.view(v.shape) + bonus * v).to(v.dtype), state


def _first_answers(q, state, cu_seqlens):
    """state [N, H, K, V]^T q of every sequence's first token: [N, H, V]; of an empty one anything."""
    if q.shape[1] == 0:
        return state.new_zeros(state.shape[0], state.shape[1], state.shape[3])
    first = q[:, 0] if cu_seqlens is None else q[0, cu_seqlens[:-1].clamp(max=q.shape[1] - 1)]
    return (first.to(state.dtype).unsqueeze(-2) @ state).squeeze(-2)


def gsa(attention, read_by_value, q, k, v, s, g, *, scale, initial_state=None, return_state=False, cu_seqlens=None):
    """See api.gsa. `read_by_value`: the backend's, see slots.py."""
    first_keys, first_values = (None, None) if initial_state is None else initial_state
    options = {"return_state": return_state, "cu_seqlens": cu_seqlens}
    # 1. Which slots a token asks: r = scale Kt q over the slots, p their softmax [B, T, H, M]
    r, keys = read_by_value(q, s, k, g, scale=scale, initial_state=first_keys, **options)
    p = r.softmax(-1).to(v.dtype)
    # 2. What they hold: o = Vt^T p
    o, values = attention(p, s, v, g, scale=1.0, initial_state=first_values, **options)
    return o, (keys, values) if return_state else None
