"""MoM's router (arXiv 2502.13685): which k of M memories a token writes to and reads from."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from linear_moe.ops import topk_router


class Routing(NamedTuple):
    """What a router decided for N tokens."""

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

    def forward(self, x: Tensor, replicated: Callable[[Tensor], Tensor] = lambda parameter: parameter) -> Routing:
        """x ``[N, D]`` -> Routing. replicated: applied to the weight, so that a parallel layer can sum its gradient."""
        logits = nn.functional.linear(x, replicated(self.weight))
        weights, indices, probabilities = topk_router(logits, self.topk)
        logits = logits.to(probabilities.dtype)
        tokens = max(len(x), 1)
        chosen = torch.zeros_like(probabilities).scatter(-1, indices, 1.0).sum(0) / tokens  # f_m, sums to k
        mean = probabilities.sum(0) / tokens  # p_m
        balance = self.memories / self.topk * (chosen * mean).sum()
        z = logits.logsumexp(-1).square().sum() / tokens
        with torch.no_grad():
            entropy = -(probabilities * probabilities.clamp(min=1e-30).log()).sum() / tokens
        return Routing(weights, indices, balance, z, chosen / self.topk, entropy)
