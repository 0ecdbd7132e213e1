"""TTT-Linear (arXiv 2407.04620): the memory is a linear model that takes a gradient step for every 16 tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.ops import ttt_linear, widen
from linear_moe.ssm.mixer import HeadParameter, Mixer, Projection, require_equal_heads

MINI_BATCH = 16


class TTTLinear(Mixer):
    rule = "W - eta d/dW 1/2 |LN(W^T k) - (v - k)|^2 at the weights before the mini-batch of 16; o = q + LN(W^T q)"
    paper = "arXiv 2407.04620"
    rule_flops = 6

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """learning_rate: the inner model's, multiplied by sigmoid(.) / head_dim; inner_eps: of its layer norm."""

        learning_rate: float = 1.0
        inner_eps: float = 1e-6

        def __post_init__(self) -> None:
            super().__post_init__()
            require_equal_heads(self, "ttt's inner model maps keys to values")
            if self.head_dim != self.value_head_dim:
                raise ValueError(
                    f"ttt's inner model is residual: head_dim ({self.head_dim}) must equal value_head_dim "
                    f"({self.value_head_dim})"
                )
            if self.learning_rate <= 0:
                raise ValueError(f"mixer option learning_rate must be positive, but is {self.learning_rate}")

    @property
    def key_channels(self):
        """One more for the bias."""
        return self.config.head_dim + 1

    @property
    def state_size(self):
        """The weights before the mini-batch, and the sum of its gradients so far."""
        return 2 * super().state_size

    def projections(self):
        c = self.config
        return {
            "q": Projection(width=c.head_dim, role="read", conv=True),
            "k": Projection(width=c.head_dim, role="write", conv=True),
            "v": Projection(width=c.value_head_dim, role="write", conv=True),
            "rate": Projection(width=1, role="write"),
        }

    def parameters_per_head(self):
        D = self.config.head_dim

        def first_weights(heads: int) -> Tensor:
            """Those of every sequence, the bias in the last row."""
            return F.pad(0.02 * torch.randn(heads, D, D), (0, 0, 0, 1))

        return {
            "first_weights": HeadParameter(init=first_weights),
            "rate_bias": HeadParameter(init=torch.zeros),
            "inner_weight": HeadParameter(init=lambda heads: torch.ones(heads, D)),
            "inner_bias": HeadParameter(init=lambda heads: torch.zeros(heads, D)),
        }

    def shared_parameters(self):
        """place: the factor of the mini-batch's n-th token, 1 / n at the start."""
        return {**super().shared_parameters(), "place": lambda: 1 / torch.arange(1, MINI_BATCH + 1)}

    def initial_state(self, p, N):
        """The learned weights, and no gradients yet."""
        weights = widen(p["first_weights"])
        return torch.stack([weights, torch.zeros_like(weights)], 1).expand(N, -1, -1, -1, -1)

    def recur(self, q, k, v, rate, *, p, scan):
        c, (B, T, H, D) = self.config, v.shape
        eta = c.learning_rate / D * torch.sigmoid(widen(rate.squeeze(-1)) + widen(p["rate_bias"]))
        factor = widen(p["place"]).clamp(min=0)[scan.sequences.places % MINI_BATCH]
        weight, bias = widen(p["inner_weight"]), widen(p["inner_bias"])
        o = scan(
            ttt_linear,
            q,
            k,
            v,
            eta,
            factor.unsqueeze(-1).expand(B, T, H),
            weight,
            bias,
            eps=c.inner_eps,
            scale=1.0,
            mini_batch=MINI_BATCH,
        )
        o = widen(q) + F.layer_norm(widen(o), (D,), eps=c.inner_eps) * weight + bias
        return o.to(v.dtype)
