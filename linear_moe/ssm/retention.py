"""Retention (RetNet, arXiv 2307.08621): S_t = gamma_h S_{t-1} + k_t v_t^T with rotary q, k and one decay a head."""

from dataclasses import dataclass

import torch

from linear_moe.ops import linear_attention
from linear_moe.ssm.mixer import HeadParameter, Mixer, Projection, rotary


class Retention(Mixer):
    rule = "e^g S + k v^T, g = log(1 - 2^(-5-h))"
    paper = "arXiv 2307.08621"

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """rotary_base: of the rotary embedding of q and k."""

        rotary_base: float = 10000.0

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.head_dim % 2:
                raise ValueError(f"retention needs an even head_dim for its rotary embedding, but has {self.head_dim}")

    def projections(self):
        c = self.config
        return {
            "q": Projection(width=c.head_dim, role="read", per="key", conv=True),
            "k": Projection(width=c.head_dim, role="write", per="key", conv=True),
            "v": Projection(width=c.value_head_dim, role="write", conv=True),
            "gate": Projection(width=c.value_head_dim, role="gate"),
        }

    def parameters_per_head(self):
        return {
            "g": HeadParameter(init=lambda heads: (-(2.0 ** (-5.0 - torch.arange(heads)))).log1p(), trainable=False)
        }

    def recur(self, q, k, v, *, p, scan):
        q, k = (rotary(x, scan.sequences.positions, self.config.rotary_base) for x in (q, k))
        return scan(linear_attention, q, k, v, p["g"])
