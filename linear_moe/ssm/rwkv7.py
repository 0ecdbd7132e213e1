"""RWKV-7 (arXiv 2503.14456): S_t = Diag(e^{g_t}) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.ops import combine, dplr, widen
from linear_moe.ssm.mixer import HeadParameter, Projection
from linear_moe.ssm.rwkv6 import RWKV

STRONGEST_DECAY = -0.6065306597126334  # -e^(-1/2): the log decay never falls below it


class RWKV7(RWKV):
    """The bonus (q.(r k)) v is added behind the norm, so each answer carries it as V more channels."""

    rule = "Diag(e^g) S + b (a^T S) + k v^T, a = -L2(xi k), b = -iclr a, k = k (1 + alpha (iclr - 1))"
    paper = "arXiv 2503.14456"
    rule_flops = 8

    @dataclass(frozen=True, kw_only=True)
    class Config(RWKV.Config):
        """decay_rank, iclr_rank, gate_rank, value_rank: of the low-rank maps; 0 for the published rule, about 2.5, 2.5,
        5 and 1.7 times the root of the hidden size. norm_eps: multiplied by head_dim. value_residual: mix the first
        layer's values into every other layer's, as published; not under MoM, nor where layers are apart (pipeline
        parallelism) or run twice (full recomputation).
        """

        decay_rank: int = 0
        iclr_rank: int = 0
        gate_rank: int = 0
        value_rank: int = 0
        value_residual: bool = False

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("decay_rank", "iclr_rank", "gate_rank", "value_rank"):
                if getattr(self, name) < 0:
                    raise ValueError(f"mixer option {name} must not be negative, but is {getattr(self, name)}")

        def rank(self, name: str, factor: float) -> int:
            """The option of that name, or the published default: a multiple of 32."""
            return getattr(self, name) or max(32, 32 * round(factor * self.hidden_size**0.5 / 32))

    @property
    def eps(self):
        return self.config.head_dim * self.config.norm_eps

    @property
    def value_residual(self):
        return self.config.value_residual

    def projections(self):
        c = self.config
        wide = 2.5 * c.head_dim / 64
        projections = {
            "q": Projection(width=c.head_dim, role="read", conv=True),
            "w": Projection(width=c.head_dim, role="write", low_rank=c.rank("decay_rank", wide), inner="tanh"),
            "k": Projection(width=c.head_dim, role="write", conv=True),
            "v": Projection(width=c.value_head_dim, role="write", conv=True),
            "iclr": Projection(width=c.head_dim, role="write", low_rank=c.rank("iclr_rank", wide)),
            "gate": Projection(width=c.value_head_dim, role="gate", low_rank=c.rank("gate_rank", 5.0), inner="sigmoid"),
        }
        if c.value_residual and self.layer:
            rank = c.rank("value_rank", 1.7 * c.head_dim / 64)
            projections["nu"] = Projection(width=c.value_head_dim, role="write", low_rank=rank)
        return projections

    def parameters_per_head(self):
        K = self.config.head_dim
        depth = self.layer / max(self.num_layers - 1, 1)

        def place(heads: int) -> Tensor:
            return torch.arange(heads * K).view(heads, K) / max(heads * K - 1, 1)

        def nu0(heads: int) -> Tensor:
            V = self.config.value_head_dim
            return 0.93 - 0.4 * torch.arange(heads * V).view(heads, V) / max(heads * V - 1, 1)

        def zigzag() -> Tensor:
            x = torch.linspace(-1, 1, K)
            return x * x.abs()

        residual = self.config.value_residual and self.layer
        return {
            **({"nu0": HeadParameter(init=nu0)} if residual else {}),
            "w0": HeadParameter(init=lambda heads: -5.5 + 6 * place(heads) ** (1 + depth**0.3) + 2.5 * zigzag()),
            "iclr0": HeadParameter(init=lambda heads: -0.39 + 0.4 * place(heads) + 0.3 * zigzag()),
            "xi": HeadParameter(init=lambda heads: 0.76 - 0.1 * place(heads)),
            "alpha": HeadParameter(init=lambda heads: torch.full((heads, K), 1.02)),
            "bonus": HeadParameter(init=lambda heads: torch.full((heads, K), -0.04)),
            **self.norm_parameters(((self.layer + 1) / self.num_layers) ** 0.7),
        }

    def shared_parameters(self):
        D = self.config.hidden_size
        left = 1 - self.layer / self.num_layers
        powers = {"q": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "iclr": 0.9, "gate": 0.2}

        def start(power: float) -> Tensor:
            return 1 - (torch.arange(D) / D) ** (power * left)

        return {f"mix_{name}": (lambda power=power: start(power)) for name, power in powers.items()}

    def mix(self, names, x, previous, p):
        delta = previous - x
        return {name: x + delta * p[f"mix_{'v' if name == 'nu' else name}"] for name in names}

    def mix_values(self, operands, p, first):
        if self.layer == 0:
            first["v"] = operands["v"]
            return
        nu = torch.sigmoid(widen(operands.pop("nu")) + widen(p["nu0"])).to(operands["v"].dtype)
        operands["v"] = torch.lerp(operands["v"], first["v"], nu)

    def recur(self, q, w, k, v, iclr, *, p, scan):
        g = STRONGEST_DECAY * torch.sigmoid(widen(w) + widen(p["w0"]))
        rate = torch.sigmoid(widen(iclr) + widen(p["iclr0"]))
        erase = F.normalize(widen(k) * widen(p["xi"]), dim=-1)
        k = widen(k) * (1 + (rate - 1) * widen(p["alpha"]))
        bonus = (widen(q) * k * widen(p["bonus"])).sum(-1, keepdim=True) * widen(v)
        k, a, b = (x.to(v.dtype) for x in (k, -erase, erase * rate))
        o = scan(dplr, q, k, v, a, b, g, scale=1.0)
        return torch.cat([o, bonus.to(o.dtype)], -1)

    def output(self, o, gate, p, routes):
        o, bonus = (o if routes is None else combine(o, routes)).chunk(2, -1)
        return (self.norm(o, p) + bonus).to(o.dtype) * gate
