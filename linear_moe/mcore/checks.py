"""What is refused before any work: arguments that Megatron's own checks let through and our layers cannot do."""

from __future__ import annotations

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE

from linear_moe.mcore.muon import check_muon
from linear_moe.mcore.pattern import EXPERTS, LATENT, SOFTMAX
from linear_moe.mcore.specs import LayerOptions, layer_options
from linear_moe.ops.backend import check_compiler
from linear_moe.ssm.declaration import check_declaration

POSITIONS = ("learned_absolute", "rope", "yarn", "none")  # that a HybridModel has
NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")


def check_arguments(args) -> None:
    """Refuse, before any work, what Megatron's own checks let through and our layers cannot do.

    Raises:
        ValueError: with the rule and the values.
    """
    _check_given(args)
    options = layer_options(args)
    if options.linear and torch.cuda.is_available():
        check_compiler()
    if args.transformer_impl == "transformer_engine" and not HAVE_TE:
        raise ValueError(
            "transformer_impl transformer_engine needs Transformer Engine: pip install linear-moe[gpu], or choose local"
        )
    _check_pattern(args, options)
    _check_widths(args, options)
    if args.multi_latent_attention and args.transformer_impl == "local":
        _check_local_latent_attention(args)
    _check_layout(args)
    _check_training(args, options)
    check_muon(args, bool(options.linear))
    for letter, choice in options.linear.items():
        mixer = choice.mixer(choice.config)
        check_declaration(mixer)
        if mixer.value_residual:
            _check_value_residual(args, options, letter)


def _check_given(args) -> None:
    for name in ("hybrid_override_pattern", "mtp_hybrid_override_pattern"):
        if getattr(args, name) is not None:
            raise ValueError(f"{name} is deprecated: write hybrid_layer_pattern, with / before each depth ahead")
    needed = NEEDED if args.hybrid_layer_pattern is None else NEEDED[1:]
    missing = [name for name in needed if getattr(args, name) is None]
    if missing:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise ValueError(
            f"no model: give --config NAME (a file, or one of `linear-moe configs`), or {flags} (--help lists all)"
        )
    for name in needed:
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, but is {getattr(args, name)}")


def _check_pattern(args, options: LayerOptions) -> None:
    """Letters that say what other arguments deny."""
    text, letters = options.pattern.text, options.pattern.every
    used, experts, softmax = list(options.linear), EXPERTS in letters, SOFTMAX in letters
    wrong = {
        f"has the linear mixers {', '.join(used)}, but --mixer names one: map each letter to its own": (
            isinstance(args.mixer, str) and len(used) > 1
        ),
        f"has {EXPERTS}, experts, but num_experts is not set": experts and not args.num_experts,
        f"has no {EXPERTS}, experts, but num_experts is {args.num_experts}": not experts and args.num_experts,
        f"has both {SOFTMAX} and {LATENT}: softmax layers of one model are of one kind": softmax and LATENT in letters,
        f"has {SOFTMAX}, but with multi_latent_attention it must be {LATENT}": softmax and args.multi_latent_attention,
    }
    for words, refused in wrong.items():
        if refused:
            raise ValueError(f"the pattern {text!r} {words}")
    positions = args.position_embedding_type
    if positions not in POSITIONS:
        raise ValueError(f"position_embedding_type must be {', '.join(POSITIONS)}, but is {positions}")
    if args.use_rope_scaling and positions != "rope":
        raise ValueError(f"use_rope_scaling needs position_embedding_type rope, not {positions}")
    pattern = options.pattern
    last = pattern.ahead.rfind(EXPERTS)
    if last >= len(pattern.main) + pattern.depths:  # Megatron counts a depth's layers from the model's first
        raise ValueError(
            f"the pattern {text!r} has {EXPERTS} as letter {last + 1} of a depth, beyond Megatron's table of experts, "
            f"which holds {len(pattern.main)} layers and {pattern.depths} depths"
        )
    if options.pattern.depths and args.position_embedding_type not in ("rope", "none"):
        raise ValueError(
            f"multi-token prediction needs position_embedding_type rope or none, not {args.position_embedding_type}"
        )


def _check_widths(args, options: LayerOptions) -> None:
    tp = args.tensor_model_parallel_size
    divided = [("num_attention_heads", args.num_attention_heads), ("padded_vocab_size", args.padded_vocab_size or 0)]
    for choice in options.linear.values():
        divided += [(f"mixer option {name}", getattr(choice.config, name)) for name in ("num_heads", "num_value_heads")]
    if args.multi_latent_attention:
        divided.append(("kv_lora_rank + qk_pos_emb_head_dim", args.kv_lora_rank + args.qk_pos_emb_head_dim))
        divided.append(("q_lora_rank", args.q_lora_rank or 0))
    elif args.kv_channels is None and args.hidden_size % args.num_attention_heads:
        raise ValueError(
            f"hidden_size ({args.hidden_size}) must be divisible by num_attention_heads ({args.num_attention_heads})"
        )
    for name, number in divided:
        if number % tp:
            raise ValueError(f"{name} ({number}) must be divisible by tensor_model_parallel_size ({tp})")
    groups = args.num_query_groups
    if args.group_query_attention and (groups < 1 or args.num_attention_heads % groups):
        raise ValueError(f"num_query_groups ({groups}) must divide num_attention_heads ({args.num_attention_heads})")
    if args.group_query_attention and groups % tp and tp % groups:
        raise ValueError(
            f"num_query_groups ({groups}) must be a multiple or a divisor of tensor_model_parallel_size ({tp})"
        )
    if args.num_experts and args.num_experts % args.expert_model_parallel_size:
        raise ValueError(
            f"num_experts ({args.num_experts}) must be divisible by "
            f"expert_model_parallel_size ({args.expert_model_parallel_size})"
        )


