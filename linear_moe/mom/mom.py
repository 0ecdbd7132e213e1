"""What Mixture-of-Memories adds to a mixer: its options, its router's losses and its routes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from linear_moe.mom.router import Routing
from linear_moe.ops import Routes, route


@dataclass(frozen=True, kw_only=True)
class MoMConfig:
    """Options of Mixture-of-Memories (arXiv 2502.13685).

    Args:
        memories: M. topk: k, memories that a token is routed to; with 1 the weight is always 1, and the router learns
            from its own losses alone. shared: one more memory that sees every token.
        single_kv: the memories share one set of write projections.
        balance_coeff: weight of the balance loss (1 when balanced), of each layer; the paper's is 0.01 k / layers.
        z_loss_coeff: weight of the router z-loss.
    """

    memories: int
    topk: int = 2
    shared: bool = True
    single_kv: bool = False
    balance_coeff: float = 8e-4
    z_loss_coeff: float = 0.0

    def __post_init__(self) -> None:
        if self.memories < 1:
            raise ValueError(f"mom_memories must be at least 1, but is {self.memories}")
        if not 1 <= self.topk <= self.memories:
            raise ValueError(f"mom_topk ({self.topk}) must be between 1 and mom_memories ({self.memories})")
        for name in ("balance_coeff", "z_loss_coeff"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"mom_{name} must be a number and not negative, but is {getattr(self, name)}")

    @property
    def projections(self) -> int:
        """How many memories have write projections of their own, the shared one included; 0 under single_kv."""
        return 0 if self.single_kv else self.memories + self.shared


class _AddLoss(torch.autograd.Function):
    """Passes x on; in backward gives the loss a gradient of 1, so that it is minimised without being returned."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


def make_routes(
    routing: Routing, config: MoMConfig, shape: tuple[int, int], cu_seqlens: Tensor | None, loss_scale: Tensor | float
) -> Routes:
    """Routes of ``shape`` = (B, T) tokens, carrying the router's losses into the backward pass.

    loss_scale: what one unit of auxiliary loss is worth beside the gradients that arrive from above; 0 outside of
    training.
    """
    weights = routing.weights
    loss = config.balance_coeff * routing.balance_loss + config.z_loss_coeff * routing.z_loss
    if torch.is_grad_enabled() and (config.balance_coeff or config.z_loss_coeff):
        weights = _AddLoss.apply(weights, loss * loss_scale)
    return route(
        routing.indices.unflatten(0, shape),
        weights.unflatten(0, shape),
        num_memories=config.memories,
        shared=config.shared,
        cu_seqlens=cu_seqlens,
    )
