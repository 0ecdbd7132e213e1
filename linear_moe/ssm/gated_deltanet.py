"""Gated DeltaNet (arXiv 2412.06464): S_t = e^{g_t} (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T."""

import math

import torch
import torch.nn.functional as F

from linear_moe.ops import widen
from linear_moe.ssm.deltanet import DeltaNet
from linear_moe.ssm.mixer import HeadParameter, Projection


def decay_parameters(channels: int | None = None) -> dict[str, HeadParameter]:
    """Mamba-2's A_log and dt_bias: A uniform in [1, 16], softplus(dt_bias) log-uniform in [0.001, 0.1].

    dt_bias is ``[heads]``, or ``[heads, channels]`` for a decay a channel.
    """

    def dt_bias(heads: int) -> torch.Tensor:
        low, high = math.log(1e-3), math.log(1e-1)
        dt = torch.exp(low + (high - low) * torch.rand(heads if channels is None else (heads, channels)))
        return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus

    return {
        "A_log": HeadParameter(init=lambda heads: torch.empty(heads).uniform_(1, 16).log()),
        "dt_bias": HeadParameter(init=dt_bias),
    }


class GatedDeltaNet(DeltaNet):
    rule = "e^g (I - b k k^T) S + b k v^T, g = -exp(A_log) softplus(a + dt_bias), b = sigmoid(.)"
    paper = "arXiv 2412.06464"

    def projections(self):
        return {
            **super().projections(),
            "a": Projection(width=1, role="write"),
            "gate": Projection(width=self.config.value_head_dim, role="gate"),
        }

    def parameters_per_head(self):
        return decay_parameters()

    def recur(self, q, k, v, beta, a, *, p, **options):
        g = -widen(p["A_log"]).exp() * F.softplus(widen(a.squeeze(-1)) + p["dt_bias"])
        return super().recur(q, k, v, beta, p=p, g=g, **options)
