"""From logits to the next tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn.

    Args:
        temperature: logits are divided by it; 0 takes the likeliest token, whatever top_k and top_p say.
        top_k: only the k likeliest tokens; 0: all.
        top_p: only the likeliest tokens that together have this probability (arXiv 1904.09751), at least one.
        repetition_penalty: logits of tokens that the sequence has are divided by it where positive, multiplied where
            negative (arXiv 1909.05858); 1: none.

    Raises:
        ValueError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0, but is {self.temperature}")
        if self.top_k != int(self.top_k) or self.top_k < 0:
            raise ValueError(f"top_k must be a number of tokens, or 0 for all, but is {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, but is {self.top_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be above 0, but is {self.repetition_penalty}")


def sample(logits: Tensor, sampling: Sampling, used: Tensor, generator: torch.Generator) -> Tensor:
    """One token a sequence, int64 ``[N]``; nothing is read back to the host.

    logits: ``[N, vocab]``. used: bool ``[N, vocab]``, True for tokens that the sequence has. generator: on that device.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        logits = torch.where(used, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(int(sampling.top_k), -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        above = ordered.cumsum(-1) - ordered  # the probability of likelier tokens
        ordered = ordered.masked_fill(above >= sampling.top_p, 0)
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered)
    # argmax of p / Exp(1) draws token i with probability p_i / sum(p), without multinomial's checks on the host.
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / noise).argmax(-1)
