"""What Megatron's distributed checkpoints need from us, on GPU and CPU alike.

`patch_megatron()` once before training makes a checkpoint saved at any TP, PP, VPP, EP and DP, with or without the
distributed optimizer, load at any other with its optimizer state; `check_checkpoint(args)` refuses, before anything is
built or loaded, what cannot be loaded.
"""

import functools
import os
from dataclasses import replace
from pathlib import Path

from linear_moe.mcore import gpt_names, muon, old_layout, optimizer_state
from linear_moe.mcore.damage import TRACKER, damage, iteration, loaded_folder, remedy, whole
from linear_moe.mcore.pattern import make_pattern, mixer_letters
from linear_moe.mcore.writers import patch_writers

# Defaults for `parser.set_defaults`: "dp_reshardable", Megatron's own, only reshards along DP.
CHECKPOINT_DEFAULTS = {"dist_ckpt_optim_fully_reshardable": True}

# Arguments that decide which parameters exist and what shape they have.
ARCHITECTURE = (
    "layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels swiglu normalization "
    "apply_layernorm_1p add_bias_linear add_qkv_bias qk_layernorm attention_output_gate "
    "untie_embeddings_and_output_weights vocab_size "
    "multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim "
    "position_embedding_type mtp_use_repeated_layer num_experts moe_ffn_hidden_size "
    "moe_shared_expert_intermediate_size moe_shared_expert_gate moe_router_enable_expert_bias "
    "mixer mixer_args mom_memories mom_shared_memory mom_single_kv"
).split()
# Arguments that change what the same parameters compute: --finetune may change them, a resumed run may not.
BEHAVIOUR = (
    "moe_router_topk moe_router_score_function moe_router_pre_softmax moe_router_num_groups moe_router_group_topk "
    "moe_router_topk_scaling_factor mom_topk rotary_base rotary_percent squared_relu"
).split()
WEIGHTS_ONLY = "load the weights only: --no-load-optim --no-load-rng to keep the iteration, or --finetune to start at 0"


# --- before loading -------------------------------------------------------------------------------------------------


def check_checkpoint(args) -> None:
    """Raise ValueError if the checkpoint at `args.load`, or `args.pretrained_checkpoint` while that is empty, cannot be
    loaded under `args`, or if there is none, unless that is where this run will save its first.

    Call it after Megatron has parsed and validated its arguments, before `pretrain`. Mends a tracker file that an
    interrupted save has left empty.
    """
    folder = loaded_folder(args)
    if folder is None:
        _check_start(args)
        return
    finetune = args.finetune or folder != args.load  # as Megatron does with a pretrained checkpoint
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint import CheckpointException

    path = Path(folder) / _checkpoint_name(args, Path(folder))
    if not dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        return  # another format (legacy torch, DCP): Megatron's own business
    try:
        common = dist_checkpointing.load_common_state_dict(str(path))
    except (Exception, CheckpointException) as error:  # whatever unpickling garbage may raise
        raise ValueError(
            f"{path} is damaged: what it says of itself cannot be read ({type(error).__name__}); "
            + remedy(path.parent, path)
        ) from error
    saved = common.get("args")
    if saved is None:
        return
    names = ARCHITECTURE if finetune else ARCHITECTURE + BEHAVIOUR
    differing = [name for name in names if _differ(saved, args, name)]
    if differing:
        lines = [f"  {n}: {_value(saved, n)!r} in the checkpoint, {_value(args, n)!r} now" for n in differing]
        raise ValueError("\n".join([f"the checkpoint {path} is of another architecture:", *lines]))
    _check_vocabulary(path, saved, args)
    if not (finetune or args.no_load_optim or getattr(saved, "no_save_optim", False)):
        _check_optimizer(path, saved, args, dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {})
        if not args.skip_train:
            _check_schedule(path, common.get("opt_param_scheduler") or {}, args)


