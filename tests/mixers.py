"""Mixers from outside the package: one that anybody could add, and two that are wrong on purpose."""

import torch

from linear_moe.ops import linear_attention
from linear_moe.ops.sequences import Sequences
from linear_moe.ssm import HeadParameter, Mixer, Projection
from linear_moe.ssm.gated_deltanet import GatedDeltaNet
from linear_moe.ssm.scan import Plain


class Toy(Mixer):
    """Linear attention with one learned decay a head: all that a new mixer needs."""

    rule = "e^g S + k v^T, g learned"

    def projections(self):
        c = self.config
        return {
            "q": Projection(width=c.head_dim, role="read", per="key"),
            "k": Projection(width=c.head_dim, role="write", per="key"),
            "v": Projection(width=c.value_head_dim, role="write"),
        }

    def parameters_per_head(self):
        return {"decay": HeadParameter(init=torch.zeros)}

    def recur(self, q, k, v, *, p, scan):
        return scan(linear_attention, q, k, v, -torch.nn.functional.softplus(p["decay"]))


class Peeking(GatedDeltaNet):
    """Looks one token ahead."""

    def recur(self, q, k, v, *operands, **kwargs):
        return super().recur(q, k.roll(-1, 1), v.roll(-1, 1), *operands, **kwargs)


class Crossing(GatedDeltaNet):
    """Does not start anew at the borders of packed sequences."""

    def recur(self, q, *operands, p, scan):
        return super().recur(q, *operands, p=p, scan=Plain(Sequences.of(q)))
