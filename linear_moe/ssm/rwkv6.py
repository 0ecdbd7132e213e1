"""RWKV-6 (arXiv 2404.05892): S_t = Diag(e^{g_t}) S_{t-1} + k_t v_t^T, o_t = S_{t-1}^T q_t + (q_t.(u k_t)) v_t."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.ops import combine, rwkv6, widen
from linear_moe.ssm.mixer import HeadParameter, Mixer, Projection, require_equal_heads


class RWKV(Mixer):
    """What RWKV-6 and RWKV-7 have in common: token shift, and a layer norm of each head's answer before the gate."""

    token_shift = True

    @property
    def eps(self) -> float:
        """Of the layer norm."""
        return self.config.norm_eps

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """hidden_size: the model's, not an option."""

        hidden_size: int

        def __post_init__(self) -> None:
            super().__post_init__()
            require_equal_heads(self, "RWKV's receptance, keys and values share their heads")

    def norm_parameters(self, weight: float = 1.0) -> dict[str, HeadParameter]:
        V = self.config.value_head_dim
        return {
            "norm_weight": HeadParameter(init=lambda heads: torch.full((heads, V), weight)),
            "norm_bias": HeadParameter(init=lambda heads: torch.zeros(heads, V)),
        }

    def shared_parameters(self):
        return {}

    def norm(self, o: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        """Layer norm of each head of o ``[tokens, H, V]``, in float32."""
        o = F.layer_norm(widen(o), o.shape[-1:], eps=self.eps)
        return o * widen(p["norm_weight"]) + widen(p["norm_bias"])


class RWKV6(RWKV):
    rule = "Diag(e^g) S + k v^T, o = S_(t-1)^T q + (q.(u k)) v, g = -exp(w0 + W2 tanh(W1 x))"
    paper = "arXiv 2404.05892"

    @dataclass(frozen=True, kw_only=True)
    class Config(RWKV.Config):
        """mix_rank, decay_rank: ranks of the data-dependent token shift and of the decay."""

        mix_rank: int = 32
        decay_rank: int = 64

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("mix_rank", "decay_rank"):
                if getattr(self, name) < 1:
                    raise ValueError(f"mixer option {name} must be at least 1, but is {getattr(self, name)}")

    def projections(self):
        c = self.config
        return {
            "q": Projection(width=c.head_dim, role="read", conv=True),
            "w": Projection(width=c.head_dim, role="write", low_rank=c.decay_rank, inner="tanh"),
            "k": Projection(width=c.head_dim, role="write", conv=True),
            "v": Projection(width=c.value_head_dim, role="write", conv=True),
            "gate": Projection(width=c.value_head_dim, role="gate"),
        }

    def parameters_per_head(self):
        K = self.config.head_dim

        depth = self.layer / max(self.num_layers - 1, 1)

        def channel(heads: int) -> Tensor:
            return torch.arange(heads * K).view(heads, K)

        def place(heads: int) -> Tensor:
            return channel(heads) / max(heads * K - 1, 1)

        return {  # both start as in the published models
            "w0": HeadParameter(init=lambda heads: -6 + 5 * place(heads) ** (0.7 + 1.3 * depth)),
            "u": HeadParameter(init=lambda heads: depth * (1 - place(heads)) + 0.1 * ((channel(heads) + 1) % 3 - 1)),
            **self.norm_parameters(),
        }

    def shared_parameters(self):
        """Of the data-dependent token shift: x + (previous - x) (mix_<name> + up_<name> tanh(down_<name> x'))."""
        D, rank = self.config.hidden_size, self.config.mix_rank
        start = partial(torch.zeros, D)
        parameters = {"mix": start}
        for name in self.projections():
            parameters |= {
                f"mix_{name}": start,
                f"mix_down_{name}": lambda: torch.empty(rank, D).uniform_(-1e-4, 1e-4),
                f"mix_up_{name}": lambda: torch.empty(D, rank).uniform_(-1e-4, 1e-4),
            }
        return parameters

    def mix(self, names, x, previous, p):
        delta = previous - x
        both = x + delta * p["mix"]
        mixed = {}
        for name in names:
            low = torch.tanh(F.linear(both, p[f"mix_down_{name}"]))
            mixed[name] = x + delta * (p[f"mix_{name}"] + F.linear(low, p[f"mix_up_{name}"]))
        return mixed

    def recur(self, q, w, k, v, *, p, scan):
        return scan(rwkv6, q, k, v, -(widen(p["w0"]) + widen(w)).exp(), p["u"], scale=1.0)

    def output(self, o, gate, p, routes):
        o = o if routes is None else combine(o, routes)
        return self.norm(o, p).to(o.dtype) * F.silu(gate)
