"""Softmax attention that needs no Transformer Engine: the core on torch's SDPA (CPU and GPU), and latent attention."""

import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from linear_moe.mcore.cached_attention import CachedLatentAttention
from linear_moe.mcore.masks import block_causal_mask, causal_mask, packed_cu_seqlens

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal, AttnMaskType.causal_bottom_right)


class TorchAttention(MegatronModule):
    """Stands where mcore's DotProductAttention stands in a layer spec; grouped queries, dropout, packed sequences.

    Packed sequences are masked by a ``[T, T]`` boolean matrix, so their memory grows with the square of the pack; the
    Transformer Engine specs have no such matrix.

    Raises:
        ValueError: context parallelism, sliding windows or attention sinks, which it does not have.
    """

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        attention_dropout=None,
        softmax_scale=None,
        cp_comm_type=None,
        pg_collection=None,
        **kwargs,
    ):
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ValueError(f"context_parallel_size ({config.context_parallel_size}) must be 1 with local attention")
        if config.window_size is not None or config.softmax_type != "vanilla":
            raise ValueError(
                f"local attention has neither sliding windows (window_size={config.window_size}) nor attention sinks "
                f"(softmax_type={config.softmax_type}); use --transformer-impl transformer_engine"
            )
        self.mask_type = attn_mask_type
        self.scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params=None,
        **kwargs,
    ) -> Tensor:
        """query ``[s, b, heads, d]`` (key and value may have fewer heads), or ``[t, heads, d]`` when packed.

        Returns ``[s, b, heads * d]``, packed ``[t, heads * d]``. attention_mask: bool, broadcast to ``[b, heads, s,
        s]``, True where attention is forbidden, beside the causal order and the packs' borders. Where causal queries
        are fewer than keys they are the last ones.

        Raises:
            ValueError: an attention_bias, more causal queries than keys, packs of unequal length, or borders of packs
                that do not end with the tokens.
        """
        if attention_bias is not None:
            raise ValueError("local attention takes no attention_bias")
        packed = packed_seq_params is not None
        if packed:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
        causal = (attn_mask_type or self.mask_type) in CAUSAL
        cu_seqlens = packed_cu_seqlens(packed_seq_params, query.transpose(0, 1))
        mask = _allowed(q.shape[2], k.shape[2], causal, attention_mask, cu_seqlens, q.device)
        causal = causal and mask is None
        dropout = self.dropout if self.training else 0.0

        def attend() -> Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, mask, dropout, causal, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
            )

        if dropout:
            with tensor_parallel.get_cuda_rng_tracker().fork():  # every tensor-parallel rank drops its own
                o = attend()
        else:
            o = attend()
        o = o.permute(2, 0, 1, 3).flatten(2)
        return o.squeeze(1) if packed else o


def _allowed(queries: int, keys: int, causal: bool, attention_mask, cu_seqlens, device) -> Tensor | None:
    """Bool, broadcast to ``[b, heads, queries, keys]``, True where attention is allowed; None where ``causal`` says it
    all."""
    if cu_seqlens is not None and queries != keys:
        raise ValueError(f"packed sequences need as many keys ({keys}) as queries ({queries})")
    mask = None
    if cu_seqlens is not None:
        mask = block_causal_mask(cu_seqlens, queries)
    elif causal and (attention_mask is not None or queries != keys):
        mask = causal_mask(queries, keys, device)
    if attention_mask is not None:
        mask = ~attention_mask if mask is None else mask & ~attention_mask
    return mask


class LatentAttention(CachedLatentAttention):
    """mcore's multi-head latent attention (arXiv 2405.04434) with right gradients under tensor parallelism.

    Its local form shards the down projections and gathers what they give. The keys' rotary part is then used by every
    rank's heads, but mcore takes one rank's gradient for all of it. Here it goes the way of Transformer Engine's
    duplicated projection, cut over the sequence and gathered again, whose gradient is the sum over the ranks.
    """

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states ``[s / tp, b, hidden]`` -> compressed q, compressed k and v, each for ``s / tp`` tokens."""
        q, kv = super()._qkv_down_projection(hidden_states)
        tp_group = self.pg_collection.tp
        if tp_group.size() > 1:
            kv = gather_from_tensor_model_parallel_region(kv, group=tp_group)
            kv = scatter_to_sequence_parallel_region(kv, group=tp_group)
        return q, kv
