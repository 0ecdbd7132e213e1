"""Gated slot attention (arXiv 2409.07146): softmax attention over m slots that are written by gates."""

from dataclasses import dataclass

import torch.nn.functional as F

from linear_moe.ops import combine, gsa, rms_norm, widen
from linear_moe.ssm.mixer import Mixer, Projection, require_equal_heads


class GatedSlotAttention(Mixer):
    """The published layer normalises over all heads at once; here each head has its norm, so that heads shard.
    Queries are scaled by K^-1/2 (published code has no scale, which a learned projection can undo)."""

    rule = "K = Diag(e^g) K + (1 - e^g) k^T, V likewise; o = V^T softmax(K q), g = logsigmoid(.) / gate_normalizer"
    paper = "arXiv 2409.07146"

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """num_slots: m, of each head; 0 for head_dim. gate_normalizer: divides the log decay."""

        num_slots: int = 0
        gate_normalizer: float = 8.0

        def __post_init__(self) -> None:
            super().__post_init__()
            require_equal_heads(self, "gsa's slots hold a key and a value")
            if self.num_slots < 0:
                raise ValueError(f"mixer option num_slots must not be negative, but is {self.num_slots}")
            if self.gate_normalizer <= 0:
                raise ValueError(f"mixer option gate_normalizer must be positive, but is {self.gate_normalizer}")

    @property
    def key_channels(self):
        """The slots."""
        return self.config.num_slots or self.config.head_dim

    @property
    def rule_flops(self):
        return 4 + 4 * self.config.head_dim / self.config.value_head_dim

    @property
    def state_size(self):
        c = self.config
        return c.num_heads * self.key_channels * (c.head_dim + c.value_head_dim)

    def projections(self):
        c = self.config
        return {
            "q": Projection(width=c.head_dim, role="read", conv=True, activation="silu"),
            "k": Projection(width=c.head_dim, role="write", conv=True, activation="silu"),
            "v": Projection(width=c.value_head_dim, role="write", conv=True, activation="silu"),
            "slots": Projection(width=self.key_channels, role="write"),
        }

    def recur(self, q, k, v, slots, *, p, scan):
        g = F.logsigmoid(widen(slots)) / self.config.gate_normalizer
        return scan(gsa, q, k, v, (-g.expm1()).to(v.dtype), g)

    def output(self, o, gate, p, routes):
        o = o if routes is None else combine(o, routes)
        return rms_norm(F.silu(o), p["norm"], self.config.norm_eps)
