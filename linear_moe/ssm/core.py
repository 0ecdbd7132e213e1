"""The body of a mixer layer on one rank's heads: projections, short convolution, the rule, norm and gate.

It knows no process group. ``shard`` of ``shards`` says which heads are its own, and ``replicated`` is called on every
parameter that all shards hold a copy of, so that a parallel layer can sum its gradient. With ``memories`` > 0 the same
body serves Mixture-of-Memories: the write projections then exist once per memory and work on routed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from linear_moe.ops import Routes, conv_step, gather, shift_step, short_conv
from linear_moe.ops.sequences import Sequences
from linear_moe.ops.shift import token_shift
from linear_moe.ssm.declaration import check_declaration
from linear_moe.ssm.full_state import full_state, load_full_state
from linear_moe.ssm.mixer import Mixer, Projection
from linear_moe.ssm.projection import FusedProjection
from linear_moe.ssm.recompute import Recompute
from linear_moe.ssm.scan import Carried, Plain, Scan
from linear_moe.ssm.state import MixerState, carry
from linear_moe.ssm.stored import Stored, Tensors


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
        first_values: what mixers with a value residual share, one dictionary for all layers of a model.
        recompute: make the rule's operands again in the backward from the projections' outputs; do not keep both.

    Raises:
        ValueError: heads that the number of shards does not divide, and what ``check_declaration`` refuses.
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
        first_values: dict[str, Tensor] | None = None,
        recompute: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        check_declaration(mixer)
        for per in ("key", "value"):
            if mixer.heads(per) % shards:
                name = {"key": "num_heads", "value": "num_value_heads"}[per]
                raise ValueError(
                    f"mixer option {name} ({mixer.heads(per)}) must be divisible by the tensor parallel size ({shards})"
                )
        self.mixer, self.shards, self.shard, self.replicated = mixer, shards, shard, replicated
        self.first_values, self.recompute = first_values, recompute
        factory = {"dtype": dtype, "device": device}
        self.specs = mixer.projections()
        self.gate = next((name for name, spec in self.specs.items() if spec.role == "gate"), None)
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
            if value.shape[:1] != (mixer.heads(parameter.per),):
                raise ValueError(
                    f"{type(mixer).__name__}: head parameter {name!r} must start with its {parameter.per} heads "
                    f"({mixer.heads(parameter.per)}), but init makes {[*value.shape]}"
                )
            if parameter.trainable:
                self.head_shapes[name] = (value.shape[0] // shards, *value.shape[1:])
                # Flat, because optimizers decay what has two dimensions, and none of these is a matrix.
                add(name, (value.numel(),), partial(_fill, partial(parameter.init, len(value))))
            else:
                self.constants[name] = self._cut(value).to(device)
        for name, spec in self.specs.items():
            if spec.conv and mixer.config.conv_size:
                add(f"conv_{name}", (spec.width * mixer.heads(spec.per), mixer.config.conv_size), _fill_conv)
        self.heads = Parameters(heads)  # sharded along their first dimension
        shared: dict[str, nn.Parameter] = {}
        for name, init in mixer.shared_parameters().items():
            shared[name] = nn.Parameter(init().to(**factory))
            shared[name].initializer = partial(_fill, init)
        self.shared = Parameters(shared)

    def _fused(self, names, hidden_size, copies, factory) -> FusedProjection | None:
        if not names:
            return None
        sections = {n: self.specs[n].width * self.mixer.heads(self.specs[n].per) for n in names}
        return FusedProjection(hidden_size, self.specs, sections, copies, self.shards, **factory)

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
        parameters = dict(self.named_parameters())
        for stored in self.tensors().values():
            parameter = parameters[stored.parameter]
            fill = init_method if stored.matrix else parameter.initializer
            whole = torch.empty(stored.whole_shape(self.shards), device=parameter.device if stored.matrix else "cpu")
            fill(whole)
            stored.of(parameter).copy_(stored.cut(whole, self.shards, self.shard))

    def set_initializer(self, init_method: Callable[[Tensor], object]) -> None:
        """Give the projections' parameters the attribute ``initializer``; see FusedProjection's."""
        for fused in filter(None, (self.tokens, self.rows)):
            fused.set_initializer(init_method)

    def tensors(self) -> Tensors:
        """Every parameter by its declared name: projections, head parameters and convolutions, shared parameters."""
        found: Tensors = {}
        for part, fused in (("tokens", self.tokens), ("rows", self.rows)):
            if fused is not None:
                found |= fused.tensors(f"{part}.")
        for name, parameter in self.heads.named_parameters():
            found[name] = Stored(f"heads.{name}", self.head_shapes.get(name, (*parameter.shape,)), axis=0)
        for name, parameter in self.shared.named_parameters():
            found[name] = Stored(f"shared.{name}", (*parameter.shape,))
        return found

    def full_state(self) -> dict[str, Tensor]:
        """Declared name -> a copy of the tensor, unfused and unflattened: projections ``[(memories,) out, in]`` (the
        shared memory last), low-rank ones as ``<name>.down`` ``[(memories,) rank, in]`` and ``<name>.up``
        ``[(memories,) out, rank]``, head parameters ``[H, ...]``, ``conv_<name>`` ``[channels, taps]``.

        Raises:
            ValueError: this is one shard of several; ``MixerLayer`` gathers them.
        """
        self._require_one_shard()
        return full_state(self.tensors(), dict(self.named_parameters()), lambda part, axis: part)

    def load_full_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes what ``full_state`` gives, in any data type and on any device.

        Raises:
            ValueError: a missing or an unknown tensor, or one of another shape (nothing is loaded then); and as above.
        """
        self._require_one_shard()
        load_full_state(self.tensors(), dict(self.named_parameters()), state, 1, 0)

    def _require_one_shard(self) -> None:
        if self.shards != 1:
            raise ValueError(f"whole tensors need all shards, but this is shard {self.shard} of {self.shards}")

    def forward(
        self,
        x: Tensor,
        *,
        routes: Routes | None = None,
        sequences: Sequences | None = None,
        state: MixerState | None = None,
    ) -> Tensor:
        """x ``[B, T, D]`` -> ``[B, T, local HV * V]``.

        Args:
            routes: to which memories its tokens go. sequences: where its tokens lie; None for B whole sequences of T.
            state: what the sequences go on from, and where what they leave is kept; None for whole sequences.
        """
        B, T, _ = x.shape
        sequences = Sequences.of(x) if sequences is None else sequences
        entered = sequences  # what the rule runs on: the sequences, or under MoM the buckets' rows
        if routes is not None:
            entered = sequences.rows(routes, before=None if state is None else state.get("seen"))
        heads = self.heads()
        p = {name: self.replicated(value) for name, value in self.shared().items()} | self.constants
        p |= {name: heads[name].view(shape) for name, shape in self.head_shapes.items()}
        tokens, rows = self._project(x, p, routes, sequences, entered, state)
        dtype = next(iter(tokens.values())).dtype  # a rule may answer in a wider one
        gate = tokens.pop(self.gate, None)
        made: list[tuple[Tensor, Callable[[], Tensor]]] = []  # what short_conv returned, and how
        operand = partial(self._operand, heads=heads, made=made, sequences=entered, state=state)
        operands = {name: operand(name, value, routes=routes) for name, value in tokens.items()}
        operands |= {name: operand(name, value[None]) for name, value in rows.items()}
        if self.mixer.value_residual:
            self.mixer.mix_values(operands, p, self.first_values)
        scan = self._scan(entered, p, state)
        with Recompute(made) if self.recompute else nullcontext():
            o = self.mixer.recur(**operands, p=p, scan=scan)
        if state is not None:
            state.put("rule", scan.final)
            if routes is not None:  # of whole sequences the caller knows
                state.put("seen", entered.after)
        if gate is not None:
            gate = gate.flatten(0, 1).unflatten(-1, (-1, self.specs[self.gate].width))
        y = self.mixer.output(o.flatten(0, 1), gate, p, routes)
        return y.to(dtype).flatten(1).unflatten(0, (B, T))

    def _scan(self, sequences: Sequences, p: dict[str, Tensor], state: MixerState | None) -> Scan:
        kept = None if state is None else state.get("rule")
        if kept is not None:
            return Carried(sequences, kept, in_place=True)
        initial = self.mixer.initial_state(p, sequences.N)
        return Plain(sequences, initial) if state is None else Carried(sequences, initial)

    def _project(
        self,
        x: Tensor,
        p: dict[str, Tensor],
        routes: Routes | None,
        sequences: Sequences,
        entered: Sequences,
        state: MixerState | None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """name -> projection of the tokens ``[B, T, width]``, and name -> projection of the rows ``[R, width]``."""
        if not self.mixer.token_shift:
            rows = self.rows(x.flatten(0, 1), self.replicated, routes) if self.rows is not None else {}
            return self.tokens(x, self.replicated), rows
        writes = [n for n, s in self.specs.items() if s.role == "write"]
        names = [n for n in self.specs if routes is None or n not in writes]
        shifted = _shift(x, "shift", sequences, state)
        tokens = self.tokens(self.mixer.mix(names, x, shifted, p), self.replicated)
        if routes is None:
            return tokens, {}
        # What enters a memory is mixed with the token that entered it before, also where memories share projections.
        x = gather(x.flatten(0, 1), routes)
        shifted = _shift(x[None], "shift_rows", entered, state)
        mixed = self.mixer.mix(writes, x, shifted[0], p)
        if self.rows is None:
            return tokens, self.tokens(mixed, self.replicated)
        return tokens, self.rows(mixed, self.replicated, routes)

    def _operand(
        self,
        name: str,
        x: Tensor,
        *,
        heads: dict[str, Tensor],
        made: list[tuple[Tensor, Callable[[], Tensor]]],
        sequences: Sequences,
        state: MixerState | None,
        routes: Routes | None = None,
    ) -> Tensor:
        """A projection's output ``[B, T, heads * width]`` as ``[B, T, heads, width]`` for the rule; with routes, of
        tokens for rows, which lie in ``sequences``."""
        spec: Projection = self.specs[name]
        weight = heads[f"conv_{name}"] if spec.conv and self.mixer.config.conv_size else None
        if weight is not None or spec.activation or spec.normalize:
            options = {"activation": spec.activation, "normalize": spec.width if spec.normalize else None}
            kept = None if state is None or weight is None else state.get(f"conv_{name}")
            if kept is not None and sequences.single:
                rows = x.flatten(0, 1) if routes is None else gather(x.flatten(0, 1), routes)
                y, _ = conv_step(rows, weight, kept, slots=sequences.slots, **options)
                return y.unflatten(0, (sequences.B, sequences.T)).unflatten(-1, (-1, spec.width))
            options |= {"routes": routes, "cu_seqlens": sequences.cu_seqlens if routes is None else None}
            convolve = partial(short_conv, x, weight, **options)
            x = carry(state if weight is not None else None, f"conv_{name}", convolve)
            made.append((x, lambda: convolve()[0]))
        elif routes is not None:
            x = gather(x.flatten(0, 1), routes).unsqueeze(0)
        return x.unflatten(-1, (-1, spec.width))


def _shift(x: Tensor, name: str, sequences: Sequences, state: MixerState | None) -> Tensor:
    """The token before each of x ``[B, T, D]``; before a sequence's first that of the state of that name."""
    kept = None if state is None else state.get(name)
    if kept is not None and sequences.single:
        return shift_step(x.flatten(0, 1), kept, slots=sequences.slots)[0].view_as(x)
    return carry(state, name, partial(token_shift, x, cu_seqlens=sequences.cu_seqlens))


def _fill(make: Callable[[], Tensor], tensor: Tensor) -> None:
    tensor.copy_(make().view(tensor.shape))


def _fill_conv(tensor: Tensor) -> None:
    """Uniform in +-1/sqrt(taps), as torch's Conv1d starts."""
    bound = tensor.shape[1] ** -0.5
    tensor.uniform_(-bound, bound)
