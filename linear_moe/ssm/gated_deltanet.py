"""Gated DeltaNet (arXiv 2412.06464): S_t = e^{g_t} (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T."""

import math
from dataclasses import dataclass, field

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
        shape = (heads,) if channels is None else (heads, channels)
        return _before_softplus(torch.exp(low + (high - low) * torch.rand(shape)))

    return {
        "A_log": HeadParameter(init=lambda heads: torch.empty(heads).uniform_(1, 16).log()),
        "dt_bias": HeadParameter(init=dt_bias),
    }


def even_decay_parameters() -> dict[str, HeadParameter]:
    """A_log and dt_bias with which head i of H starts at a decay of 0.001 * 100^((i + 1/2) / H) a token."""

    def dt_bias(heads: int) -> torch.Tensor:
        return _before_softplus(1e-3 * 100 ** ((torch.arange(heads) + 0.5) / heads))

    return {"A_log": HeadParameter(init=torch.zeros), "dt_bias": HeadParameter(init=dt_bias)}


def _before_softplus(dt: torch.Tensor) -> torch.Tensor:
    return dt + torch.log(-torch.expm1(-dt))


class GatedDeltaNet(DeltaNet):
    rule = "e^g (I - b k k^T) S + b k v^T, g = -exp(A_log) softplus(a + dt_bias), b = sigmoid(.)"
    paper = "arXiv 2412.06464"

    @dataclass(frozen=True, kw_only=True)
    class Config(DeltaNet.Config):
        """even_decays: heads start with decays of 0.001 to 0.1 a token, evenly spread in the log. False: with Mamba-2's
        random ones, as in the paper, of 0.001 to 1.6; a head at 1.6 forgets within a token, and all memories share it.
        """

        even_decays: bool = field(default=True, compare=False)  # how weights start: no checkpoint depends on it

    def projections(self):
        return {
            **super().projections(),
            "a": Projection(width=1, role="write"),
            "gate": Projection(width=self.config.value_head_dim, role="gate"),
        }

    def parameters_per_head(self):
        return even_decay_parameters() if self.config.even_decays else decay_parameters()

    def recur(self, q, k, v, beta, a, *, p, scan):
        g = -widen(p["A_log"]).exp() * F.softplus(widen(a.squeeze(-1)) + p["dt_bias"])
        return super().recur(q, k, v, beta, p=p, scan=scan, g=g)