def _check_local_latent_attention(args) -> None:
    tp = args.tensor_model_parallel_size
    if tp > 1 and not args.sequence_parallel:
        raise ValueError(
            f"multi_latent_attention with tensor_model_parallel_size ({tp}) above 1 needs --sequence-parallel"
        )
    if args.qk_layernorm and args.q_lora_rank is None:
        raise ValueError(
            "multi_latent_attention with qk_layernorm needs q_lora_rank with --transformer-impl local: "
            "without it Megatron would norm the queries inside a Transformer Engine layer"
        )


def _check_layout(args) -> None:
    tp = args.tensor_model_parallel_size
    if args.num_experts and tp > 1 and not args.sequence_parallel:
        raise ValueError(f"num_experts with tensor_model_parallel_size ({tp}) above 1 needs --sequence-parallel")
    if args.context_parallel_size > 1:
        raise ValueError(f"context_parallel_size ({args.context_parallel_size}) must be 1: it is not supported yet")
    interleaved = args.num_layers_per_virtual_pipeline_stage or args.num_virtual_stages_per_pipeline_rank
    interleaved = interleaved or getattr(args, "virtual_pipeline_model_parallel_size", None)
    if interleaved and not args.overlap_p2p_comm:
        raise ValueError(
            "the interleaved pipeline schedule needs overlapped p2p communication (batched p2p gives wrong gradients): "
            "drop --no-overlap-p2p-communication"
        )
    packed = args.dataloader_inter_document_masking or args.sft
    if packed and args.pipeline_model_parallel_size > 1 and args.micro_batch_size != 1:
        raise ValueError(
            f"packed sequences under pipeline parallelism need micro_batch_size 1, not {args.micro_batch_size}: "
            "Megatron's stages exchange [seq_length, micro_batch_size], but a packed batch is one long sequence"
        )


def _check_training(args, options: LayerOptions) -> None:
    if args.reset_attention_mask:
        _check_reset_attention_mask(args, options)
    masked = args.eod_mask_loss or args.sft
    router_losses = options.linear and options.mom and (options.mom.balance_coeff or options.mom.z_loss_coeff)
    if args.calculate_per_token_loss and masked and router_losses and args.pipeline_model_parallel_size > 1:
        raise ValueError(
            "calculate_per_token_loss with masked tokens (eod_mask_loss, sft) and losses of MoM's router needs "
            f"pipeline_model_parallel_size 1, not {args.pipeline_model_parallel_size}: "
            "only the last stage knows how many tokens the loss counts"
        )
    decay = args.lr_decay_iters or args.train_iters
    if decay and args.lr_warmup_iters >= decay:
        raise ValueError(
            f"lr_warmup_iters ({args.lr_warmup_iters}) must be below lr_decay_iters or train_iters ({decay})"
        )
    lost = ("cpu_offloading_num_layers", "fp8_output_proj", "defer_embedding_wgrad_compute")
    lost = [name for name in lost if getattr(args, name, None)]
    if lost:
        raise ValueError(f"Megatron's HybridModel does not have {', '.join(lost)}")
    if options.pattern.depths and args.recompute_granularity == "full" and args.recompute_method == "uniform":
        if args.recompute_num_layers != 1:
            raise ValueError(
                "multi-token prediction with uniform recomputation needs recompute_num_layers 1, "
                f"not {args.recompute_num_layers}"
            )
    missing_te = {"layernorm", "moe_act"} & set(args.recompute_modules or ())
    if args.transformer_impl == "local" and args.recompute_granularity == "selective" and missing_te:
        raise ValueError(f"recompute_modules {sorted(missing_te)} need --transformer-impl transformer_engine")
    if args.fp8 and "layernorm" in missing_te and options.linear:
        raise ValueError("recompute_modules layernorm with fp8 is for softmax layers only; the pattern has linear ones")


def _check_reset_attention_mask(args, options: LayerOptions) -> None:
    """Who would not see the mask, or not look at it, would let documents see each other."""
    packed, pipeline = args.dataloader_inter_document_masking, args.pipeline_model_parallel_size
    wrong = {
        "linear mixers (they keep to the causal order alone)": options.linear,
        "transformer_impl transformer_engine (its causal kernels read no mask)": args.transformer_impl != "local",
        f"pipeline_model_parallel_size {pipeline} (stages in the middle get no mask)": pipeline > 1,
        "no_create_attention_mask_in_dataloader": not args.create_attention_mask_in_dataloader and not packed,
    }
    for name, refused in wrong.items():
        if refused:
            raise ValueError(
                f"reset_attention_mask cannot keep documents apart with {name}; "
                "use --dataloader-inter-document-masking, which packs them"
            )


def _check_value_residual(args, options: LayerOptions, letter: str) -> None:
    """Every layer takes the first one's values, so these must be there, as they were."""
    pipeline = args.pipeline_model_parallel_size
    wrong = {
        "pattern": (options.pattern.text, options.pattern.main[0] != letter, f"start with {letter}"),
        "multi-token prediction": (options.pattern.text, options.pattern.depths, "not be in the pattern"),
        "mom_memories": (args.mom_memories, args.mom_memories, "be 0: layers route tokens to other memories' rows"),
        "pipeline_model_parallel_size": (pipeline, pipeline > 1, "be 1"),
        "recompute_granularity": (args.recompute_granularity, args.recompute_granularity == "full", "not be full"),
    }
    for name, (value, refused, rule) in wrong.items():
        if refused:
            raise ValueError(f"mixer option value_residual: {name} ({value}) must {rule}")
