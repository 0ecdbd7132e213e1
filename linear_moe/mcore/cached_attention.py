"""Softmax attention over the keys and values of an `InferenceContext`: packed pieces of prompts, then tokens one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd as rotate
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from linear_moe.mcore.inference import InferenceContext, sequences_of


class Cached:
    """What both kinds of self-attention do with an `InferenceContext`; anything else is Megatron's business.

    Raises:
        ValueError: with an `InferenceContext`: sliding windows, attention sinks, context parallelism.
    """

    def forward(self, hidden_states: Tensor, *args, inference_context=None, rotary_pos_emb=None, **kwargs):
        """hidden_states ``[s, b, hidden]`` -> the same shape, and the output projection's bias or None."""
        if not isinstance(inference_context, InferenceContext):
            return super().forward(
                hidden_states, *args, inference_context=inference_context, rotary_pos_emb=rotary_pos_emb, **kwargs
            )
        config = self.config
        if config.window_size is not None or config.softmax_type != "vanilla" or config.context_parallel_size > 1:
            raise ValueError(
                "generation has neither sliding windows, attention sinks nor context parallelism: window_size is "
                f"{config.window_size}, softmax_type {config.softmax_type}, context_parallel_size "
                f"{config.context_parallel_size}"
            )
        positions = sequences_of(inference_context, hidden_states.transpose(0, 1)).positions.T  # [s, b]
        query, key, value, gate = self._projected(hidden_states, rotary_pos_emb, positions, inference_context)
        keys, values = inference_context.keep(self.layer_number, key.transpose(0, 1), value.transpose(0, 1))
        scale = getattr(self, "softmax_scale", config.softmax_scale)
        o = attend(query.transpose(0, 1), keys, values, inference_context, scale).transpose(0, 1).contiguous()
        return self.linear_proj(o if gate is None else self._apply_output_gate(o, gate))

    def _adjust_key_value_for_inference(self, inference_context, query: Tensor, *args, **kwargs):
        """Megatron takes what follows the first piece of a prompt for one token, which sees all that is there."""
        *found, mask_type, table = super()._adjust_key_value_for_inference(inference_context, query, *args, **kwargs)
        static = inference_context is not None and inference_context.is_static_batching()
        if static and mask_type is AttnMaskType.no_mask and query.shape[0] > 1:
            mask_type = AttnMaskType.causal_bottom_right
        return *found, mask_type, table


class CachedSelfAttention(Cached, SelfAttention):
    """mcore's self-attention."""

    def _projected(self, hidden_states: Tensor, rotary_pos_emb, positions: Tensor, context: InferenceContext):
        """Queries, keys and values ``[s, b, heads, d]``, rotated, and the output gate or None."""
        has_gate = self.config.attention_output_gate
        query, key, value, *gate = self.get_query_key_value_tensors(hidden_states, output_gate=has_gate)
        no_rope = self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1]
        if rotary_pos_emb is not None and not no_rope:
            angles = rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb
            interleaved, mscale = self.config.rotary_interleaved, self._yarn_concentration_factor
            query, key = (rotate(x, _rows(angles, positions), interleaved, mscale=mscale) for x in (query, key))
        return query, key, value, gate[0] if gate else None


class CachedLatentAttention(Cached, MLASelfAttention):
    """mcore's multi-head latent attention (arXiv 2405.04434); keys and values are kept as they are used.

    Raises:
        ValueError: with an `InferenceContext`: fused rotary embeddings, which go by a token's row.
    """

    def _projected(self, hidden_states: Tensor, rotary_pos_emb, positions: Tensor, context: InferenceContext):
        if self.config.apply_rope_fusion:
            raise ValueError("generation with latent attention needs --no-rope-fusion")
        with _rotated_at(self.rotary_pos_emb, positions, context.max_sequence_length):
            query, key, value, *_ = self.get_query_key_value_tensors(hidden_states)
        return query, key, value, None


def _rows(angles: Tensor, positions: Tensor) -> Tensor:
    """angles ``[positions, 1, 1, d]``, positions ``[s, b]`` -> ``[s, b, 1, d]``."""
    return angles[:, 0][positions]


@contextmanager
def _rotated_at(rotary: torch.nn.Module, positions: Tensor, length: int) -> Iterator[None]:
    """Latent attention asks its rotary embedding for the angles of 0, 1, ...: it gets those of positions below length."""
    angles = rotary(length)

    def forward(*args, **kwargs):
        if isinstance(angles, tuple):  # YaRN's, with its factor
            return _rows(angles[0], positions), *angles[1:]
        return _rows(angles, positions)

    rotary.forward = forward
    try:
        yield
    finally:
        del rotary.forward


def attend(query: Tensor, keys: Tensor, values: Tensor, context: InferenceContext, scale: float | None) -> Tensor:
    """Each query over its own sequence, up to itself.

    query ``[B, T, heads, d]`` of this call; keys, values ``[N, max_sequence_length, heads (or fewer), d]``.
    Returns ``[B, T, heads * d]``.
    """
    grouped = query.shape[2] != keys.shape[2]
    if context.lengths is None:
        q, k, v = (x.transpose(1, 2) for x in (query, keys[:, : context.span], values[:, : context.span]))
        there = torch.arange(k.shape[2], device=q.device) <= context.sequences.places
        o = F.scaled_dot_product_attention(q, k, v, there[:, None, None], scale=scale, enable_gqa=grouped)
        return o.transpose(1, 2).flatten(2)
    pieces = []
    for n, q in enumerate(query[0].split(context.lengths)):
        if not len(q):
            continue
        end = context.counts[n] + len(q)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, keys[n, :end], values[n, :end]))
        mask = causal_lower_right(q.shape[2], end)
        o = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)
        pieces.append(o[0].transpose(0, 1))
    return torch.cat(pieces).flatten(1)[None]
