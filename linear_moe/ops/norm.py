"""The norms of a mixer layer, in torch; computed in at least float32."""

import torch
from torch.nn.functional import sigmoid, silu

from .routing import combine

GATES = {"silu": silu, "sigmoid": sigmoid}


def widen(x):
    """x in at least float32: gates, decays and norms are never computed in less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def l2_norm(x):
    """x / sqrt(|x|^2 + 1e-6) over the last dimension, in x's dtype."""
    wide = widen(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rms_norm(x, weight, eps):
    """RMS norm over the last dimension, in x's dtype. weight: [..., D]."""
    wide = widen(x)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight).to(x.dtype)


def gated_norm(o, weight, gate=None, *, eps, activation="silu", routes=None):
    """See api.gated_norm."""
    o = rms_norm(o if routes is None else combine(o, routes), weight, eps)
    return o if gate is None else o * GATES[activation](gate)
