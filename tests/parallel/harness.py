"""Train through Megatron's own loop inside a case of launch.py, and see what came of it, whatever the layout.

    run = train(pretrain_fn, [*flags], save=folder)       # pretrain_fn(argv) calls megatron.training.pretrain
    run.losses, run.grad_norms, run.tensors    # tensors: {global name: whole tensor}, optimizer state included

`differences(run, reference)` and `same_tensors(run, reference)` compare two runs.
"""

import gc
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from linear_moe.mcore.checkpoint import patch_megatron
from linear_moe.mcore.cpu import enable_cpu

# A model small enough that a run takes seconds; its batch divides by every layout of 4 processes, and its vocabulary is
# one that Megatron itself pads to 384 in one process and to 512 under TP 2. No data.
# Adam divides by the gradient's size: with its usual epsilon of 1e-8 it blows rounding up where gradients vanish.
TINY = """--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 32
    --max-position-embeddings 32 --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
    --micro-batch-size 1 --global-batch-size 4 --train-iters 4 --lr 1e-2 --lr-warmup-iters 2 --lr-decay-iters 10
    --min-lr 1e-3 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0 --adam-eps 1e-6 --log-interval 1
    --eval-iters 0 --eval-interval 1000
    --split 100,0,0 --tokenizer-type NullTokenizer --vocab-size 300
    --distributed-timeout-minutes 1 --seed 1234 --save-interval 1000""".split()


@dataclass
class Run:
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)  # every entry of the loss dictionary
    iterations: list[int] = field(default_factory=list)
    figures: list[dict[str, float]] = field(default_factory=list)  # what MoM's telemetry wrote
    save: str | None = None  # where its checkpoints are

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """{global name: whole tensor} of the last checkpoint, optimizer state included."""
        return read_checkpoint(self.save)


def train(pretrain_fn: Callable[[list[str]], None], argv: list[str], save: str | None = None) -> Run:
    """Run `pretrain_fn` once from a clean slate, with checkpoints in the folder `save` if it is given."""
    from megatron.training import training

    enable_cpu()
    from linear_moe.mcore import logs

    patch_megatron()
    reset_megatron()
    run, log = Run(save=save), training.training_log

    def spy(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs):
        run.metrics.append({name: float(value.float().mean()) for name, value in loss_dict.items()})
        run.grad_norms.append(float(args[3]))
        run.learning_rates.append(learning_rate)
        run.iterations.append(iteration)
        return log(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)

    training.training_log = spy
    try:
        with unittest.mock.patch.object(logs, "_write", lambda figures, _: run.figures.append(figures)):
            pretrain_fn([*argv, *(["--save", str(save)] if save else [])])
    finally:
        training.training_log = log
    # Only the last pipeline stage knows the losses.
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, run.metrics)
    run.metrics = next((metrics for metrics in everyone if any(metrics)), run.metrics)
    run.losses = [metrics["lm loss"] for metrics in run.metrics if metrics]
    torch.distributed.barrier()  # rank 0 writes the last checkpoint's metadata
    return run


def reset_megatron() -> None:
    """Forget everything a run has left in Megatron's globals; torch.distributed itself stays up."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.training import checkpointing, training

    if parallel_state.model_parallel_is_initialized():
        _destroy_groups()
    training.destroy_global_state()
    destroy_moe_metrics_tracker()
    random._CUDA_RNG_STATE_TRACKER, random._CUDA_RNG_STATE_TRACKER_INITIALIZED = None, False
    checkpointing._CHECKPOINT_VERSION = checkpointing._LOADED_ITERATION = None
    # Hooks of autograd's own nodes keep a model's wrapper; it must not keep the model, whose groups have threads that
    # poll: 20 each, a hundred times a second.
    for wrapper in [thing for thing in gc.get_objects() if type(thing) is DistributedDataParallel]:
        vars(wrapper).clear()
    gc.collect()


def _destroy_groups() -> None:
    """Megatron only forgets its groups; gloo's sockets and threads would pile up from case to case."""
    torch.distributed.barrier()
    world = torch.distributed.distributed_c10d._world
    for group in [group for group in world.pg_map if group is not torch.distributed.group.WORLD]:
        torch.distributed.destroy_process_group(group)


def latest(folder: str | Path) -> Path:
    """The last complete checkpoint under a --save folder."""
    iteration = int((Path(folder) / "latest_checkpointed_iteration.txt").read_text())
    return Path(folder) / f"iter_{iteration:07d}"


def read_checkpoint(folder: str | Path, iteration: int | None = None, without: str = "") -> dict[str, torch.Tensor]:
    """A checkpoint of a --save folder, the last if none is named, as whole tensors under their global names, read by
    torch alone; without those whose name has a certain part.
    """
    path = str(latest(folder) if iteration is None else Path(folder) / f"iter_{iteration:07d}")
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, dcp.metadata.TensorStorageMetadata) and not (without and without in name)
    }
    dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return tensors


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    x, reference = x.double(), reference.double()
    return float((x - reference).norm() / reference.norm().clamp_min(1e-12))


def differences(run: Run, reference: Run, losses=1e-5, norms=1e-4, tensors=1e-4) -> list[str]:
    """What differs by more than the given relative errors, as readable lines; an empty list means the runs agree.

    Of the optimizer's state only Adam's first moments are compared: they are linear in the gradients, so a gradient
    of a wrong scale, which Adam would hide from the parameters, shows in them. The rest is `same_tensors`' business.
    """
    found = []
    runs = {name: (getattr(run, name), getattr(reference, name)) for name in ("losses", "grad_norms")}
    for figure in reference.figures[0] if reference.figures else ():
        if figure.startswith("mom/"):
            runs[figure] = tuple([figures.get(figure, float("nan")) for figures in r.figures] for r in (run, reference))
    for name, (ours, theirs) in runs.items():
        tolerance = losses if name == "losses" else norms
        if len(ours) != len(theirs) or not ours:
            found.append(f"{name}: {ours} is not as long as {theirs}")
        elif not all(abs(a - b) <= tolerance * abs(b) for a, b in zip(ours, theirs, strict=True)):
            found.append(f"{name}: {ours} is not {theirs}")
    ours, theirs = ({k: v for k, v in r.tensors.items() if _compared(k)} for r in (run, reference))
    if ours.keys() != theirs.keys():
        found.append(f"parameters differ in name: {sorted(ours.keys() ^ theirs.keys())}")
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name].shape != theirs[name].shape:
            found.append(f"{name}: {tuple(ours[name].shape)} is not {tuple(theirs[name].shape)}")
        elif (error := relative_error(ours[name], theirs[name])) > tensors:
            found.append(f"{name}: relative error {error:.1e}")
    return found


def _compared(name: str) -> bool:
    return not name.startswith("optimizer.") or name.startswith("optimizer.state.exp_avg.")


def same_tensors(run: Run, reference: Run) -> list[str]:
    """Names of tensors, optimizer state included, that are not bitwise equal."""
    names = run.tensors.keys() | reference.tensors.keys()
    missing = [n for n in names if n not in run.tensors or n not in reference.tensors]
    return sorted(missing + [n for n in names if n not in missing and not run.tensors[n].equal(reference.tensors[n])])
