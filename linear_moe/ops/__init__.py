"""Update rules, short convolution and routing as pure functions of tensors."""

from .api import (
    apply_summary,
    combine,
    compose_summaries,
    delta_rule,
    dplr,
    gated_norm,
    grouped_linear,
    gsa,
    linear_attention,
    route,
    rwkv6,
    short_conv,
    summary,
    titans_linear,
    ttt_linear,
)
from .decoding import conv_step, shift_step, step
from .norm import l2_norm, rms_norm, widen
from .routing import Routes, gather, topk_router
from .shift import token_shift

__all__ = [
    "Routes",
    "apply_summary",
    "combine",
    "compose_summaries",
    "conv_step",
    "delta_rule",
    "dplr",
    "gated_norm",
    "gather",
    "grouped_linear",
    "gsa",
    "l2_norm",
    "linear_attention",
    "rms_norm",
    "route",
    "rwkv6",
    "shift_step",
    "short_conv",
    "step",
    "summary",
    "titans_linear",
    "token_shift",
    "topk_router",
    "ttt_linear",
    "widen",
]
