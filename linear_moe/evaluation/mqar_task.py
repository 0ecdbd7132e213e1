"""Multi-query associative recall (arXiv 2312.04927): the examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

SPLITS = ("train", "validation", "test")
HELD_OUT_SEED = 0  # of validation and test, whatever the run's seed


@dataclass(frozen=True)
class Task:
    """Key-value pairs, then each key once more, whose value is to be said: Zoology's generator.

    A sequence of T tokens starts with P pairs: key, value, key, value, ... Keys differ from each other, values too. The
    rest is token 0, but for P queries, one of each key, at places 2P + 2g: g is drawn from
    {0, ..., (T - 2P) / 2 - 1} without replacement, with p(g) ~ (g + 1)^(power - 1). What is to be said at a query is
    the value that followed its key; nothing else has a loss or is scored.

    Args:
        seq_length: T, even. pairs: numbers of pairs, 4P <= T; examples take them in turns.
        vocab_size: V; keys are 1 ... V/2 - 1, values V/2 ... V - 1.
        power: of the gaps' power law, > 0; 1 is uniform.

    Raises:
        ValueError: pairs that do not fit the sequence or the vocabulary.
    """

    seq_length: int
    pairs: tuple[int, ...]
    vocab_size: int
    power: float = 0.01

    def __post_init__(self) -> None:
        if self.seq_length < 4 or self.seq_length % 2:
            raise ValueError(f"seq_length must be even and at least 4, but is {self.seq_length}")
        if not self.pairs or min(self.pairs) < 1 or len(set(self.pairs)) < len(self.pairs):
            raise ValueError(f"pairs must be different numbers of at least 1, but are {list(self.pairs)}")
        if self.power <= 0:
            raise ValueError(f"power must be positive, but is {self.power}")
        most, keys = max(self.pairs), self.vocab_size // 2 - 1
        if 4 * most > self.seq_length:
            raise ValueError(f"seq_length ({self.seq_length}) must be at least 4 times the pairs ({most})")
        if most > keys:
            raise ValueError(f"vocab_size ({self.vocab_size}) has {max(keys, 0)} keys, too few for {most} pairs")

    @property
    def chance(self) -> float:
        """Recall of a model that says any value."""
        return 1 / (self.vocab_size - self.vocab_size // 2)

    def example(self, split: str, seed: int, index: int) -> dict[str, torch.Tensor]:
        """The example of that index: tokens, labels, position_ids int64 ``[T]``; loss_mask float32, 1 at queries.

        A function of its arguments alone. Validation and test are the same for every seed.
        """
        fixed = HELD_OUT_SEED if split != "train" else seed
        rng = np.random.default_rng((SPLITS.index(split), fixed, index))
        T, P, half = self.seq_length, self.pairs[index % len(self.pairs)], self.vocab_size // 2
        keys = 1 + rng.choice(half - 1, P, replace=False)
        values = half + rng.choice(self.vocab_size - half, P, replace=False)
        law = np.arange(1, (T - 2 * P) // 2 + 1) ** (self.power - 1)
        places = 2 * P + 2 * rng.choice(len(law), P, replace=False, p=law / law.sum())
        tokens, labels, mask = np.zeros(T, np.int64), np.zeros(T, np.int64), np.zeros(T, np.float32)
        tokens[: 2 * P] = np.stack([keys, values], 1).ravel()
        tokens[places], labels[places], mask[places] = keys, values, 1
        arrays = {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": np.arange(T)}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Examples(torch.utils.data.Dataset):
    """The first ``number`` examples of a split."""

    def __init__(self, task: Task, split: str, seed: int, number: int):
        self.task, self.split, self.seed, self.number = task, split, seed, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.number:
            raise IndexError(f"example {index} of {self.number}")  # which also ends a loop over them
        return self.task.example(self.split, self.seed, int(index))
