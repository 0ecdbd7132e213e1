"""Update rules, short convolution and routing as pure functions of tensors."""

from .api import combine, delta_rule, gated_norm, grouped_linear, linear_attention, route, short_conv, step
from .norm import l2_norm, rms_norm, widen
from .routing import Routes, gather, topk_router

__all__ = [
    "Routes",
    "combine",
    "delta_rule",
    "gated_norm",
    "gather",
    "grouped_linear",
    "l2_norm",
    "linear_attention",
    "rms_norm",
    "route",
    "short_conv",
    "step",
    "topk_router",
    "widen",
]
