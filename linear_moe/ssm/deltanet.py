"""DeltaNet (arXiv 2406.06484): S_t = (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T."""

from linear_moe.ops import delta_rule, widen
from linear_moe.ssm.mixer import Mixer, Projection


class DeltaNet(Mixer):
    rule = "(I - b k k^T) S + b k v^T, b = sigmoid(.)"
    paper = "arXiv 2406.06484"
    default_conv_size = 4
    rule_flops = 6

    def projections(self):
        c = self.config
        return {
            "q": Projection(width=c.head_dim, role="read", per="key", conv=True, activation="silu", normalize=True),
            "k": Projection(width=c.head_dim, role="write", per="key", conv=True, activation="silu", normalize=True),
            "v": Projection(width=c.value_head_dim, role="write", conv=True, activation="silu"),
            "beta": Projection(width=1, role="write"),
        }

    def recur(self, q, k, v, beta, *, p, scan, g=None):
        """g: a log decay for those who have one."""
        return scan(delta_rule, q, k, v, widen(beta.squeeze(-1)).sigmoid(), g)
