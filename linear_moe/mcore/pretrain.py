"""Pretraining: our arguments and layers, then Megatron's own training loop."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from importlib.util import find_spec

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    StragglerDetector,
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, get_tokenizer, pretrain, training
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args, parse_args
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.utils import (
    get_blend_and_blend_per_split,
    is_first_or_last_pipeline_stage,
)

from linear_moe.mcore import quiet
from linear_moe.mcore.arguments import add_arguments, expand_argv, set_argv
from linear_moe.mcore.brief import describe
from linear_moe.mcore.checkpoint import check_checkpoint
from linear_moe.mcore.checks import check_arguments
from linear_moe.mcore.cpu import enable_cpu
from linear_moe.mcore.damage import patch_errors
from linear_moe.mcore.data_checks import check_data, data_sources
from linear_moe.mcore.folder import check_folder, hold_folder, release_folder
from linear_moe.mcore.logs import install_telemetry
from linear_moe.mcore.model import model_config
from linear_moe.mcore.vocabulary import check_vocabulary, padded_size

SPIKE = 10  # a loss this many times larger than the largest so far is reported with --check-for-spiky-loss
BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
PACK_KEYS = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")

stimer = StragglerDetector()


def main(argv: list[str] | None = None) -> None:
    """Train what the flags say: ``--config file.yaml`` and any flag of Megatron's or ours."""
    train(prepare(sys.argv[1:] if argv is None else argv))


def prepare(argv: list[str]):
    """Megatron's arguments from the flags, checked.

    Raises:
        ValueError: arguments, data or a checkpoint that cannot work, before anything is built.
    """
    enable_cpu()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asks for it under tensor parallelism
    set_argv(expand_argv(argv))
    early = parse_args(add_arguments)
    quiet.megatron.listen(early)
    check_arguments(early)
    check_data(early)
    if early.tokenizer_type in (None, "HuggingFaceTokenizer") and find_spec("transformers") is None:
        raise ValueError("Hugging Face tokenizers need the extra `data`: pip install 'linear-moe[data]'")
    try:
        args = parse_and_validate_args(add_arguments, args_defaults={"tokenizer_type": "HuggingFaceTokenizer"})
    except AssertionError as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(f"Megatron refuses these arguments: {str(error) or where.line}") from error
    if args.padded_vocab_size is None:  # --no-pad-vocab-size
        args.padded_vocab_size = padded_size(get_tokenizer().vocab_size, args)
    args.vocabulary = get_tokenizer().vocab_size  # kept in checkpoints: padded_vocab_size has rows without a token
    check_checkpoint(args)
    if args.rank == 0 and not (args.mock_data or args.sft):  # it may read a whole file
        check_vocabulary(args, [prefix for source in data_sources(args).values() for prefix in source.prefixes])
    check_folder(args)
    args.create_attention_mask_in_dataloader &= args.reset_attention_mask  # else it says no more than the causal order
    return args


def train(args, provider=None, step=None) -> None:
    """Megatron's training loop over our layers, for arguments from ``prepare``.

    provider, step: other data sets or another forward step than `datasets_provider` and `forward_step`, which take the
    same arguments.

    Raises:
        Refused: a --save folder that another run holds, a damaged checkpoint or a full disk, with the remedy.
    """
    install_telemetry()
    patch_errors()
    if args.rank == 0 and not args.verbose:
        print("\n".join(describe(args)), flush=True)
    provider = provider or datasets_provider
    provider.is_distributed = True
    config = model_config(args)
    config.pre_wrap_hooks.append(lambda chunks: hold_folder(args) or chunks)  # the first place where ranks can talk
    try:
        pretrain(
            pretrain_cfg_container_from_args(args, config), provider, ModelType.encoder_or_decoder, step or forward_step
        )
    finally:
        release_folder()


