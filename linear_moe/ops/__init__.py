"""Update rules, short convolution and routing as pure functions of tensors."""

from .api import delta_rule, linear_attention, short_conv, step
from .grouped import grouped_linear
from .routing import Routes, combine, gather, route, topk_router

__all__ = [
    "Routes",
    "combine",
    "delta_rule",
    "gather",
    "grouped_linear",
    "linear_attention",
    "route",
    "short_conv",
    "step",
    "topk_router",
]
