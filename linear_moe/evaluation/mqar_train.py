"""One run of a recall sweep, in a process of its own: python -m linear_moe.evaluation.mqar_train RUN.json, or under
torchrun.

RUN.json holds the task and the configuration of a Megatron training run. Megatron's loop trains on examples that never
come twice and scores the held-out ones; what it printed is read by `read_log`.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from linear_moe.evaluation.mqar_task import SPLITS, Examples, Task

# Data are made, not read; there is no text. Only the last word of a run counts, so it is scored once, at its end.
FIXED = {
    "mock-data": True,
    "tokenizer-type": "NullTokenizer",
    "make-vocab-size-divisible-by": 1,
    "no-create-attention-mask-in-dataloader": True,
    "no-check-for-nan-in-loss-and-grad": True,  # a learning rate at which a model diverges is an answer, not an error
    "eval-interval": 10**9,
}


def run_config(
    task: Task, *, steps: int, batch_size: int, examples: int, lr: float, seed: int, processes: int = 1
) -> dict[str, object]:
    """Megatron's arguments that a run gets whatever its model: task, budget, schedule.

    The learning rate warms up for a tenth of the steps, then falls to lr / 100 as a cosine. So many examples of each
    held-out set are scored, rounded up to whole batches.
    """
    return FIXED | {
        "seq-length": task.seq_length,
        "max-position-embeddings": task.seq_length,
        "vocab-size": task.vocab_size,
        "micro-batch-size": batch_size // processes,
        "global-batch-size": batch_size,
        "train-iters": steps,
        "lr": lr,
        "min-lr": lr / 100,
        "lr-decay-style": "cosine",
        "lr-warmup-iters": steps // 10,
        "eval-iters": -(-examples // batch_size),
        "log-interval": max(1, steps // 50),
        "seed": seed,
    }


def read_log(text: str, pairs: tuple[int, ...]) -> dict[str, object]:
    """loss_curve: [[step, mean loss since the last entry], ...]; validation, test: {loss, recall, recall_of: {pairs:
    recall}}, or None where the run did not get that far."""
    found: dict[str, object] = {
        "loss_curve": [
            [int(step), float(loss)] for step, loss in re.findall(r" iteration +(\d+)/.*? lm loss: (\S+)", text)
        ]
    }
    for split in SPLITS[1:]:
        line = re.search(rf"validation loss at .* on {split} set \|(.*)", text)
        values = {} if line is None else dict(re.findall(r"([\w/ ]+?) value: (\S+)", line[1]))
        score = {name.strip(): float(value) for name, value in values.items()}
        found[split] = score and {
            "loss": score["lm loss"],
            "recall": score["accuracy"],
            "recall_of": {str(n): score[f"accuracy/{n}"] for n in pairs},
        }
    return found


def main(run: Mapping[str, object]) -> None:
    from linear_moe.mcore.accuracy import accuracy_step
    from linear_moe.mcore.arguments import config_argv
    from linear_moe.mcore.pretrain import leave, prepare, train

    task = Task(**{**run["task"], "pairs": tuple(run["task"]["pairs"])})
    args = prepare(config_argv(run["config"], "run"))

    def provider(numbers: tuple[int, int, int], vp_stage=None) -> tuple[Examples, ...]:
        return tuple(Examples(task, split, args.seed, number) for split, number in zip(SPLITS, numbers))

    train(args, provider, functools.partial(accuracy_step, counts=task.pairs))
    leave()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