def leave() -> None:
    """The end of a training program, on every rank: a process that ends with its groups alive may abort (gloo's threads
    are still there when Python takes their groups down)."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


# --- data -----------------------------------------------------------------------------------------------------------


def datasets_provider(num_samples, vp_stage=None):
    """Train, validation and test sets of Megatron's GPTDataset (or of packed chats with --sft)."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
        inter_document_masking=args.dataloader_inter_document_masking,
    )
    kind = SFTDataset if args.sft else MockGPTDataset if args.mock_data else GPTDataset
    needed = functools.partial(_data_on_this_rank, vp_stage=vp_stage)
    return BlendedMegatronDatasetBuilder(kind, num_samples, needed, config).build()


def _packed() -> bool:
    return get_args().sft or get_args().dataloader_inter_document_masking


def _data_on_this_rank(vp_stage=None) -> bool:
    """Tokens are read by the first rank of a tensor-parallel group, on stages that see them or need their borders."""
    return mpu.get_tensor_model_parallel_rank() == 0 and (is_first_or_last_pipeline_stage(vp_stage) or _packed())


def get_batch(data_iterator, vp_stage=None) -> dict[str, torch.Tensor | None]:
    """One microbatch on this rank: BATCH_KEYS and PACK_KEYS, None where this stage has no use for them."""
    args = get_args()
    if not is_first_or_last_pipeline_stage(vp_stage) and not _packed():
        return dict.fromkeys(BATCH_KEYS + PACK_KEYS)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch = {}
    if tp_rank == 0:
        read = next(data_iterator)
        _check_ids(args, read)
        keys = (*BATCH_KEYS, *PACK_KEYS, "local_cp_size", "hybrid_cp_group")
        batch = {k: None if read.get(k) is None else read[k].cuda(non_blocking=True) for k in keys}
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=_packed(),
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=1,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp_on_this_rank(None, args.mtp_num_layers, False, vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return flatten_batch_for_packed_sequences(batch)


def _check_ids(args, read: dict[str, torch.Tensor]) -> None:
    """A large file without a record was only checked in part, and tensor parallelism takes any id without a word."""
    largest = max(int(read[key].max()) for key in ("tokens", "labels"))  # still on the CPU
    if largest >= args.padded_vocab_size:
        raise ValueError(f"the data has token id {largest}, beyond the model's vocabulary of {args.padded_vocab_size}")


def packed_seq_params(batch: dict) -> PackedSeqParams | None:
    """Where the sequences of a packed batch lie; None when it is not packed."""
    if batch.get("cu_seqlens") is None:
        return None
    real = batch["cu_seqlens"].squeeze(0)
    training.update_seqlen_stats_from_cu_seqlens(real)
    padded = batch.get("cu_seqlens_padded")
    padded = real if padded is None else padded.squeeze(0)
    longest = int(batch["max_seqlen"].item())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=padded,
        cu_seqlens_kv=padded,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


# --- one step -------------------------------------------------------------------------------------------------------


def loss_func(loss_mask: torch.Tensor, output: torch.Tensor):
    """Sum of the masked token losses, their number, and both for the log."""
    args = get_args()
    mask = loss_mask.view(-1).float()
    loss = (output.view(-1).float() * mask).sum()
    tokens = mask.sum().detach().to(torch.int)
    checks = []
    rerun = get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        checks += [(torch.isnan, "NaN in the loss", True), (torch.isinf, "Inf in the loss", True)]
    if args.check_for_spiky_loss:
        spiky = functools.partial(rerun.is_unexpectedly_large, threshold=SPIKE, context="loss")
        checks.append((spiky, "a spike in the loss", False))
    for rejects, message, fatal in checks:
        rerun.validate_result(result=loss, rejection_func=rejects, message=message, tolerance=0.0, fatal=fatal)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


def forward_step(data_iterator, model):
    """One microbatch through the model: its output and the function that makes a loss of it."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with stimer(bdata=True):
        batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
        packed = packed_seq_params(batch)
    timers("batch-generator").stop()
    with stimer:
        output = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
            packed_seq_params=packed,
        )
    return output, functools.partial(loss_func, batch["loss_mask"])
