"""What a model's layers are, a letter each: the pattern of Megatron's HybridModel, with letters of our own for mixers.

``G-G-G-*E|G-G-G-*E/GE`` has two pipeline stages of eight layers and one depth of multi-token prediction behind them.
``--layer-pattern`` with ``--num-layers`` is a shorter way to say such a pattern, in which each letter stands for a
layer that mixes the sequence and its feed-forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build

SOFTMAX, LATENT, FEED_FORWARD, EXPERTS, STAGE, DEPTH = "*+-E|/"
SHORT_SOFTMAX = "N"  # of --layer-pattern
MIXER = "G"  # Megatron's letter for whatever linear mixer
RESERVED = SHORT_SOFTMAX + EXPERTS + "D"  # D: sparse attention, which Megatron has with Transformer Engine only
ANY = ("L", MIXER, "M")  # letters of the layers of a model's only mixer
MEANINGS = {
    SOFTMAX: "softmax attention",
    LATENT: "latent attention",
    FEED_FORWARD: "feed-forward",
    EXPERTS: "experts",
    STAGE: "end of a pipeline stage",
    DEPTH: "a depth of multi-token prediction",
}

# Flags that cut a model into pipeline stages where its pattern does not.
CUTS = (
    "num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank pipeline_model_parallel_layout "
    "decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers "
    "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split"
).split()


@dataclass(frozen=True)
class Pattern:
    """stages: the letters of each pipeline stage, virtual ones too, in the layers' order. ahead: the letters of one
    depth of multi-token prediction. depths: how many of these there are."""

    stages: tuple[str, ...]
    ahead: str = ""
    depths: int = 0

    @property
    def main(self) -> str:
        """The letters of the model's layers."""
        return "".join(self.stages)

    @property
    def every(self) -> str:
        """Those, and the letters of all depths."""
        return self.main + self.ahead * self.depths

    @property
    def mixing(self) -> str:
        """The letters of the layers that mix the sequence; a mixer's depth is its place among them."""
        return "".join(filter(_mixes, self.main))

    @property
    def text(self) -> str:
        """As ``--hybrid-layer-pattern`` takes it."""
        return STAGE.join(self.stages) + f"{DEPTH}{self.ahead}" * self.depths

    @property
    def megatrons(self) -> str:
        """The same in the letters that Megatron knows."""
        return "".join(letter if letter in MEANINGS else MIXER for letter in self.text)

    def place(self, layer: int) -> int:
        """How many layers that mix the sequence there are before that layer of ``main``, from 0."""
        return sum(map(_mixes, self.main[:layer]))


def _mixes(letter: str) -> bool:
    return letter not in (FEED_FORWARD, EXPERTS)


def mixer_letters(mixer: str | Mapping[str, str]) -> tuple[str, ...]:
    """The letters that ``--mixer`` gives a meaning."""
    return ANY if isinstance(mixer, str) else tuple(mixer)


