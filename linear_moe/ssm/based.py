"""Based (arXiv 2402.18668): S_t = S_{t-1} + phi(k_t) v_t^T, phi the second-order Taylor expansion of exp."""

from dataclasses import dataclass

import torch
from torch import Tensor

from linear_moe.ops import combine
from linear_moe.ssm.linear_attention import normalized_attention
from linear_moe.ssm.mixer import Mixer, Projection

MAX_HEAD_DIM = 64  # more would make a state of thousands of key channels


class Based(Mixer):
    rule = "S + phi(k) v^T, phi(q).phi(k) = 1 + x + x^2 / 2 of x = q.k / sqrt(K); divided by q.sum(k)"
    paper = "arXiv 2402.18668"

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """head_dim: before the feature map, 16 unless given; the state has 1 + K + K (K + 1) / 2 key channels.

        divisor_eps: added to q.sum(k).
        """

        divisor_eps: float = 1e-6

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.head_dim > MAX_HEAD_DIM:
                raise ValueError(
                    f"mixer option head_dim must be at most {MAX_HEAD_DIM}, but is {self.head_dim}: "
                    "a second-order feature map squares it"
                )
            if self.divisor_eps <= 0:
                raise ValueError(f"mixer option divisor_eps must be positive, but is {self.divisor_eps}")

    @classmethod
    def default_options(cls, hidden_size, num_attention_heads):
        return {**super().default_options(hidden_size, num_attention_heads), "head_dim": 16}

    @property
    def key_channels(self):
        K = self.config.head_dim
        return 1 + K + K * (K + 1) // 2

    @property
    def state_size(self):
        c = self.config
        return c.num_value_heads * self.key_channels * (c.value_head_dim + 1)

    def projections(self):
        c = self.config
        return {
            "q": Projection(width=c.head_dim, role="read", per="key", conv=True),
            "k": Projection(width=c.head_dim, role="write", per="key", conv=True),
            "v": Projection(width=c.value_head_dim, role="write", conv=True),
        }

    def shared_parameters(self):
        return {}

    def feature_map(self, x: Tensor, p) -> Tensor:
        x = x * x.shape[-1] ** -0.25
        return torch.cat([torch.ones_like(x[..., :1]), x, 0.5**0.5 * quadratic(x)], -1)

    def recur(self, q, k, v, *, p, scan):
        q, k = (self.feature_map(x, p).to(v.dtype) for x in (q, k))
        return normalized_attention(scan, q, k, v, eps=self.config.divisor_eps)

    def output(self, o, gate, p, routes):
        """The quotient is normalised already."""
        return o if routes is None else combine(o, routes)


def quadratic(x: Tensor) -> Tensor:
    """phi ``[..., K (K + 1) / 2]`` of x ``[..., K]`` with phi(x).phi(y) = (x.y)^2."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], 1, device=x.device)
    return torch.cat([x.square(), 2**0.5 * x[..., i] * x[..., j]], -1)
