"""HGRN2 (arXiv 2404.07904): S_t = Diag(f_t) S_{t-1} + (1 - f_t) v_t^T, the forget gate's complement is the key."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from linear_moe.ops import linear_attention, widen
from linear_moe.ssm.mixer import HeadParameter, Mixer, Projection, require_equal_heads


class HGRN2(Mixer):
    """The paper's lower bounds are a softmax over layers, summed up to each; every layer here owns its own bound, which
    starts where the paper's start (l / L) and is free from there on, so that no parameter spans pipeline stages.
    The output norm is one of each head, where the paper's is one of all, so that heads shard."""

    rule = "Diag(f) S + (1 - f) v^T, f = lb + (1 - lb) sigmoid(.), lb = 0 in the first layer"
    paper = "arXiv 2404.07904"

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        def __post_init__(self) -> None:
            super().__post_init__()
            require_equal_heads(self, "hgrn2's keys are its gates")

    def projections(self):
        c = self.config
        return {
            "q": Projection(width=c.head_dim, role="read", per="key", conv=True, activation="silu"),
            "a": Projection(width=c.head_dim, role="write", conv=True),
            "v": Projection(width=c.value_head_dim, role="write", conv=True),
        }

    def parameters_per_head(self):
        if self.layer == 0:
            return {}
        start = self.layer / self.num_layers
        logit = math.log(start / (1 - start))
        return {
            "lower_bound": HeadParameter(init=lambda heads: torch.full((heads, self.config.head_dim), logit)),
        }

    def recur(self, q, a, v, *, p, scan):
        a = widen(a)
        g, k = F.logsigmoid(a), torch.sigmoid(-a)
        if "lower_bound" in p:  # f = lb + (1 - lb) sigmoid(a), and 1 - f without cancellation
            bound = widen(p["lower_bound"])
            g = torch.logaddexp(F.logsigmoid(bound), F.logsigmoid(-bound) + g)
            k = torch.sigmoid(-bound) * k
        return scan(linear_attention, q, k.to(q.dtype), v, g, scale=1.0)