def make_pattern(args, linear: Iterable[str]) -> Pattern:
    """The pattern that the arguments describe: ``--hybrid-layer-pattern``, or ``--layer-pattern`` with
    ``--num-layers``, ``--moe-layer-freq`` and ``--mtp-num-layers``; cut into stages where it has no ``|`` of its own.

    Args:
        linear: the letters of linear mixers.

    Raises:
        ValueError: letters, stages or depths that do not fit, with the rule and the values.
    """
    if args.hybrid_layer_pattern is None:
        units = _units(args, linear)
        depths = args.mtp_num_layers or 0
        return Pattern(_cut(args, units), units[-1] if depths else "", depths)
    name, text = "hybrid_layer_pattern", args.layers if getattr(args, "layers", None) else args.hybrid_layer_pattern
    main, *ahead = text.split(DEPTH)
    if args.mtp_num_layers and args.mtp_num_layers != len(ahead):
        raise ValueError(
            f"{name} {text!r} has {len(ahead)} depths of multi-token prediction, but mtp_num_layers is "
            f"{args.mtp_num_layers}: write {DEPTH} and its letters for each, and leave mtp_num_layers out"
        )
    if len(set(ahead)) > 1:
        raise ValueError(f"{name} {text!r}: all depths of multi-token prediction are alike, but these are {ahead}")
    check_letters(name, main.replace(STAGE, "") + "".join(ahead), linear, text)
    if not main.replace(STAGE, ""):
        raise ValueError(f"{name} {text!r} has no layers of the model itself before {DEPTH}")
    if ahead and (not ahead[0] or STAGE in ahead[0]):
        raise ValueError(f"{name} {text!r}: a depth of multi-token prediction is letters of layers, not {ahead[0]!r}")
    stages = tuple(main.split(STAGE))
    if args.pipeline_model_parallel_size == 1:
        stages = (main.replace(STAGE, ""),)
    elif len(stages) == 1:
        stages = _cut(args, list(main))
    elif given := [flag for flag in CUTS if getattr(args, flag)]:
        raise ValueError(f"{name} {text!r} says by {STAGE} where stages end: leave out {', '.join(given)}")
    elif len(stages) % args.pipeline_model_parallel_size:
        raise ValueError(
            f"{name} {text!r} has {len(stages)} stages, which must be a multiple of pipeline_model_parallel_size "
            f"({args.pipeline_model_parallel_size})"
        )
    return Pattern(stages, *((ahead[0], len(ahead)) if ahead else ()))


def check_letters(name: str, letters: str, linear: Iterable[str], text: str, meanings: Mapping = MEANINGS) -> None:
    """Raises a ValueError for no letters, or letters that are not among ``linear`` and ``meanings``."""
    known = dict.fromkeys(linear, "linear mixer") | meanings
    allowed = ", ".join(f"{letter} ({meaning})" for letter, meaning in known.items())
    if not letters:
        raise ValueError(f"{name} {text!r} is empty; it must have a letter a layer: {allowed}")
    unknown = sorted(set(letters) - set(known))
    if unknown:
        raise ValueError(f"{name} {text!r} has unknown letters {unknown}; allowed: {allowed}")


# --- --layer-pattern ------------------------------------------------------------------------------------------------


