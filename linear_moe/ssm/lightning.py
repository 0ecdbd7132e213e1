"""Lightning attention (arXiv 2401.04658): S_t = e^{-s_h} S_{t-1} + k_t v_t^T with slopes that shrink with depth."""

import math

import torch
from torch import Tensor

from linear_moe.ops import linear_attention
from linear_moe.ssm.mixer import HeadParameter, Mixer, Projection


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi's slopes (arXiv 2108.12409), float32 ``[heads]``: a geometric series, interleaved if not a power of two."""
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (h + 1) / whole) for h in range(whole)]
    # The heads beyond the power of two take every second slope of the next one.
    slopes += [2.0 ** (-4.0 * (2 * h + 1) / whole) for h in range(heads - whole)]
    return torch.tensor(slopes)


class Lightning(Mixer):
    """The output norm is one of each head, where the published one is of all, so that heads shard."""

    rule = "e^g S + k v^T, g = -s_h (1 - l/(L-1) + 1e-5)"
    paper = "arXiv 2401.04658"
    gate_activation = "sigmoid"

    def projections(self):
        c = self.config
        return {
            "q": Projection(width=c.head_dim, role="read", per="key", conv=True, activation="silu"),
            "k": Projection(width=c.head_dim, role="write", per="key", conv=True, activation="silu"),
            "v": Projection(width=c.value_head_dim, role="write", conv=True),
            "gate": Projection(width=c.value_head_dim, role="gate"),
        }

    def parameters_per_head(self):
        depth = 1 - self.layer / max(self.num_layers - 1, 1) + 1e-5
        return {"g": HeadParameter(init=lambda heads: -alibi_slopes(heads) * depth, trainable=False)}

    def recur(self, q, k, v, *, p, scan):
        return scan(linear_attention, q, k, v, p["g"])
