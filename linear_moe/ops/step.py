"""One token of a rule, for decoding."""

from .reference import compute_dtype


def step(rule, state, q, k, v, beta, g, a, b, *, scale):
    """See api.step. Without a batch loop and without a time loop: two or three passes over the state."""
    dtype, (B, HV, _) = v.dtype, v.shape
    compute = compute_dtype(v)
    q, k = (x.to(compute).repeat_interleave(HV // x.shape[1], dim=1) for x in (q, k))
    before, v = state.to(compute), v.to(compute)
    S = before
    if g is not None:
        g = g.to(compute)
        S = S * (g if g.ndim == 3 else g.expand(B, HV).unsqueeze(-1)).exp().unsqueeze(-1)
    S = S + k.unsqueeze(-1) * RULES[rule](S, k, v, beta).unsqueeze(-2)
    if a is not None:
        S = S + b.to(compute).unsqueeze(-1) * (a.to(compute).unsqueeze(-2) @ before)
    return (scale * q.unsqueeze(-2) @ S).squeeze(-2).to(dtype), S


def _attention_value(S, k, v, beta):
    return v


def _delta_value(S, k, v, beta):
    return beta.to(v.dtype).unsqueeze(-1) * (v - (k.unsqueeze(-2) @ S).squeeze(-2))


# what a rule writes under the key k
RULES = {"linear_attention": _attention_value, "delta_rule": _delta_value, "dplr": _attention_value}
