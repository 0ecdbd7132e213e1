"""A run's configuration in a few lines, and its progress in one."""

import re
from datetime import timedelta

import torch

from linear_moe.mcore.data_checks import data_sources
from linear_moe.mcore.specs import layer_options

# Of Megatron's line about an iteration: what does not change, or is said otherwise.
LEFT_OUT = (
    "consumed samples|elapsed time per iteration|throughput per GPU|global batch size|loss scale: 1.0|number of .*: +0$"
)


def describe(args) -> list[str]:
    """What will be trained, on what, how, and where it is kept."""
    options = layer_options(args)
    mixers = [choice.mixer.__name__ if len(options.linear) == 1 else f"{letter} {choice.mixer.__name__}"
              for letter, choice in options.linear.items()]  # fmt: skip
    model = [f"{len(options.pattern.main)} layers {options.pattern.text}", *mixers]
    if options.mom and options.linear:
        shared = ", a shared one" if options.mom.shared else ""
        model.append(f"MoM of {options.mom.memories} memories (top-{options.mom.topk}{shared})")
    model += [f"hidden {args.hidden_size}", f"{args.num_attention_heads} heads", f"feed-forward {args.ffn_hidden_size}"]
    if args.num_experts:
        model.append(f"{args.num_experts} experts (top-{args.moe_router_topk})")
    model.append(f"vocabulary {args.padded_vocab_size}")
    sizes = {"tensor": args.tensor_model_parallel_size, "pipeline": args.pipeline_model_parallel_size}
    sizes |= {"expert": args.expert_model_parallel_size, "data": args.data_parallel_size}
    layout = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    device = "GPU" if torch.cuda.is_available() else "CPU"
    processes = f"{args.world_size} process{'es' * (args.world_size > 1)}"
    where = f"{processes} on {device}, {str(args.params_dtype).removeprefix('torch.')}"
    batch = f"{args.global_batch_size} sequences of {args.seq_length} tokens a step"
    schedule = f"{args.train_iters} steps" if args.train_iters else f"{args.train_samples} samples"
    rate = f"lr {args.lr} {args.lr_decay_style} to {args.min_lr}, {args.optimizer}"
    lines = [
        f"model: {', '.join(model)}",
        f"layout: {', '.join([where, *layout])}",
        f"data: {_data(args)}; {batch}",
        "evaluation only" if args.skip_train else f"schedule: {schedule}, {rate}",
    ]
    if args.save and not args.skip_train:
        every = f", every {args.save_interval} steps" if args.save_interval else ""
        lines.append(f"checkpoints: {args.save}{every}")
    return lines


def _data(args) -> str:
    if args.mock_data:
        return "mock data"
    sources = data_sources(args)
    return ", ".join(f"{name} {' '.join(source.prefixes)}" for name, source in sources.items())


def progress(line: str, iteration: int, iterations: int | None, figures: str) -> str:
    """Megatron's line about an iteration in brief, with figures of ours."""
    said = [field.strip() for field in line.split("|")[1:]]
    kept = [_short(field) for field in said if field and not re.match(LEFT_OUT, field)]
    seconds = float(re.search(r"elapsed time per iteration \(ms\): ([\d.]+)", line)[1]) / 1000
    if iterations:
        kept.append(f"ETA {timedelta(seconds=round(seconds * (iterations - iteration)))}")
    return f" iteration {iteration}/{iterations} | {' | '.join(kept)} |{figures}"


def _short(field: str) -> str:
    """1.234560E-01 as 0.123456."""
    return re.sub(r"\d\.\d+E[-+]\d+", lambda number: f"{float(number[0]):.6g}", field)
