"""From arguments to Megatron's HybridModel with our layers."""

from __future__ import annotations

import contextlib
import copy
import io
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.training import arguments as megatrons
from megatron.training.argument_utils import hybrid_config_from_args
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

from linear_moe.mcore import experts
from linear_moe.mcore.arguments import add_arguments, config_argv, set_argv
from linear_moe.mcore.call import before_forward
from linear_moe.mcore.checkpoint import patch_megatron
from linear_moe.mcore.checks import check_arguments
from linear_moe.mcore.configs import read_config
from linear_moe.mcore.cpu import enable_cpu
from linear_moe.mcore.init import reinitialize
from linear_moe.mcore.mixer_layer import MixerLayer
from linear_moe.mcore.specs import hybrid_spec, layer_options
from linear_moe.mcore.vocabulary import padded_size

ONE_PROCESS = {"tensor-model-parallel-size": 1, "pipeline-model-parallel-size": 1, "expert-model-parallel-size": 1}


def model_config(args) -> HybridModelConfig:
    """Megatron's HybridModelConfig with the layers that the arguments name.

    Also prepares Megatron's checkpoints for them (``checkpoint.patch_megatron``), so call it before training starts.
    With ``--use-cpu-initialization`` every parameter starts as a function of its name and ``--seed`` alone, whatever
    the parallel layout.

    Raises:
        ValueError: arguments that do not fit together (see ``check_arguments``).
    """
    check_arguments(args)
    if args.hybrid_layer_pattern is None:
        raise ValueError("validate_args was imported before add_arguments ran: call megatron.training.arguments' own")
    patch_megatron()
    experts.patch()
    if args.padded_vocab_size is None and args.vocab_size is not None:  # no tokenizer was built
        args.padded_vocab_size = padded_size(args.vocab_size, args)
    config = hybrid_config_from_args(args)
    options = layer_options(args)
    vocabulary = getattr(args, "vocabulary", None) or args.vocab_size or args.padded_vocab_size
    config.pre_wrap_hooks += [_watch_calls, partial(_note_vocabulary, size=vocabulary), partial(_rotate, args=args)]
    config.hybrid_stack_spec = hybrid_spec(config.transformer, options)
    if args.use_cpu_initialization and args.perform_initialization:
        config.pre_wrap_hooks.append(partial(_reinitialize, seed=args.seed))
    return config


def _watch_calls(chunks: list) -> list:
    for chunk in chunks:
        mixers = [module for module in chunk.modules() if isinstance(module, MixerLayer)]
        if mixers:
            chunk.register_forward_pre_hook(partial(before_forward, mixers), with_kwargs=True)
    return chunks


def _note_vocabulary(chunks: list, size: int) -> list:
    """The embeddings' rows are padded; who draws tokens from the model must know of how many."""
    for chunk in chunks:
        chunk.vocabulary = size
    return chunks


def _rotate(chunks: list, args) -> list:
    """What a GPTModel tells its rotary embedding and a HybridModel does not."""
    for chunk in chunks:
        rotary = getattr(chunk, "rotary_pos_emb", None)
        if rotary is not None:
            rotary.rotary_interleaved = args.rotary_interleaved
        if rotary is not None and args.use_rope_scaling:
            rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, factor=args.rope_scaling_factor)
    return chunks


def _reinitialize(chunks: list, seed: int) -> list:
    for chunk in chunks:
        reinitialize(chunk, seed)
    return chunks


def build_model(config: str | Path | Mapping[str, object], **overrides: object) -> torch.nn.Module:
    """The model of a configuration, in this one process, without torchrun; for notebooks and tests.

    Args:
        config: a YAML file, the name of a packaged configuration such as ``"tiny"`` (see ``configs.read_config``), or a
        mapping of Megatron's and our argument names. overrides: further arguments, such as ``num_layers=4``, which win.

    Returns:
        Megatron's HybridModel (``megatron.core.models.hybrid``) on the GPU, or on the CPU where there is none. Call it
        as ``model(tokens, position_ids, None, labels=labels)`` with int64 ``[b, s]`` tensors: losses ``[b, s]`` with
        labels, logits ``[b, s, vocab]`` without.

    Raises:
        ValueError: an unknown key or values that do not fit together.
    """
    return make_model(config, **overrides).to(torch.cuda.current_device())


def make_model(config: str | Path | Mapping[str, object], **overrides: object) -> torch.nn.Module:
    """What ``build_model`` returns, wherever Megatron makes it: on the CPU with --use-cpu-initialization."""
    return model_from_args(arguments_of(config, **overrides))


def arguments_of(config: str | Path | Mapping[str, object], **overrides: object):
    """Megatron's and our arguments for the model of a configuration in one process."""
    enable_cpu()
    merged = dict(read_config(config)) if isinstance(config, (str, Path)) else dict(config)
    name = str(config) if isinstance(config, (str, Path)) else "build_model"
    merged = {str(key).replace("_", "-"): value for key, value in merged.items()}
    merged |= {key.replace("_", "-"): value for key, value in overrides.items()}
    merged |= ONE_PROCESS
    merged.setdefault("micro-batch-size", 1)
    merged.setdefault("vocab-size", 512)
    return parse(config_argv(merged, name))


def model_from_args(args) -> torch.nn.Module:
    """The model of parsed arguments, in this one process."""
    _allow_copies()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every argument
        megatrons.validate_args(args)  # and ours: see add_arguments
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        backend = "nccl" if torch.cuda.is_available() and args.distributed_backend == "nccl" else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    torch.manual_seed(args.seed)
    model_parallel_cuda_manual_seed(args.seed)
    config = model_config(args)
    model = HybridModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    for hook in config.pre_wrap_hooks:
        hook([model])
    # Megatron adds the figures of all models' experts up in one table, as deep as the first; nobody reads it here.
    model.register_forward_pre_hook(lambda *_: destroy_moe_metrics_tracker())
    return model


def _allow_copies() -> None:
    """Let copy.deepcopy copy a model, which fails on two things that modules keep."""
    torch.distributed.ProcessGroup.__deepcopy__ = lambda self, memo: self  # both talk to the same ranks

    def without_last_batch(dispatcher, memo: dict):
        twin = memo[id(dispatcher)] = copy.copy(dispatcher)
        for name, value in vars(dispatcher).items():
            of_a_graph = isinstance(value, torch.Tensor) and not value.is_leaf
            setattr(twin, name, None if of_a_graph else copy.deepcopy(value, memo))
        return twin

    MoETokenDispatcher.__deepcopy__ = without_last_batch


def parse(argv: list[str], provider=add_arguments):
    """Megatron's and our arguments from flags; provider: what adds ours to Megatron's parser."""
    before = sys.argv
    try:
        set_argv(argv)
        return megatrons.parse_args(provider)
    finally:
        sys.argv = before
