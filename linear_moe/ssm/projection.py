"""Several projections of one input as one matrix product."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe.ops import Routes, grouped_linear
from linear_moe.ssm.mixer import Projection
from linear_moe.ssm.stored import Stored, Tensors

Sections = dict[str, int]
INNER = {None: lambda x: x, "tanh": torch.tanh, "sigmoid": torch.sigmoid}


class FusedProjection(nn.Module):
    """Several projections as one matrix product, their slices named once.

    ``weight`` is ``[(copies,) sum of local widths, D]``, cut by heads inside each section. The low-rank ones are a
    replicated ``down`` ``[(copies,) sum of ranks, D]`` and one ``up_<name>`` ``[(copies,) local width, rank]`` each.

    Args:
        specs: name -> Projection. sections: name -> full width. copies: 0 for one matrix, else how many there are, each
        for its own group of rows.
    """

    def __init__(
        self, hidden_size, specs: dict[str, Projection], sections: Sections, copies: int, shards: int, **factory
    ):
        super().__init__()
        lead = (copies,) if copies else ()
        self.axis = len(lead)
        self.ranks = {name: specs[name].low_rank for name in sections if specs[name].low_rank}
        self.inner = {name: specs[name].inner for name in self.ranks}
        self.local = {name: width // shards for name, width in sections.items() if name not in self.ranks}
        self.weight = nn.Parameter(torch.empty(*lead, sum(self.local.values()), hidden_size, **factory))
        if self.ranks:
            self.down = nn.Parameter(torch.empty(*lead, sum(self.ranks.values()), hidden_size, **factory))
        for name, rank in self.ranks.items():
            up = torch.empty(*lead, sections[name] // shards, rank, **factory)
            self.register_parameter(f"up_{name}", nn.Parameter(up))

    def forward(
        self, x: Tensor | dict[str, Tensor], replicated: Callable, routes: Routes | None = None
    ) -> dict[str, Tensor]:
        """x ``[..., D]`` -> name -> ``[..., local width]``; with routes, tokens -> rows by their memory's copy.

        Where x is a dict, every projection of its names has its own input; with routes, of rows already.
        """

        def product(x: Tensor, weight: Tensor, routes_of_x: Routes | None = None) -> Tensor:
            if routes is None:
                return F.linear(x, weight)
            return grouped_linear(x, weight, routes.memory_offsets, routes=routes_of_x)

        def products(weight: Tensor, sections: Sections) -> dict[str, Tensor]:
            widths = [*sections.values()]
            if not isinstance(x, dict):
                return dict(zip(sections, product(x, weight, routes).split(widths, -1)))
            parts = zip(sections, weight.split(widths, self.axis))
            return {name: product(x[name], part.contiguous()) for name, part in parts if name in x}

        out = products(self.weight, self.local)
        if self.ranks:
            for name, low in products(replicated(self.down), self.ranks).items():
                low = INNER[self.inner[name]](low)
                out[name] = product(low.contiguous(), getattr(self, f"up_{name}"))
        return out

    def tensors(self, prefix: str) -> Tensors:
        """Its projections by name, the factors of low-rank ones as ``<name>.down`` and ``<name>.up``."""
        *lead, _, hidden = self.weight.shape
        found: Tensors = {}
        for parameter, sizes, suffix, axis in (
            ("weight", self.local, "", self.axis),
            ("down", self.ranks, ".down", None),
        ):
            start = 0
            for name, size in sizes.items():
                shape = (*lead, size, hidden)
                found[name + suffix] = Stored(f"{prefix}{parameter}", shape, axis, True, section=name, start=start)
                start += size
        for name in self.ranks:
            shape = (*self.get_parameter(f"up_{name}").shape,)
            found[f"{name}.up"] = Stored(f"{prefix}up_{name}", shape, self.axis, True)
        return found

    def set_initializer(self, init_method: Callable[[Tensor], object]) -> None:
        """Give the parameters the attribute ``initializer``: init_method fills one projection in all of its copies,
        ``[(copies,) width, D]``."""

        def fill_parts(down: Tensor) -> None:
            for part in down.split([*self.ranks.values()], self.axis):
                init_method(part)

        self.weight.initializer = init_method  # called for each section
        for name in self.ranks:
            self.get_parameter(f"up_{name}").initializer = init_method
        if self.ranks:
            self.down.initializer = fill_parts
