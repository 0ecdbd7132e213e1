"""The body of a mixer layer on one rank's heads: projections, short convolution, the rule, norm and gate.

It knows no process group. ``shard`` of ``shards`` says which heads are its own, and ``replicated`` is called on every
parameter that all shards hold a copy of, so that a parallel layer can sum its gradient. With ``memories`` > 0 the same
body serves Mixture-of-Memories: the write projections then exist once per memory and work on routed rows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe.ops import Routes, gather, grouped_linear, short_conv
from linear_moe.ssm.mixer import Mixer, Projection
from linear_moe.ssm.recompute import Recompute

Sections = dict[str, int]


class FusedProjection(nn.Module):
    """Several projections as one matrix product, their slices named once.

    ``weight`` is ``[(copies,) sum of local widths, D]``, cut by heads inside each section. The low-rank ones are a
    replicated ``down`` ``[(copies,) sum of ranks, D]`` and one ``up_<name>`` ``[(copies,) local width, rank]`` each.

    Args:
        sections: name -> full width. ranks: name -> rank, for those that are low-rank. copies: 0 for one matrix, else
        how many there are, each for its own group of rows.
    """

    def __init__(self, hidden_size, sections: Sections, ranks: Sections, copies: int, shards: int, **factory):
        super().__init__()
        lead = (copies,) if copies else ()
        self.axis = len(lead)
        self.full = {name: width for name, width in sections.items() if name not in ranks}
        self.local = {name: width // shards for name, width in self.full.items()}
        self.ranks = ranks
        self.weight = nn.Parameter(torch.empty(*lead, sum(self.local.values()), hidden_size, **factory))
        if ranks:
            self.down = nn.Parameter(torch.empty(*lead, sum(ranks.values()), hidden_size, **factory))
        for name, rank in ranks.items():
            up = torch.empty(*lead, sections[name] // shards, rank, **factory)
            self.register_parameter(f"up_{name}", nn.Parameter(up))

    def forward(self, x: Tensor, replicated: Callable, routes: Routes | None = None) -> dict[str, Tensor]:
        """x ``[..., D]`` -> name -> ``[..., local width]``; with routes, tokens -> rows by their memory's copy."""

        def product(x: Tensor, weight: Tensor, routes_of_x: Routes | None = None) -> Tensor:
            if routes is None:
                return F.linear(x, weight)
            return grouped_linear(x, weight, routes.memory_offsets, routes=routes_of_x)

        out = dict(zip(self.local, product(x, self.weight, routes).split(list(self.local.values()), -1)))
        if self.ranks:
            lower = product(x, replicated(self.down), routes).split(list(self.ranks.values()), -1)
            for (name, _), low in zip(self.ranks.items(), lower):
                out[name] = product(low.contiguous(), getattr(self, f"up_{name}"))
        return out


class Parameters(nn.Module):
    """Named parameters that are called for: Megatron waits for a gathered parameter before its module's forward."""

    def __init__(self, parameters: dict[str, nn.Parameter]):
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)

    def forward(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())


