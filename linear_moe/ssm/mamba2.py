"""Mamba-2 (arXiv 2405.21060): S_t = exp(-exp(A_log) dt_t) S_{t-1} + B_t (dt_t x_t)^T, o_t = S_t^T C_t + D x_t.

In this library's names C is q, B is k and x is v; Mamba-2's groups are the key heads.
"""

import torch
import torch.nn.functional as F

from linear_moe.ops import combine, linear_attention, rms_norm, widen
from linear_moe.ssm.gated_deltanet import decay_parameters
from linear_moe.ssm.mixer import HeadParameter, Mixer, Projection


class Mamba2(Mixer):
    rule = "e^g S + B (dt x)^T, g = -exp(A_log) dt, dt = softplus(. + dt_bias); o += D x"
    paper = "arXiv 2405.21060"
    default_conv_size = 4

    @classmethod
    def default_options(cls, hidden_size, num_attention_heads):
        options = super().default_options(hidden_size, num_attention_heads)
        return {**options, "num_value_heads": 2 * options["num_heads"]}  # the paper's expansion by 2

    def projections(self):
        c = self.config
        return {
            "q": Projection(width=c.head_dim, role="read", per="key", conv=True, activation="silu"),
            "k": Projection(width=c.head_dim, role="write", per="key", conv=True, activation="silu"),
            "v": Projection(width=c.value_head_dim, role="write", conv=True, activation="silu"),
            "dt": Projection(width=1, role="write"),
            "gate": Projection(width=c.value_head_dim, role="gate"),
        }

    def parameters_per_head(self):
        return {
            **decay_parameters(),
            "D": HeadParameter(init=torch.ones),
            "norm": HeadParameter(init=lambda heads: torch.ones(heads, self.config.value_head_dim)),
        }

    def shared_parameters(self):
        return {}

    def recur(self, q, k, v, dt, *, p, scan):
        dt = F.softplus(widen(dt.squeeze(-1)) + p["dt_bias"])
        g = -widen(p["A_log"]).exp() * dt
        o = scan(linear_attention, q, k, (v * dt[..., None]).to(v.dtype), g, scale=1.0)
        return o + p["D"][:, None].to(v.dtype) * v

    def output(self, o, gate, p, routes):
        """The gate comes first, then one RMS norm over all heads of a group."""
        o = o if routes is None else combine(o, routes)
        group = (o * F.silu(gate)).unflatten(1, (-1, self.config.num_value_heads // self.config.num_heads)).flatten(2)
        return rms_norm(group, p["norm"].view(group.shape[1:]), self.config.norm_eps).view(o.shape)
