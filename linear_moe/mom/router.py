"""MoM's router (arXiv 2502.13685): which k of M memories a token writes to and reads from."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from linear_moe.ops import topk_router


class Routing(NamedTuple):
    """What a router decided for N tokens; losses and figures are means over those that are no padding."""

    weights: Tensor  # [N, k] float32, sum to 1 for a token
    indices: Tensor  # [N, k] int64
    balance_loss: Tensor  # (M / k) sum_m f_m p_m: 1 when balanced, M / k when k memories take everything
    z_loss: Tensor  # mean of logsumexp(logits)^2
    share: Tensor  # [M] share of the routed rows that each memory received; sums to 1; no gradient
    entropy: Tensor  # mean entropy of the router's distribution, in nats; no gradient


class Router(nn.Module):
    """A linear map to M logits, softmax in float32, the k largest renormalised.

    Args:
        hidden_size: D. memories: M. topk: k.
    """

    def __init__(self, hidden_size: int, memories: int, topk: int, **factory):
        super().__init__()
        self.memories, self.topk = memories, topk
        self.weight = nn.Parameter(torch.empty(memories, hidden_size, **factory))

    def forward(
        self,
        x: Tensor,
        replicated: Callable[[Tensor], Tensor] = lambda parameter: parameter,
        padding: Tensor | None = None,
    ) -> Routing:
        """x ``[N, D]`` -> Routing.

        Args:
            replicated: applied to the weight, so that a parallel layer can sum its gradient.
            padding: bool ``[N]``, the tokens that no loss and no figure counts; they are routed like any other.
        """
        logits = nn.functional.linear(x, replicated(self.weight))
        weights, indices, probabilities = topk_router(logits, self.topk)
        logits = logits.to(probabilities.dtype)
        tokens = max(len(x), 1) if padding is None else (~padding).sum().clamp(min=1)

        def mean(figures: Tensor) -> Tensor:
            """Over the tokens that count: ``[N, ...]`` -> ``[...]``."""
            if padding is not None:
                figures = figures.masked_fill(padding.view(-1, *[1] * (figures.ndim - 1)), 0.0)
            return figures.sum(0) / tokens

        chosen = mean(torch.zeros_like(probabilities).scatter(-1, indices, 1.0))  # f_m, sums to k
        balance = self.memories / self.topk * (chosen * mean(probabilities)).sum()
        z = mean(logits.logsumexp(-1).square())
        with torch.no_grad():
            entropy = mean(-(probabilities * probabilities.clamp(min=1e-30).log()).sum(-1))
        return Routing(weights, indices, balance, z, chosen / self.topk, entropy)
