"""ReBased (arXiv 2402.10644): Based with a learned quadratic map, phi(x) = (gamma LayerNorm(x) + beta)^2."""

import torch

from linear_moe.ops import widen
from linear_moe.ssm.based import Based, normalized_attention, squares


class ReBased(Based):
    rule = "S + phi(k) v^T, phi(q).phi(k) = (x.y)^2 of x, y = gamma LN(.) + beta; divided by q.sum(k)"
    paper = "arXiv 2402.10644"

    @property
    def key_channels(self):
        K = self.config.head_dim
        return K * (K + 1) // 2

    def shared_parameters(self):
        K = self.config.head_dim
        return {"gamma": lambda: torch.ones(K), "beta": lambda: torch.zeros(K)}

    def recur(self, q, k, v, *, p, state, return_state, cu_seqlens, positions):
        def feature_map(x):
            K = x.shape[-1]
            y = torch.nn.functional.layer_norm(widen(x), (K,), widen(p["gamma"]), widen(p["beta"]))
            return squares(y, K**-0.5, (2 / K) ** 0.5).to(x.dtype)

        q, k = feature_map(q), feature_map(k)
        return normalized_attention(q, k, v, state=state, return_state=return_state, cu_seqlens=cu_seqlens)