def expand_pattern(pattern: str, num_layers: int, linear: Iterable[str] = "L") -> str:
    """``--layer-pattern`` repeated to the model's depth.

    Args:
        linear: the letters of linear layers.

    Raises:
        ValueError: no letter or an unknown one, or a depth that the pattern's length does not divide.
    """
    check_letters("layer_pattern", pattern, linear, pattern, {SHORT_SOFTMAX: "softmax attention"})
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, but is {num_layers}")
    if num_layers % len(pattern):
        raise ValueError(
            f"num_layers ({num_layers}) must be a multiple of the length of layer_pattern {pattern!r} ({len(pattern)})"
        )
    return pattern * (num_layers // len(pattern))


def moe_layers(freq: int | list[int], num_experts: int | None, depth: int) -> list[bool]:
    """Which of ``depth`` layers have a MoE feed-forward: Megatron's ``--moe-layer-freq``, one entry a layer.

    Raises:
        ValueError: a list that is not one 0 or 1 for every layer.
    """
    if num_experts is None:
        return [False] * depth
    if isinstance(freq, int):
        return [layer % freq == 0 for layer in range(depth)]
    if len(freq) != depth or set(freq) - {0, 1}:
        raise ValueError(f"moe_layer_freq must hold one 0 or 1 for each of the {depth} layers, but is {freq}")
    return [bool(entry) for entry in freq]


def _units(args, linear: Iterable[str]) -> list[str]:
    """Two letters for each of the layers of ``--layer-pattern``."""
    layers = expand_pattern(args.layer_pattern, args.num_layers, linear)
    moe = moe_layers(args.moe_layer_freq, args.num_experts, args.num_layers)
    softmax = LATENT if args.multi_latent_attention else SOFTMAX
    return [
        (softmax if letter == SHORT_SOFTMAX else letter) + (EXPERTS if is_moe else FEED_FORWARD)
        for letter, is_moe in zip(layers, moe)
    ]


# --- stages ---------------------------------------------------------------------------------------------------------


def _cut(args, units: list[str]) -> tuple[str, ...]:
    """The pipeline's stages, as Megatron cuts as many layers of a GPTModel.

    Raises:
        ValueError: flags that do not cut them evenly.
    """
    size, chunks, layout = args.pipeline_model_parallel_size, args.num_virtual_stages_per_pipeline_rank, None
    given = [flag for flag in CUTS[:3] if getattr(args, flag)]
    if len(given) > 1:
        raise ValueError(f"no more than one of {', '.join(given)} can cut the model into stages")
    if size == 1 and given:
        raise ValueError(f"{given[0]} needs pipeline_model_parallel_size above 1")
    if size == 1:
        return ("".join(units),)
    try:
        if args.pipeline_model_parallel_layout is not None:
            layout = PipelineParallelLayerLayout(args.pipeline_model_parallel_layout, size)
            chunks = layout.virtual_pipeline_model_parallel_size
        elif args.num_layers_per_virtual_pipeline_stage:
            extra = args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
            chunks, rest = divmod(len(units) + extra, size * args.num_layers_per_virtual_pipeline_stage)
            if rest:
                raise ValueError(
                    f"{len(units) + extra} layers (embedding and loss too, where the split counts them) cannot be cut "
                    f"for {size} ranks into stages of num_layers_per_virtual_pipeline_stage "
                    f"({args.num_layers_per_virtual_pipeline_stage})"
                )
        asked = SimpleNamespace(
            num_layers=len(units),
            pipeline_model_parallel_size=size,
            virtual_pipeline_model_parallel_size=chunks if chunks and chunks > 1 else None,
            pipeline_model_parallel_layout=None,
            num_layers_in_first_pipeline_stage=args.decoder_first_pipeline_num_layers,
            num_layers_in_last_pipeline_stage=args.decoder_last_pipeline_num_layers,
            account_for_embedding_in_pipeline_split=args.account_for_embedding_in_pipeline_split,
            account_for_loss_in_pipeline_split=args.account_for_loss_in_pipeline_split,
        )
        counts = [
            layout.layout[rank][chunk].count(LayerType.decoder)
            if layout
            else get_num_layers_to_build(asked, chunk if asked.virtual_pipeline_model_parallel_size else None, rank)
            for chunk in range(chunks or 1)
            for rank in range(size)
        ]
    except AssertionError as error:
        raise ValueError(f"{len(units)} layers on {size} pipeline stages: {error}") from error
    if sum(counts) != len(units):
        raise ValueError(f"{len(units)} layers cannot be cut into pipeline stages of {counts} layers")
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return tuple("".join(units[start : start + count]) for start, count in zip(starts, counts))


def translate(args, pattern: Pattern) -> None:
    """Leave in Megatron's arguments what its HybridModel is built from; ``args.layers`` keeps our letters.

    What counts the layers of ``--layer-pattern`` counts two letters for each of them from here on.
    """
    if args.hybrid_layer_pattern is None:
        for flag, other in (("no_rope_freq", 1), ("window_attn_skip_freq", 0)):
            setattr(args, flag, _twice(flag, getattr(args, flag), other, args.num_layers))
        if args.recompute_num_layers is not None and not pattern.depths:  # Megatron wants 1 with depths
            args.recompute_num_layers *= 2
        args.num_layers_at_start_in_bf16 *= 2
        args.num_layers_at_end_in_bf16 *= 2
    args.layers, args.hybrid_layer_pattern = pattern.text, pattern.megatrons
    args.num_layers, args.moe_layer_freq = len(pattern.main), 1
    args.mtp_num_layers = pattern.depths or None
    for flag in CUTS:
        setattr(args, flag, False if flag.startswith("account") else None)


def _twice(flag: str, freq: int | list[int] | None, other: int, layers: int) -> list[int] | None:
    """What a flag says of each layer, for its two letters. An integer n: every n-th layer is the ``other`` kind."""
    if not freq:
        return freq
    each = freq if isinstance(freq, list) else [other if i % freq == 0 else 1 - other for i in range(1, layers + 1)]
    if len(each) != layers:
        raise ValueError(f"{flag} must hold one entry for each of the {layers} layers, but is {freq}")
    return [entry for entry in each for _ in range(2)]
