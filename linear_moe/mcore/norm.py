"""Layer norm and RMS norm on torch that allow sequence parallelism (mcore's own local norm refuses it)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """``config.normalization`` (LayerNorm or RMSNorm) over the last dimension, built like mcore's norms.

    Under sequence parallelism every rank sees part of the tokens, so the parameters are marked for Megatron to sum
    their gradients; without the mark training would be slightly wrong and say nothing.

    Raises:
        ValueError: another normalization.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        if config.normalization not in ("LayerNorm", "RMSNorm"):
            raise ValueError(f"normalization must be LayerNorm or RMSNorm with local specs, not {config.normalization}")
        self.shape, self.eps = (hidden_size,), eps
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        self.weight = nn.Parameter(torch.full(self.shape, 1.0 - self.offset, dtype=config.params_dtype))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(self.shape, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., hidden_size]`` -> the same shape and dtype."""
        weight = self.weight + self.offset if self.offset else self.weight
        if self.bias is None:
            return F.rms_norm(x, self.shape, weight, self.eps)
        return F.layer_norm(x, self.shape, weight, self.bias, self.eps)
