"""Kimi delta attention (arXiv 2510.26692): S_t = (I - b_t k_t k_t^T) Diag(e^{g_t}) S_{t-1} + b_t k_t v_t^T."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from linear_moe.ops import widen
from linear_moe.ssm.deltanet import DeltaNet
from linear_moe.ssm.gated_deltanet import decay_parameters
from linear_moe.ssm.mixer import HeadParameter, Projection


class KimiDeltaAttention(DeltaNet):
    rule = "(I - b k k^T) Diag(e^g) S + b k v^T, g = -exp(A_log) softplus(W2 W1 x + dt_bias), b = sigmoid(.)"
    paper = "arXiv 2510.26692"
    gate_activation = "sigmoid"

    @dataclass(frozen=True, kw_only=True)
    class Config(DeltaNet.Config):
        """gate_rank: rank of the projections of the decay and of the output gate; 0 for the value head's width."""

        gate_rank: int = 0

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.gate_rank < 0:
                raise ValueError(f"mixer option gate_rank must not be negative, but is {self.gate_rank}")

    def projections(self):
        c = self.config
        rank = c.gate_rank or c.value_head_dim
        return {
            **super().projections(),
            "a": Projection(width=c.head_dim, role="write", low_rank=rank),
            "gate": Projection(width=c.value_head_dim, role="gate", low_rank=rank),
        }

    def parameters_per_head(self):
        return {
            **decay_parameters(channels=self.config.head_dim),
            "gate_bias": HeadParameter(init=lambda heads: torch.zeros(heads, self.config.value_head_dim)),
        }

    def recur(self, q, k, v, beta, a, *, p, scan):
        g = -widen(p["A_log"]).exp()[:, None] * F.softplus(widen(a) + p["dt_bias"])
        return super().recur(q, k, v, beta, p=p, scan=scan, g=g)

    def output(self, o, gate, p, routes):
        return super().output(o, gate + p["gate_bias"].to(gate.dtype), p, routes)
