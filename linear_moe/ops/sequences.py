"""Where the tokens of dense or packed sequences lie: worked out once, and kept with the borders of the sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .check import check_cu_seqlens, made_here


def sequence_of(T: int, cu_seqlens: Tensor) -> Tensor:
    """Which sequence each of T tokens belongs to, int64 ``[T]``; the last where cu_seqlens ends early."""

    def make() -> Tensor:
        token = torch.arange(T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
        return sequence.clamp(max=max(len(cu_seqlens) - 2, 0))

    return remembered(cu_seqlens, ("owner", T), make)


def remembered(cu_seqlens: Tensor, key: tuple, make: Callable):
    """What ``make()`` says of cu_seqlens; made once where the borders are known not to change (`check.made_here`)."""
    tables = getattr(cu_seqlens, "_tables", None)
    if tables is None:
        return make()
    if key not in tables:
        tables[key] = make()
    return tables[key]


@dataclass(frozen=True, eq=False, kw_only=True)
class Sequences:
    """B sequences of T tokens each, or N packed ones in one row; made once a forward pass, for all layers.

    Args:
        B, T: size of the batch; device: where its tensors lie.
        cu_seqlens: int32 ``[N + 1]``, then B is 1; None for dense sequences, then N is B.
        before: int64 ``[N]``, how many tokens of each sequence came in earlier calls; None for none.
        positions_of_rows: int64 ``[B, T]``, see ``positions``; None where they are the places.
        single: whether each sequence has one token at most, so that a rule may take a step.
    """

    B: int
    T: int
    device: torch.device | str = "cpu"
    cu_seqlens: Tensor | None = None
    before: Tensor | None = None
    positions_of_rows: Tensor | None = None
    single: bool = False

    @classmethod
    def of(cls, x: Tensor, cu_seqlens: Tensor | None = None, before: Tensor | None = None) -> Sequences:
        """Those of x ``[B, T, ...]``.

        Raises:
            ValueError: borders that do not run from 0 to T, or a batch of more than one (see ops.check_cu_seqlens).
        """
        B, T = x.shape[:2]
        N = check_cu_seqlens("packed sequences", cu_seqlens, B, T, x.device)
        if before is not None and [*before.shape] != [N]:
            raise ValueError(f"before must be [N] = [{N}], not {[*before.shape]}")
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.int().view(N + 1)  # a tensor of its own: the caller's may change
            made_here(cu_seqlens)
        single = cu_seqlens is None and T == 1
        return cls(B=B, T=T, device=x.device, cu_seqlens=cu_seqlens, before=before, single=single)

    @property
    def N(self) -> int:
        """How many sequences there are."""
        return self.B if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @cached_property
    def owner(self) -> Tensor:
        """Which sequence each token belongs to, int64 ``[B, T]``."""
        if self.cu_seqlens is None:
            return torch.arange(self.B, device=self.device)[:, None].expand(self.B, self.T)
        return sequence_of(self.T, self.cu_seqlens)[None]

    @cached_property
    def slots(self) -> Tensor:
        """``owner`` as one row ``[B * T]``: the states that one-token steps write, known to be there."""
        slots = self.owner.flatten()
        made_here(slots)
        return slots

    @cached_property
    def places(self) -> Tensor:
        """How many tokens of its sequence came before each token, earlier calls included, int64 ``[B, T]``."""
        place = torch.arange(self.T, device=self.device).expand(self.B, self.T)
        if self.cu_seqlens is not None:
            place = place - self.cu_seqlens.long()[self.owner]
        return place if self.before is None else place + self.before[self.owner]

    @property
    def positions(self) -> Tensor:
        """Each token's place in its document, int64 ``[B, T]``. Under MoM a sequence is what one memory sees of a
        document, and this is not the same as ``places``."""
        return self.places if self.positions_of_rows is None else self.positions_of_rows

    @cached_property
    def lengths(self) -> Tensor:
        """How many tokens each sequence has in this call, int64 ``[N]``."""
        if self.cu_seqlens is None:
            return torch.full((self.B,), self.T, device=self.device)
        return self.cu_seqlens.diff().long()

    @cached_property
    def after(self) -> Tensor:
        """How many tokens each sequence has had by the end of this call, int64 ``[N]``."""
        return self.lengths if self.before is None else self.before + self.lengths

    def rows(self, routes, before: Tensor | None = None) -> Sequences:
        """The buckets of a Mixture-of-Memories as packed sequences; before: of each bucket."""
        return Sequences(
            B=1,
            T=len(routes.token),
            device=self.device,
            cu_seqlens=routes.cu_seqlens,
            before=before,
            positions_of_rows=self.positions.flatten()[routes.token][None],
            single=self.single,
        )
