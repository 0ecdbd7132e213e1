"""Floating-point operations of a training step (Megatron's own formula counts every layer as softmax attention)."""

from __future__ import annotations

import torch

from linear_moe.mcore.pattern import EXPERTS, FEED_FORWARD, LATENT, SOFTMAX
from linear_moe.mcore.specs import MixerOptions, layer_options
from linear_moe.mom import MoMConfig


def training_flops(args, batch_size, seqlen_squared_sum_in_batch=None, total_real_tokens_in_batch=None) -> float:
    """Operations of one step, forward and backward (2 and 4 for a multiply-add), without recomputation.

    Stands where Megatron has ``num_floating_point_operations`` and takes the same arguments: batch_size in samples; the
    sum of the squared lengths of packed sequences and their tokens, where they are packed. Causal attention counts
    half of its square; a linear mixer counts its recurrence (``Mixer.rule_flops``); MoM counts its routed rows.
    """
    tokens = total_real_tokens_in_batch or batch_size * args.seq_length
    squared = seqlen_squared_sum_in_batch or batch_size * args.seq_length**2
    options = layer_options(args)
    pattern = options.pattern
    per_token = 2 * args.hidden_size * args.padded_vocab_size * (1 + pattern.depths)  # logits
    per_token += 2 * 2 * args.hidden_size**2 * pattern.depths  # of the hidden state and the next token's embedding
    attention_pairs = 0.0
    for letter in pattern.every:
        if letter in (SOFTMAX, LATENT):
            projections, pairs = _softmax(args)
            per_token += projections
            attention_pairs += pairs
        elif letter in (FEED_FORWARD, EXPERTS):
            per_token += _feed_forward(args, letter == EXPERTS)
        else:
            per_token += _mixer(args.hidden_size, options.mixers[letter], options.mom)
    return 3.0 * (per_token * tokens + attention_pairs * squared / 2)


def _softmax(args) -> tuple[int, int]:
    """(forward operations a token of the projections, forward operations a pair of tokens)."""
    heads, hidden = args.num_attention_heads, args.hidden_size
    if args.multi_latent_attention:
        q_head, v_head = args.qk_head_dim + args.qk_pos_emb_head_dim, args.v_head_dim
        q = heads * q_head * hidden
        if args.q_lora_rank:
            q = args.q_lora_rank * (hidden + heads * q_head)
        kv = hidden * (args.kv_lora_rank + args.qk_pos_emb_head_dim)
        kv += args.kv_lora_rank * heads * (args.qk_head_dim + v_head)
        return 2 * (q + kv + heads * v_head * hidden), 2 * heads * (q_head + v_head)
    groups = args.num_query_groups if args.group_query_attention else heads
    width = args.kv_channels
    gated = heads if args.attention_output_gate else 0
    return 2 * hidden * width * (2 * heads + 2 * groups + gated), 4 * heads * width


def _mixer(hidden: int, options: MixerOptions, mom: MoMConfig | None) -> int:
    """Forward operations a token of a linear layer."""
    config, mixer = options.config, options.mixer(options.config)
    rows = mom.topk + mom.shared if mom else 1  # packed rows a token makes
    total = 2 * hidden * mom.memories if mom else 0  # router
    for spec in mixer.projections().values():
        width = spec.width * mixer.heads(spec.per)
        copies = rows if spec.role == "write" and mom and not mom.single_kv else 1
        size = spec.low_rank * (hidden + width) if spec.low_rank else hidden * width
        total += 2 * size * copies
        if spec.conv:
            total += 2 * width * config.conv_size * rows
    if mixer.token_shift:  # its matrices work on every row
        with torch.device("meta"):  # this runs at every step: it must neither draw nor fill anything
            shift = [make() for make in mixer.shared_parameters().values()]
        total += sum(2 * weight.numel() * rows for weight in shift if weight.dim() == 2)
    values = config.num_value_heads * config.value_head_dim
    total += mixer.rule_flops * mixer.key_channels * values * rows
    return total + 2 * values * hidden  # output projection


def _feed_forward(args, is_moe: bool) -> int:
    """Forward operations a token of a feed-forward layer."""
    matrices = 3 if args.swiglu or args.quick_geglu else 2
    if not is_moe:
        return 2 * matrices * args.hidden_size * args.ffn_hidden_size
    width = (args.moe_ffn_hidden_size or args.ffn_hidden_size) * args.moe_router_topk
    width += args.moe_shared_expert_intermediate_size or 0
    return 2 * matrices * args.hidden_size * width + 2 * args.hidden_size * args.num_experts
