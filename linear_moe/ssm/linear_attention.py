"""Linear attention (arXiv 2006.16236): S_t = S_{t-1} + phi(k_t) v_t^T."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from linear_moe.ops import linear_attention
from linear_moe.ssm.mixer import Mixer, Projection

FEATURE_MAPS = {"elu": lambda x: F.elu(x) + 1, "relu": F.relu, "identity": lambda x: x}


class LinearAttention(Mixer):
    rule = "S + phi(k) v^T"
    paper = "arXiv 2006.16236"

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """feature_map: phi. normalize: divide the answer by q . (sum of k)."""

        feature_map: str = "elu"
        normalize: bool = False

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.feature_map not in FEATURE_MAPS:
                raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, but is {self.feature_map!r}")
            if self.normalize and self.feature_map == "identity":
                raise ValueError("normalize needs a feature_map that is not negative (elu, relu), but it is 'identity'")

    def projections(self):
        c = self.config
        return {
            "q": Projection(width=c.head_dim, role="read", per="key", conv=True),
            "k": Projection(width=c.head_dim, role="write", per="key", conv=True),
            "v": Projection(width=c.value_head_dim, role="write", conv=True),
        }

    def recur(self, q, k, v, *, p, state, return_state, cu_seqlens, positions):
        phi = FEATURE_MAPS[self.config.feature_map]
        if self.config.normalize:
            # The sum of the keys is carried as one more value column, which is always 1.
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        o, state = linear_attention(
            phi(q), phi(k), v, initial_state=state, return_state=return_state, cu_seqlens=cu_seqlens
        )
        if self.config.normalize:
            o = o[..., :-1] / (o[..., -1:] + 1e-6)
        return o, state
