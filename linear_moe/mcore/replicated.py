"""Parameters that all tensor-parallel ranks hold a copy of: their gradients are sums over the ranks."""

from __future__ import annotations

import torch
from torch import Tensor


class SumGradients(torch.autograd.Function):
    """Parameters as they are. In the backward one all-reduce adds up the gradients of all of them, each rank having
    its heads' part.
    """

    @staticmethod
    def forward(ctx, group, *parameters: Tensor):
        ctx.group = group
        ctx.set_materialize_grads(False)
        return parameters

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        given = [gradient for gradient in gradients if gradient is not None]  # the same ones on every rank
        flat = torch.cat([gradient.flatten() for gradient in given])
        torch.distributed.all_reduce(flat, group=ctx.group)
        sums = iter(flat.split([gradient.numel() for gradient in given]))
        return None, *(None if g is None else next(sums).view(g.shape).to(g.dtype) for g in gradients)