def _check_start(args) -> None:
    """Random weights are for the start of a training run, and no others."""
    if args.pretrained_checkpoint is not None:
        given = args.pretrained_checkpoint
        raise ValueError(f"--pretrained-checkpoint {given} has no checkpoint ({TRACKER} is missing)")
    if args.skip_train:
        given = f"{args.load} has no checkpoint" if args.load else "no --load"
        raise ValueError(f"--skip-train evaluates a checkpoint, but {given}: random weights are not worth evaluating")
    first = args.load is None or (args.save is not None and Path(args.load).resolve() == Path(args.save).resolve())
    if not first:
        raise ValueError(
            f"--load {args.load} has no checkpoint ({TRACKER} is missing); to start with random weights leave it out, "
            "or give the folder of --save"
        )


def _value(args, name: str):
    """An argument in a form that compares."""
    value = getattr(args, name, None)
    if name == "layers":
        return _layers(args)
    if name == "num_query_groups" and not getattr(args, "group_query_attention", False):
        return getattr(args, "num_attention_heads", None)  # Megatron writes this into its arguments later
    if name == "mixer_args" and value is not None:  # written out or left to their defaults, the options are the same
        from linear_moe.mcore.specs import mixer_options

        return {letter: options.config for letter, options in mixer_options(args).items()}
    return value


def _layers(args) -> str | None:
    """The pattern without its stages; None where a plain Megatron script wrote the arguments."""
    if not hasattr(args, "mixer"):
        return None
    pattern = make_pattern(args, mixer_letters(args.mixer))
    pattern = replace(pattern, stages=(pattern.main,))
    return pattern.megatrons if isinstance(args.mixer, str) else pattern.text


def _differ(saved, args, name: str) -> bool:
    if name != "layers" and not (hasattr(saved, name) and hasattr(args, name)):
        # One of the two programs does not know the option: a plain Megatron script has no mixer, and may not load one.
        return (getattr(saved, name, None) or None) != (getattr(args, name, None) or None)
    if name == "vocab_size" and (saved.vocab_size is None or args.vocab_size is None):
        return False  # a tokenizer's; _check_vocabulary looks at the padded size
    return _value(saved, name) != _value(args, name)


def _check_vocabulary(path: Path, saved, args) -> None:
    """Megatron would cut or fill up the embeddings, and their padding takes part in the softmax."""
    before, now = (getattr(a, "padded_vocab_size", None) for a in (saved, args))
    if before and now and before != now:
        raise ValueError(
            f"the vocabulary in {path} is padded to {before} rows, not {now}: if the tokenizer is the same, "
            f"--padded-vocab-size {before} loads it as it was trained"
        )


def _check_optimizer(path: Path, saved, args, metadata: dict) -> None:
    """What of the optimizer's state the engine cannot move to another layout."""
    if saved.params_dtype != args.params_dtype:
        raise ValueError(
            f"the optimizer state in {path} belongs to {saved.params_dtype} parameters, not {args.params_dtype}: "
            + WEIGHTS_ONLY
        )
    if saved.optimizer != args.optimizer:
        raise ValueError(f"the optimizer in {path} is {saved.optimizer}, not {args.optimizer}: {WEIGHTS_ONLY}")
    kind = metadata.get("distrib_optim_sharding_type", "fully_reshardable")
    names = "tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size".split()
    pairs = [(n, getattr(saved, n), getattr(args, n)) for n in [*names, "use_distributed_optimizer"]]
    changed = [f"{name}: {old} -> {new}" for name, old, new in pairs if old != new]
    if changed and kind not in ("fully_reshardable", "fully_sharded_model_space"):
        raise ValueError(
            f"the optimizer state in {path} is stored as {kind!r}, which only another number of data-parallel ranks "
            f"can read ({', '.join(changed)}). Save with --dist-ckpt-optim-fully-reshardable, or {WEIGHTS_ONLY}"
        )


