"""Titans' linear memory (arXiv 2501.00663): gradient steps with momentum and forgetting, of mini-batches of 16."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from linear_moe.ops import titans_linear, widen
from linear_moe.ssm.mixer import HeadParameter, Mixer, Projection, require_equal_heads

MINI_BATCH = 16


class Titans(Mixer):
    """The learning rate is sigmoid(.) / 16: with unit keys a mini-batch's steps then add up to one at most."""

    rule = "(1 - alpha) S + Z, Z = eta Z - theta k (S_0^T k - v)^T, S_0 the memory before the mini-batch of 16"
    paper = "arXiv 2501.00663"
    default_conv_size = 4
    rule_flops = 8

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """momentum, forget: what eta and alpha start at, in (0, 1)."""

        momentum: float = 0.5
        forget: float = 0.01

        def __post_init__(self) -> None:
            super().__post_init__()
            require_equal_heads(self, "titans' memory maps keys to values")
            for name in ("momentum", "forget"):
                if not 0 < getattr(self, name) < 1:
                    raise ValueError(f"mixer option {name} must lie between 0 and 1, but is {getattr(self, name)}")

    @property
    def state_size(self):
        """The memory before the mini-batch, the memory, and its momentum."""
        return 3 * super().state_size

    def projections(self):
        c = self.config
        return {
            "q": Projection(width=c.head_dim, role="read", conv=True, activation="silu", normalize=True),
            "k": Projection(width=c.head_dim, role="write", conv=True, activation="silu", normalize=True),
            "v": Projection(width=c.value_head_dim, role="write", conv=True, activation="silu"),
            "theta": Projection(width=1, role="write"),
            "alpha": Projection(width=1, role="write"),
            "eta": Projection(width=1, role="write"),
            "gate": Projection(width=c.value_head_dim, role="gate"),
        }

    def parameters_per_head(self):
        def logit(p: float) -> HeadParameter:
            return HeadParameter(init=lambda heads: torch.full((heads,), p).logit())

        return {"alpha_bias": logit(self.config.forget), "eta_bias": logit(self.config.momentum)}

    def recur(self, q, k, v, theta, alpha, eta, *, p, scan):
        theta, alpha, eta = (widen(x.squeeze(-1)) for x in (theta, alpha, eta))
        return scan(
            titans_linear,
            q,
            k,
            v,
            torch.sigmoid(theta) / MINI_BATCH,
            F.logsigmoid(-alpha - widen(p["alpha_bias"])),
            F.logsigmoid(eta + widen(p["eta_bias"])),
            mini_batch=MINI_BATCH,
        )
