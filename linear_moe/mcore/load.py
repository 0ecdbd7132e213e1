"""A model from a Megatron checkpoint folder, in one process, whatever layout wrote it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.extensions.transformer_engine import HAVE_TE
from torch.distributed.checkpoint import CheckpointException

from linear_moe.mcore.arguments import add_arguments, config_argv
from linear_moe.mcore.checkpoint import _checkpoint_name, check_checkpoint
from linear_moe.mcore.cpu import enable_cpu
from linear_moe.mcore.damage import TRACKER, _line, remedy
from linear_moe.mcore.damage import iteration as iteration_of
from linear_moe.mcore.gpt_names import has_gpt_names, use_gpt_names
from linear_moe.mcore.inference import Limits
from linear_moe.mcore.model import ONE_PROCESS, model_from_args, parse
from linear_moe.mcore.pattern import LATENT, SHORT_SOFTMAX, SOFTMAX

# Of these groups of Megatron's arguments a checkpoint's values count, ...
GROUPS = ("transformer configuration", "network size", "moe", "mla", "experimental_attention_variant", "linear_moe")
ALSO = ("seq_length", "rope_type", "attention_softmax_in_fp32", "pad_vocab_size", "vocab_size", "padded_vocab_size")
# ... but not where they say how a run computes, on which machines, and not what; nor how weights start.
HOW = re.compile(
    "parallel|overlap|pipeline|recompute|fusion|fused|fuser|offload|graph|comm|wgrad|^nccl|symmetric|^fp[48]|bf16_red"
    "|first_last|_in_bf16|dispatch|deepep|hybridep|ncclep|_num_sms|^inference|flash|attention_backend|kernel_backend"
    "|kitchen|transformer_impl|initiali|^init_|_init_|meta_device|deterministic|verbose|logger|logging|paged_stash"
    "|coder_|upcycling|mem_eff|use_te_|cross_entropy|heterogeneous|weight_shards|_chunks_|cache_mla|mla_down_proj|_nvls"
)


def load_model(path: str | Path, iteration: int | None = None, **overrides: object) -> torch.nn.Module:
    """The model of a checkpoint, its weights loaded, in this one process and in eval mode.

    Args:
        path: a folder that Megatron has saved to, or one checkpoint in it. iteration: which one; the last by default.
        overrides: as of `build_model`, for what does not say which weights there are (``bf16=False``, ``mom_topk=1``).

    Returns:
        Megatron's HybridModel (``megatron.core.models.hybrid``) on the GPU, or on the CPU where there is none.

    Raises:
        ValueError: no checkpoint there, a damaged one, one without its arguments, or overrides that do not fit it.
    """
    enable_cpu()
    path, common = find_checkpoint(path, iteration)
    args = _arguments(common["args"], overrides, path)
    check_checkpoint(args)
    model = model_from_args(args).to(torch.cuda.current_device())
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {}
    wanted = {"model": model.sharded_state_dict(metadata=metadata)}
    if has_gpt_names(common["args"]):
        use_gpt_names(wanted)
    try:
        loaded = dist_checkpointing.load(wanted, str(path))
    except (Exception, CheckpointException) as error:
        causes = getattr(error, "failures", None)
        cause = _line(next(iter(causes.values()))[0] if causes else error)
        raise ValueError(f"{path} cannot be loaded ({cause}); {remedy(path.parent, path)}") from error
    model.load_state_dict(loaded["model"])
    return model.eval()


def find_checkpoint(path: str | Path, iteration: int | None = None) -> tuple[Path, dict]:
    """Where a checkpoint lies, and what it says of itself; ``["args"]``: the arguments of the run that wrote it.

    Raises:
        ValueError: none there, or a damaged one.
    """
    folder = Path(path)
    if re.fullmatch(r"iter_\d+", folder.name) and not (folder / TRACKER).exists():
        folder, iteration = folder.parent, iteration_of(folder)
    if not folder.is_dir():
        raise ValueError(f"no checkpoint: {path} is not a folder")
    if not (folder / TRACKER).exists():
        raise ValueError(f"no checkpoint in {folder}: {TRACKER} is missing")
    found = folder / _checkpoint_name(argparse.Namespace(ckpt_step=iteration), folder)
    if not dist_checkpointing.check_is_distributed_checkpoint(str(found)):
        raise ValueError(f"{found} is not a distributed checkpoint (--ckpt-format torch_dist)")
    try:
        common = dist_checkpointing.load_common_state_dict(str(found))
    except (Exception, CheckpointException) as error:  # whatever unpickling garbage may raise
        raise ValueError(f"{found} is damaged: it cannot be read ({_line(error)}); {remedy(folder, found)}") from error
    if "args" not in common:
        raise ValueError(f"{found} does not hold the arguments of the run that wrote it, so no model can be built")
    return found, common


def saved_limits(saved: argparse.Namespace) -> Limits:
    """What the model of a checkpoint can be asked (see `inference.limits`), by its arguments, before it is built."""
    layers = getattr(saved, "layers", None) or getattr(saved, "layer_pattern", SHORT_SOFTMAX)
    softmax = not {SHORT_SOFTMAX, SOFTMAX, LATENT}.isdisjoint(layers)
    positional = saved.position_embedding_type == "learned_absolute" or softmax
    vocabulary = getattr(saved, "vocabulary", None) or saved.vocab_size or saved.padded_vocab_size
    return Limits(vocabulary, saved.max_position_embeddings if positional else None, ranks=1)


def _arguments(saved: argparse.Namespace, overrides: dict[str, object], path: Path) -> argparse.Namespace:
    """Arguments of the same model here: the checkpoint's, this machine's, and above them the overrides."""
    overrides = {name.replace("_", "-"): value for name, value in overrides.items()} | ONE_PROCESS
    fixed = {"num-layers", "layer-pattern", "hybrid-layer-pattern", "moe-layer-freq"} & overrides.keys()
    if fixed:
        raise ValueError(f"{path} says which layers there are, so {', '.join(sorted(fixed))} cannot be overridden")

    def add_with_defaults(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_arguments(parser)
        groups = [group for group in parser._action_groups if group.title in GROUPS]
        names = [action.dest for group in groups for action in group._group_actions if not HOW.search(action.dest)]
        found = {name: getattr(saved, name) for name in (*names, *ALSO) if hasattr(saved, name)}
        if hasattr(saved, "layers"):  # else it is of before HybridModel, and its layer_pattern says all
            found["hybrid_layer_pattern"] = saved.layers
        if not HAVE_TE:
            found["moe_grouped_gemm"] = False  # the same weights, one expert after the other
        for action in parser._actions:  # a switch that the checkpoint has set, and an override takes back
            flags = {flag.removeprefix("--").replace("_", "-") for flag in action.option_strings}
            if any(overrides.get(flag) is False for flag in flags):
                found[action.dest] = action.default if action.default is not None else False
        parser.set_defaults(**found)
        return parser

    argv = config_argv({"micro-batch-size": 1, "no-initialization": True} | overrides, "load_model")
    args = parse(argv, add_with_defaults)
    args.vocabulary = getattr(saved, "vocabulary", None)
    args.load, args.finetune = str(path.parent), True
    args.ckpt_step = iteration_of(path) if path.name != "release" else None
    return args
