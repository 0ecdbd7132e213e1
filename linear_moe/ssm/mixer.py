"""The contract of a mixer: what it projects, which parameters its heads have, and its update rule.

A mixer knows no process group, no kernel and no state. It declares its parts for ALL heads of the model; the layer
(``ssm/core.py``) builds them for the heads that live on this rank, so tensor parallelism, checkpoints and
Mixture-of-Memories come for free. Inside ``recur`` and ``output`` every tensor has the local heads only.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_type_hints

import torch
from torch import Tensor

from linear_moe.ops import Routes, gated_norm, widen
from linear_moe.ssm.scan import Scan

Role = Literal["read", "write", "gate"]
PER = Literal["key", "value"]
Inner = Literal["tanh", "sigmoid"]


@dataclass(frozen=True, kw_only=True)
class Projection:
    """One linear map of the hidden state.

    Args:
        width: channels per head.
        role: ``read`` (asks the memory: q), ``write`` (enters the memory: k, v, decay, beta) or ``gate``
            (what becomes of the answer; at most one). Under MoM each memory has its own write projections.
        per: whether there is one such vector per ``key`` head (H) or per ``value`` head (HV).
        conv: pass through the short causal convolution (if the mixer's ``conv_size`` > 0).
        activation: ``"silu"`` or None, applied after the convolution, or alone where there is none.
        normalize: divide each head by its L2 norm, last of all. A gate has none of these three.
        low_rank: factor the map through this many channels shared by all heads (0: a full matrix).
        inner: activation between the two factors of a low-rank map: ``"tanh"``, ``"sigmoid"`` or None.
    """

    width: int
    role: Role
    per: PER = "value"
    conv: bool = False
    activation: Literal["silu"] | None = None
    normalize: bool = False
    low_rank: int = 0
    inner: Inner | None = None


@dataclass(frozen=True, kw_only=True)
class HeadParameter:
    """A parameter or constant whose leading dimension is the heads, so TP shards it generically.

    Args:
        init: number of heads -> float32 tensor ``[heads, ...]``, drawn from torch's default CPU generator.
        per: ``key`` heads or ``value`` heads.
        trainable: False makes a constant (kept in float32, not in checkpoints).
    """

    init: Callable[[int], Tensor]
    per: PER = "value"
    trainable: bool = True


class Mixer:
    """Base class of all mixers. A subclass is one file: ``Config``, ``projections``, ``recur``, perhaps more.

    What it declares is checked when a layer is built from it (``declaration.py``).

    Args:
        config: this mixer's options.
        layer: its depth, from 0; num_layers: how deep the model is (some decays depend on it). Both count the layers
            that mix the sequence, softmax attention among them, whatever else stands between.
    """

    rule = ""  # the update rule, for people
    paper = ""  # where it comes from
    default_conv_size = 0
    gate_activation: Literal["silu", "sigmoid"] = "silu"
    # Floating-point operations of one token and head, in units of K V: 2 to write, 2 to read; a delta rule also reads
    # before it writes. The recurrence's own, whatever a chunked kernel computes beyond it.
    rule_flops = 4
    token_shift = False  # whether each projection has an input of its own, that `mix` makes with the token before

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options every mixer has; a subclass adds its own fields.

        num_heads: query/key heads H. num_value_heads: value heads HV, a multiple of H. head_dim: K.
        value_head_dim: V. conv_size: taps of the short convolution, 0 for none. norm_eps: of the output norm.
        """

        num_heads: int
        num_value_heads: int
        head_dim: int
        value_head_dim: int
        conv_size: int = 0
        norm_eps: float = 1e-5

        def __post_init__(self) -> None:
            for name in ("num_heads", "num_value_heads", "head_dim", "value_head_dim"):
                if getattr(self, name) < 1:
                    raise ValueError(f"mixer option {name} must be at least 1, but is {getattr(self, name)}")
            if not 0 < self.norm_eps < math.inf:
                raise ValueError(f"mixer option norm_eps must be a number above 0, but is {self.norm_eps}")
            if self.conv_size < 0 or self.conv_size == 1:
                raise ValueError(f"mixer option conv_size must be 0 (none) or at least 2, but is {self.conv_size}")
            if self.num_value_heads % self.num_heads:
                raise ValueError(
                    f"num_value_heads ({self.num_value_heads}) must be a multiple of num_heads ({self.num_heads})"
                )

    def __init__(self, config: Config, layer: int = 0, num_layers: int = 1) -> None:
        self.config, self.layer, self.num_layers = config, layer, num_layers

    @classmethod
    def default_options(cls, hidden_size: int, num_attention_heads: int) -> dict:
        """Options that follow from the model's size where the user gives none."""
        head_dim = hidden_size // num_attention_heads
        return {
            "num_heads": num_attention_heads,
            "num_value_heads": num_attention_heads,
            "head_dim": head_dim,
            "value_head_dim": head_dim,
            "conv_size": cls.default_conv_size,
        }

    @classmethod
    def make_config(cls, hidden_size: int, num_attention_heads: int, options: Mapping[str, object]) -> Config:
        """The mixer's Config from the model's size and the user's options.

        ``num_heads`` alone also sets ``num_value_heads`` and, where they are not given, the head widths. A Config that
        has a field ``hidden_size`` gets the model's; it is no option.

        Raises:
            ValueError: an option that does not exist (with the nearest that does) or has the wrong type.
        """
        types = get_type_hints(cls.Config)
        allowed = [f.name for f in fields(cls.Config) if f.name != "hidden_size"]
        for name, value in options.items():
            if name not in allowed:
                near = difflib.get_close_matches(name, allowed, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                raise ValueError(f"unknown mixer option {name!r}{hint} {cls.__name__} has: {', '.join(allowed)}")
            expected = (int, float) if types[name] is float else types[name]
            if not isinstance(value, expected) or (isinstance(value, bool) and types[name] is not bool):
                raise ValueError(
                    f"mixer option {name} must be of type {types[name].__name__}, but is {value!r} "
                    f"({type(value).__name__})"
                )
        heads = options.get("num_heads", num_attention_heads)
        if heads < 1 or hidden_size < heads:
            raise ValueError(f"num_heads ({heads}) must be between 1 and the hidden size ({hidden_size})")
        if hidden_size % heads and not {"head_dim", "value_head_dim"} <= options.keys():
            raise ValueError(
                f"hidden_size ({hidden_size}) must be divisible by num_heads ({heads}), "
                "unless head_dim and value_head_dim are given"
            )
        size = {"hidden_size": hidden_size} if "hidden_size" in types else {}
        return cls.Config(**{**cls.default_options(hidden_size, heads), **size, **options})

    @property
    def key_channels(self) -> int:
        """K of a head's state, after any feature map."""
        return self.config.head_dim

    @property
    def state_size(self) -> int:
        """Numbers that the recurrence keeps for one sequence, of all heads (under MoM: for each memory)."""
        return self.config.num_value_heads * self.key_channels * self.config.value_head_dim

    def heads(self, per: PER) -> int:
        """Number of heads of the whole model of that kind."""
        return self.config.num_heads if per == "key" else self.config.num_value_heads

    def projections(self) -> dict[str, Projection]:
        """name -> Projection, in the order in which they are stored."""
        raise NotImplementedError

    def parameters_per_head(self) -> dict[str, HeadParameter]:
        """name -> HeadParameter, handed to ``recur`` and ``output`` in ``p``. Shared by all memories of a MoM."""
        return {}

    def shared_parameters(self) -> dict[str, Callable[[], Tensor]]:
        """name -> initial value of a parameter that all heads share (so it is replicated under TP)."""
        return {"norm": lambda: torch.ones(self.config.value_head_dim)}

    def mix(self, names: Sequence[str], x: Tensor, previous: Tensor, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Token shift: the inputs of the projections of those names. Called where ``token_shift`` is True.

        Args:
            x: ``[..., hidden]``. previous: the token before in the same sequence, or under MoM, for write projections,
                in the same bucket; zeros before the first.
            p: the shared parameters, by name.

        Returns:
            name -> ``[..., hidden]``.
        """
        raise NotImplementedError

    @property
    def value_residual(self) -> bool:
        """Whether the layers after the first mix its values into theirs, by `mix_values`."""
        return False

    def mix_values(self, operands: dict[str, Tensor], p: Mapping[str, Tensor], first: dict[str, Tensor]) -> None:
        """Leaves the first layer's values in ``first``, or mixes them into another layer's ``operands["v"]``, in place
        of the dictionaries. Called before ``recur`` where ``value_residual`` is True."""
        raise NotImplementedError

    def initial_state(self, p: Mapping[str, Tensor], N: int):
        """What the rule starts N sequences from: its state, ``[N, ...]``; None for zeros."""
        return None

    def recur(self, *operands: Tensor, p: Mapping[str, Tensor], scan: Scan) -> Tensor:
        """From the read and write operands (keyword arguments, by projection name) to the memory's answer.

        It says which rule runs on which operands, by one call of ``scan(rule, *operands, **options) -> o``; how it is
        run, whole sequences or from a state, is the layer's affair.

        Args:
            operands: ``[B, T, heads, width]`` each, after convolution, activation and normalisation. A subclass names
                them.
            p: the parameters, by name.
            scan: see scan.py. ``scan.sequences`` tells where tokens lie: ``positions`` in their documents, for rotary
                embeddings, and ``places`` in what the rule runs on, both int64 ``[B, T]``.

        Returns:
            ``[B, T, HV, V]``.
        """
        raise NotImplementedError

    def output(self, o: Tensor, gate: Tensor | None, p: Mapping[str, Tensor], routes: Routes | None) -> Tensor:
        """Per-head RMS norm of the answer, then the output gate if the mixer projects one.

        Whatever ``recur`` returns arrives here; a mixer that returns more than V channels brings its own ``output``.

        Args:
            o: ``[tokens, HV, V]``, or with routes ``[rows, HV, V]``: combined first. gate: ``[tokens, HV, V]`` or None.

        Returns:
            ``[tokens, HV, V]``.
        """
        return gated_norm(o, p["norm"], gate, eps=self.config.norm_eps, activation=self.gate_activation, routes=routes)


def require_equal_heads(config: Mixer.Config, reason: str) -> None:
    """Raises a ValueError that says why, unless there are as many value heads as heads."""
    if config.num_value_heads != config.num_heads:
        raise ValueError(
            f"{reason}: num_value_heads ({config.num_value_heads}) must equal num_heads ({config.num_heads})"
        )


def rotary(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary position embedding in the halves convention (arXiv 2104.09864).

    Args:
        x: ``[B, T, H, D]``, D even. positions: ``[B, T]``.
    """
    half = x.shape[-1] // 2
    wide = widen(x)
    inverse = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = (positions[..., None].float() * inverse)[:, :, None].to(wide.dtype)
    first, second = wide[..., :half], wide[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
