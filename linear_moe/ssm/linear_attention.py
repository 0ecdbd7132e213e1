"""Linear attention (arXiv 2006.16236): S_t = S_{t-1} + phi(k_t) v_t^T."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.ops import linear_attention, widen
from linear_moe.ssm.mixer import Mixer, Projection


def dpfp(x: Tensor, nu: int) -> Tensor:
    """Deterministic parameter-free projection (arXiv 2102.11174): ``[..., K]`` -> ``[..., 2 K nu]``."""
    x = torch.cat([x, -x], -1).relu()
    return torch.cat([x * x.roll(shift, -1) for shift in range(1, nu + 1)], -1)


def hedgehog(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A learned map that imitates softmax (arXiv 2402.04347): ``[..., K]`` -> ``[..., 2 K]``, summing to 1."""
    y = 2 * widen(F.linear(x, weight.to(x.dtype), bias.to(x.dtype)))
    return torch.cat([y, -y], -1).softmax(-1)


def t2r(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A learned map behind a ReLU (arXiv 2103.13076)."""
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype)).relu()


FIXED = {"elu": lambda x: F.elu(x) + 1, "relu": F.relu, "identity": lambda x: x}
LEARNED: dict[str, Callable] = {"hedgehog": hedgehog, "t2r": t2r}  # one map for q and one for k, of all heads
FEATURE_MAPS = (*FIXED, "dpfp", *LEARNED)


class LinearAttention(Mixer):
    rule = "S + phi(k) v^T"
    paper = "arXiv 2006.16236"

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """feature_map: phi. normalize: divide the answer by q . (sum of k). nu: of dpfp, which has 2 K nu channels."""

        feature_map: str = "elu"
        normalize: bool = False
        nu: int = 1

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.feature_map not in FEATURE_MAPS:
                raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, but is {self.feature_map!r}")
            if self.normalize and self.feature_map == "identity":
                raise ValueError("normalize needs a feature_map that is not negative, but it is 'identity'")
            if not 1 <= self.nu < 2 * self.head_dim:
                raise ValueError(f"nu ({self.nu}) must be between 1 and 2 head_dim - 1 ({2 * self.head_dim - 1})")

    @property
    def key_channels(self):
        c = self.config
        return c.head_dim * {"dpfp": 2 * c.nu, "hedgehog": 2}.get(c.feature_map, 1)

    @property
    def state_size(self):
        c = self.config
        return c.num_value_heads * self.key_channels * (c.value_head_dim + c.normalize)

    def projections(self):
        c = self.config
        return {
            "q": Projection(width=c.head_dim, role="read", per="key", conv=True),
            "k": Projection(width=c.head_dim, role="write", per="key", conv=True),
            "v": Projection(width=c.value_head_dim, role="write", conv=True),
        }

    def shared_parameters(self):
        K = self.config.head_dim
        parameters = super().shared_parameters()
        if self.config.feature_map in LEARNED:  # hedgehog's published start; a good one for t2r, too
            for name in ("q", "k"):
                parameters |= {f"{name}_map": lambda: torch.eye(K), f"{name}_map_bias": lambda: torch.zeros(K)}
        return parameters

    def feature_map(self, x: Tensor, name: str, p: Mapping[str, Tensor]) -> Tensor:
        """phi of q or k, which its name tells."""
        kind = self.config.feature_map
        if kind in LEARNED:
            return LEARNED[kind](x, p[f"{name}_map"], p[f"{name}_map_bias"]).to(x.dtype)
        return dpfp(x, self.config.nu) if kind == "dpfp" else FIXED[kind](x)

    def recur(self, q, k, v, *, p, scan):
        q, k = self.feature_map(q, "q", p), self.feature_map(k, "k", p)
        if self.config.normalize:
            return normalized_attention(scan, q, k, v, eps=1e-6)
        return scan(linear_attention, *widen_half(q, k, v))


def widen_half(*operands):
    """float16 operands in float32: a sum over all tokens that nothing decays leaves float16's range, and its gradient
    falls below it."""
    return [x.float() if x.dtype == torch.float16 else x for x in operands]


def normalized_attention(scan, q, k, v, *, eps):
    """Linear attention divided by q . (sum of k) + eps; the sum is carried as one more value column, which is always 1.

    Shapes as in ops.linear_attention; the state is ``[N, HV, K, V + 1]``.
    """
    with_one = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    o = widen(scan(linear_attention, *widen_half(q, k, with_one), scale=1.0))
    return (o[..., :-1] / (o[..., -1:] + eps)).to(v.dtype)
