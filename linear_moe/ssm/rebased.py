"""ReBased (arXiv 2402.10644): S_t = S_{t-1} + phi(k_t) v_t^T, phi(q).phi(k) the square of a learned product."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.ops import widen
from linear_moe.ssm.based import Based, quadratic


class ReBased(Based):
    rule = "S + phi(k) v^T, phi(q).phi(k) = (q'.k')^2 / K, x' = gamma LN(x) + beta; divided by q.sum(k)"
    paper = "arXiv 2402.10644"

    @dataclass(frozen=True, kw_only=True)
    class Config(Based.Config):
        """head_dim: before the feature map, 16 unless given; the state has K (K + 1) / 2 key channels.

        divisor_eps: added to q.sum(k), which is 1 for a typical pair but near 0 where a token has met nothing like it:
            far below this, float32's rounding of a sum of terms of both signs decides the quotient and its gradient.
            (Published code has 1e-5.)
        """

        divisor_eps: float = 1e-2

    @property
    def key_channels(self):
        return self.config.head_dim * (self.config.head_dim + 1) // 2

    def shared_parameters(self):
        K = self.config.head_dim
        return {"gamma": lambda: torch.ones(K), "beta": lambda: torch.zeros(K)}

    def feature_map(self, x: Tensor, p) -> Tensor:
        x = F.layer_norm(widen(x), x.shape[-1:]) * widen(p["gamma"]) + widen(p["beta"])
        return quadratic(x * x.shape[-1] ** -0.25)

    def recur(self, q, k, v, *, p, scan):
        """In float32: phi's terms have both signs, and in bfloat16 the sum of squares would drown in their rounding."""
        return super().recur(q, k, widen(v), p=p, scan=scan).to(v.dtype)