def _check_schedule(path: Path, saved: dict, args) -> None:
    """Megatron asserts that the schedule is the same, but after it has built the model and loaded its parameters."""
    if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return
    schedule = _schedule(args)
    names = [name for name in schedule if name in saved and saved[name] != schedule[name]]
    if names:
        changed = [f"{name} {saved[name]} -> {schedule[name]}" for name in names]
        raise ValueError(
            f"{path} was trained on another schedule ({', '.join(changed)}; steps are samples): "
            "--override-opt-param-scheduler goes on with the new one (--lr, --train-iters, batch size and so on), "
            "--use-checkpoint-opt-param-scheduler with the checkpoint's"
        )


def _schedule(args) -> dict[str, object]:
    """What Megatron's scheduler will say of itself, steps counted in samples."""
    if args.train_iters:
        batch = args.global_batch_size
        total = args.train_iters * batch
        decay = (args.lr_decay_iters or args.train_iters) * batch
        warmup = args.lr_warmup_iters * batch
    else:
        total = args.train_samples
        decay = args.lr_decay_samples or args.train_samples
        warmup = args.lr_warmup_samples
    return {
        "max_lr": args.lr,
        "min_lr": args.min_lr,
        "lr_warmup_steps": warmup if args.lr_warmup_fraction is None else args.lr_warmup_fraction * decay,
        "lr_decay_steps": decay,
        "lr_decay_style": args.lr_decay_style,
        "start_wd": args.start_weight_decay,
        "end_wd": args.end_weight_decay,
        "wd_incr_steps": total,
        "wd_incr_style": args.weight_decay_incr_style,
    }


# --- interrupted saves ----------------------------------------------------------------------------------------------


def _checkpoint_name(args, folder: Path) -> str:
    """The checkpoint that Megatron will load, checked to be whole.

    Megatron writes a checkpoint's files, then its metadata.json, then the tracker: killed before the last, the tracker
    still names the one before. Only the tracker itself is written in place: killed just there, it is empty.
    """
    tracker = folder / TRACKER
    text = tracker.read_text().strip()
    last = None if text else next(whole(folder), None)
    if last:
        text = str(iteration(last))
        mended = tracker.with_suffix(f".{os.getpid()}")
        mended.write_text(text)
        mended.replace(tracker)  # atomic: every rank may be doing the same
    step = getattr(args, "ckpt_step", None) or text
    if str(step) == "release":
        return "release"
    if not str(step).isdigit():
        raise ValueError(f"{tracker} should hold an iteration but holds {text!r}; {remedy(folder)}")
    name = f"iter_{int(step):07d}"
    legacy = any((folder / name).glob("mp_rank_*"))
    wrong = None if legacy else damage(folder / name)
    if wrong:
        raise ValueError(f"{folder / name} is {wrong}; {remedy(folder)}")
    return name


# --- patches --------------------------------------------------------------------------------------------------------


def patch_megatron() -> None:
    """Make checkpoints independent of the layout. Idempotent; call it before the first one is saved or loaded."""
    from megatron.core.datasets import utils
    from megatron.training import checkpointing

    if getattr(checkpointing, "_linear_moe", False):
        return
    checkpointing._linear_moe = True

    # The wheel ships the data-set helpers compiled and no Makefile: compiling would end the program.
    if not (Path(utils.__file__).parent / "Makefile").exists():
        utils.compile_helpers = lambda: None

    build = checkpointing._build_sharded_state_dict_metadata

    @functools.wraps(build)
    def build_metadata(args, *rest, **kwargs):
        """Stored in the checkpoint when it is saved, and read back from it when it is loaded."""
        metadata = build(args, *rest, **kwargs)
        # One name per layer. By default all layers are slices of one tensor, which a hybrid model's are not.
        metadata["non_homogeneous_layers"] = True
        metadata |= optimizer_state.metadata(args)
        return metadata

    checkpointing._build_sharded_state_dict_metadata = build_metadata
    patch_writers()
    optimizer_state.patch()
    old_layout.patch()
    gpt_names.patch()
    muon.patch()
