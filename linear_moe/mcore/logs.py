"""What training says of a step beside Megatron's own figures: tokens/s, the true FLOP/s, and what MoM's routers did."""

import functools

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args, get_tensorboard_writer, get_timers, get_wandb_writer, training
from megatron.training.utils import print_rank_last

from linear_moe.mcore.brief import progress
from linear_moe.mcore.flops import training_flops
from linear_moe.mcore.quiet import megatron
from linear_moe.mcore.specs import layer_options
from linear_moe.mcore.telemetry import telemetry


def install_telemetry() -> None:
    """Let Megatron's log also say tokens/s, the true TFLOP/s and, for MoM, what the routers did. Idempotent."""
    if hasattr(training.training_log, "__wrapped__"):
        return
    training.num_floating_point_operations = training_flops
    log = training.training_log

    @functools.wraps(log)
    def training_log(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **kwargs):
        args = get_args()
        tokens_per_second = _tokens_per_second(args, total_loss_dict) if iteration % args.log_interval == 0 else None
        result = log(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **kwargs)
        figures = {} if tokens_per_second is None else {"tokens-per-second": tokens_per_second}
        written = (args.tensorboard_dir or args.wandb_project) and iteration % args.tensorboard_log_interval == 0
        if args.mom_memories and (written or tokens_per_second is not None):  # alike on all ranks: they reduce together
            figures |= _memory_figures(args)
        _write(figures, iteration)
        text = _figures_text(args, figures)
        if megatron.progress:  # only where Megatron's line would have been printed
            print(progress(megatron.progress, iteration, args.train_iters, text), flush=True)
            megatron.progress = None
        elif text:
            print_rank_last(text)
        return result

    training.training_log = training_log


def _figures_text(args, figures: dict[str, float]) -> str:
    tokens_per_second = figures.get("tokens-per-second")
    if tokens_per_second is None:
        return ""
    text = f" tokens/s: {tokens_per_second:.0f} |"
    if args.log_throughput and not (args.sft or args.dataloader_inter_document_masking):
        flops = training_flops(args, 1) / args.seq_length * tokens_per_second
        text += f" TFLOP/s of all processes: {flops / 1e12:.4g} |"
    if "mom/balance_loss" in figures:
        text += f" MoM balance loss: {figures['mom/balance_loss']:.3f} |"
        text += f" router entropy: {figures['mom/router_entropy']:.3f} |"
        text += f" dead memories: {figures['mom/dead_memories']:.0f} |"
    return text


def _tokens_per_second(args, total_loss_dict) -> float:
    """Tokens since the last log line over the time that Megatron's own timer gives it."""
    steps = 1 + sum(int(total_loss_dict.get(f"{kind} iterations", 0)) for kind in ("advanced", "skipped"))
    samples = args.micro_batch_size * args.data_parallel_size * get_num_microbatches()
    return steps * samples * args.seq_length / get_timers()("interval-time").elapsed(reset=False)


def _memory_figures(args) -> dict[str, float]:
    layers = telemetry.report(args.mom_memories, len(layer_options(args).pattern.every), torch.cuda.current_device())
    figures, kept = {}, [layer for layer in layers if layer]
    for number, layer in enumerate(layers, 1):
        figures |= {f"mom/layer_{number}/{name}": value for name, value in layer.items()}
    for name in ("balance_loss", "router_entropy", "z_loss"):
        figures[f"mom/{name}"] = sum(layer[name] for layer in kept) / max(len(kept), 1)
    figures["mom/dead_memories"] = sum(layer["dead_memories"] for layer in kept)
    return figures


def _write(figures: dict[str, float], iteration: int) -> None:
    writer, wandb = get_tensorboard_writer(), get_wandb_writer()
    for name, value in figures.items():
        if writer:
            writer.add_scalar(name, value, iteration)
    if wandb and figures:
        wandb.log(figures, iteration)
