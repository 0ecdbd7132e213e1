"""Gated linear attention (arXiv 2312.06635): S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T, a decay for every key channel."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from linear_moe.ops import linear_attention, widen
from linear_moe.ssm.mixer import HeadParameter, Mixer, Projection


class GatedLinearAttention(Mixer):
    rule = "Diag(e^g) S + k v^T, g = logsigmoid(W2 W1 x + b) / 16"
    paper = "arXiv 2312.06635"

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """gate_rank: rank of the decay's projection. gate_normalizer: its log-sigmoid is divided by this."""

        gate_rank: int = 16
        gate_normalizer: float = 16.0

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.gate_rank < 1 or self.gate_normalizer <= 0:
                raise ValueError(
                    f"gate_rank ({self.gate_rank}) must be at least 1 and "
                    f"gate_normalizer ({self.gate_normalizer}) positive"
                )

    def projections(self):
        c = self.config
        return {
            "q": Projection(width=c.head_dim, role="read", per="key", conv=True),
            "k": Projection(width=c.head_dim, role="write", per="key", conv=True),
            "v": Projection(width=c.value_head_dim, role="write", conv=True),
            "a": Projection(width=c.head_dim, role="write", low_rank=c.gate_rank),
            "gate": Projection(width=c.value_head_dim, role="gate"),
        }

    def parameters_per_head(self):
        return {"g_bias": HeadParameter(init=lambda heads: torch.zeros(heads, self.config.head_dim))}

    def recur(self, q, k, v, a, *, p, scan):
        g = F.logsigmoid(widen(a) + p["g_bias"]) / self.config.gate_normalizer
        return scan(linear_attention, q, k, v, g)