class MixerCore(nn.Module):
    """A mixer over the heads of one shard: ``[B, T, D]`` -> ``[B, T, local HV * V]``, before the output projection.

    Args:
        mixer: the mixer, for all heads. hidden_size: D.
        memories: how many memories have write projections of their own (the shared one included); 0 for none.
        shards, shard: tensor-parallel size and rank. replicated: applied to parameters that all shards copy.
        recompute: make the rule's operands again in the backward from the projections' outputs; do not keep both.

    Raises:
        ValueError: heads that the number of shards does not divide.
    """

    def __init__(
        self,
        mixer: Mixer,
        hidden_size: int,
        *,
        memories: int = 0,
        shards: int = 1,
        shard: int = 0,
        replicated: Callable[[Tensor], Tensor] = lambda parameter: parameter,
        recompute: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        for per in ("key", "value"):
            if mixer.heads(per) % shards:
                name = {"key": "num_heads", "value": "num_value_heads"}[per]
                raise ValueError(
                    f"mixer option {name} ({mixer.heads(per)}) must be divisible by the tensor parallel size ({shards})"
                )
        self.mixer, self.shards, self.shard, self.replicated = mixer, shards, shard, replicated
        self.recompute = recompute
        factory = {"dtype": dtype, "device": device}
        self.specs = mixer.projections()
        per_memory = {n for n, s in self.specs.items() if memories and s.role == "write"}
        self.tokens = self._fused([n for n in self.specs if n not in per_memory], hidden_size, 0, factory)
        self.rows = self._fused(sorted(per_memory, key=list(self.specs).index), hidden_size, memories, factory)

        self.constants: dict[str, Tensor] = {}
        self.head_shapes: dict[str, tuple[int, ...]] = {}
        heads: dict[str, nn.Parameter] = {}

        def add(name, shape, initializer):
            heads[name] = nn.Parameter(torch.empty(shape[0] // shards, *shape[1:], **factory))
            heads[name].initializer = initializer  # fills the whole parameter, of all shards, in place

        for name, parameter in mixer.parameters_per_head().items():
            value = parameter.init(mixer.heads(parameter.per))
            if parameter.trainable:
                self.head_shapes[name] = (value.shape[0] // shards, *value.shape[1:])
                # Flat, because optimizers decay what has two dimensions, and none of these is a matrix.
                add(name, (value.numel(),), partial(_fill, parameter.init, len(value)))
            else:
                self.constants[name] = self._cut(value).to(device)
        for name, spec in self.specs.items():
            if spec.conv and mixer.config.conv_size:
                add(f"conv_{name}", (spec.width * mixer.heads(spec.per), mixer.config.conv_size), _fill_conv)
        self.heads = Parameters(heads)  # sharded along their first dimension
        self.shared = Parameters(
            {name: nn.Parameter(init().to(**factory)) for name, init in mixer.shared_parameters().items()}
        )

    def _fused(self, names, hidden_size, copies, factory) -> FusedProjection | None:
        if not names:
            return None
        sections = {n: self.specs[n].width * self.mixer.heads(self.specs[n].per) for n in names}
        ranks = {n: self.specs[n].low_rank for n in names if self.specs[n].low_rank}
        return FusedProjection(hidden_size, sections, ranks, copies, self.shards, **factory)

    def _cut(self, full: Tensor, axis: int = 0) -> Tensor:
        return full.chunk(self.shards, axis)[self.shard]

    def _apply(self, fn, recurse=True):
        # Constants follow the parameters' device, but stay in float32 when a model is cast to bfloat16.
        super()._apply(fn, recurse)
        device = next(self.parameters()).device
        self.constants = {name: value.to(device) for name, value in self.constants.items()}
        return self

    @torch.no_grad()
    def initialize(self, init_method: Callable[[Tensor], object]) -> None:
        """Draw whole weights and keep this shard's part, so that initial values do not depend on the sharding.

        init_method fills a tensor in place; it is used for the projections.
        """
        for fused in (self.tokens, self.rows):
            if fused is None:
                continue
            lead, hidden = fused.weight.shape[:-2], fused.weight.shape[-1]
            like = {"device": fused.weight.device}
            cut = []
            for width in fused.full.values():
                full = torch.empty(*lead, width, hidden, **like)
                init_method(full)
                cut.append(self._cut(full, fused.axis))
            fused.weight.copy_(torch.cat(cut, fused.axis))
            if fused.ranks:
                init_method(fused.down)
                for name in fused.ranks:
                    up = getattr(fused, f"up_{name}")
                    full = torch.empty(*lead, up.shape[-2] * self.shards, up.shape[-1], **like)
                    init_method(full)
                    up.copy_(self._cut(full, fused.axis))
        for parameter in self.heads.parameters():
            full = torch.empty(parameter.shape[0] * self.shards, *parameter.shape[1:])
            parameter.initializer(full)
            parameter.copy_(self._cut(full))
        for name, parameter in self.shared.named_parameters():
            parameter.copy_(self.mixer.shared_parameters()[name]())

    def sharded_axes(self) -> dict[str, int]:
        """Parameter name -> the axis that is cut over the shards; every other parameter is replicated."""
        axes = {f"heads.{name}": 0 for name, _ in self.heads.named_parameters()}
        for part, fused in (("tokens", self.tokens), ("rows", self.rows)):
            if fused is not None:
                axes[f"{part}.weight"] = fused.axis
                axes |= {f"{part}.up_{name}": fused.axis for name in fused.ranks}
        return axes

    def sections(self) -> dict[str, Sections]:
        """Fused parameter name -> its sections on this shard (name -> width), along its sharded axis."""
        parts = {"tokens": self.tokens, "rows": self.rows}
        return {f"{part}.weight": fused.local for part, fused in parts.items() if fused is not None}

    def forward(self, x: Tensor, *, routes: Routes | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """x ``[B, T, D]``; routes: to which memories its tokens go; cu_seqlens: int32 ``[N + 1]``, then B is 1."""
        B, T, _ = x.shape
        heads = self.heads()
        positions = sequence_positions(B, T, cu_seqlens, x.device)
        tokens = self.tokens(x, self.replicated)
        gate = tokens.pop("gate", None)
        made: list[tuple[Tensor, Callable[[], Tensor]]] = []  # what short_conv returned, and how
        operands = {n: self._operand(n, value, heads, made, cu_seqlens, routes) for n, value in tokens.items()}
        if routes is not None:
            positions, cu_seqlens = positions.flatten()[routes.token].unsqueeze(0), routes.cu_seqlens
            if self.rows is not None:
                rows = self.rows(x.flatten(0, 1), self.replicated, routes)
                operands |= {n: self._operand(n, value[None], heads, made, cu_seqlens) for n, value in rows.items()}
        p = {name: self.replicated(value) for name, value in self.shared().items()} | self.constants
        p |= {name: heads[name].view(shape) for name, shape in self.head_shapes.items()}
        with Recompute(made) if self.recompute else nullcontext():
            o, _ = self.mixer.recur(
                **operands, p=p, state=None, return_state=False, cu_seqlens=cu_seqlens, positions=positions
            )
        if gate is not None:
            gate = gate.flatten(0, 1).unflatten(-1, (-1, self.specs["gate"].width))
        return self.mixer.output(o.flatten(0, 1), gate, p, routes).flatten(1).unflatten(0, (B, T))

    def _operand(
        self,
        name: str,
        x: Tensor,
        heads: dict[str, Tensor],
        made: list[tuple[Tensor, Callable[[], Tensor]]],
        cu_seqlens: Tensor | None,
        routes: Routes | None = None,
    ) -> Tensor:
        """A projection's output ``[B, T, heads * width]`` as ``[B, T, heads, width]`` for the rule; with routes, of
        tokens for rows."""
        spec: Projection = self.specs[name]
        weight = heads[f"conv_{name}"] if spec.conv and self.mixer.config.conv_size else None
        if weight is not None or spec.activation or spec.normalize:
            options = {"activation": spec.activation, "normalize": spec.width if spec.normalize else None}
            options |= {"routes": routes, "cu_seqlens": cu_seqlens if routes is None else None}
            projected = x
            x, _ = short_conv(projected, weight, **options)
            made.append((x, lambda: short_conv(projected, weight, **options)[0]))
        elif routes is not None:
            x = gather(x.flatten(0, 1), routes).unsqueeze(0)
        return x.unflatten(-1, (-1, spec.width))


def _fill(init: Callable[[int], Tensor], heads: int, tensor: Tensor) -> None:
    tensor.copy_(init(heads).flatten())


def _fill_conv(tensor: Tensor) -> None:
    """Uniform in +-1/sqrt(taps), as torch's Conv1d starts."""
    bound = tensor.shape[1] ** -0.5
    tensor.uniform_(-bound, bound)


def sequence_positions(B: int, T: int, cu_seqlens: Tensor | None, device) -> Tensor:
    """Each token's place in its own sequence, int64 ``[B, T]``."""
    token = torch.arange(T, device=device)
    if cu_seqlens is None:
        return token.expand(B, T)
    ends = cu_seqlens[1:].long()
    starts = cu_seqlens.long()[torch.searchsorted(ends, token, right=True).clamp(max=len(ends) - 1)]
    return (token - starts).expand(B, T)
