"""From a layer pattern to Megatron layer specs: N softmax attention, L or other letters a linear mixer, each with its
feed-forward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from linear_moe.mcore.attention import LatentAttention, TorchAttention
from linear_moe.mcore.cached_attention import CachedLatentAttention, CachedSelfAttention
from linear_moe.mcore.mixer_layer import MixerLayer, MixerLayerSubmodules, MixerTransformerLayer
from linear_moe.mcore.norm import Norm
from linear_moe.mom import MoMConfig
from linear_moe.ssm import Mixer, mixer_class

SOFTMAX = "N"


@dataclass(frozen=True)
class MixerOptions:
    """A mixer and its options."""

    mixer: type[Mixer]
    config: Mixer.Config


@dataclass(frozen=True)
class LayerOptions:
    """What our arguments say about a model's layers.

    Args:
        pattern: one letter a layer that mixes the sequence; a mixer's depth is its place in it.
        mixers: letter -> the mixer of its layers; all but N.
        mom: Mixture-of-Memories in the linear layers, or None. recompute: see MixerCore. init_gain: see MixerLayer.

    Raises:
        ValueError: an init_gain that is not positive.
    """

    pattern: str
    mixers: Mapping[str, MixerOptions]
    mom: MoMConfig | None
    recompute: bool = False
    init_gain: float | None = None

    def __post_init__(self) -> None:
        if self.init_gain is not None and not self.init_gain > 0:
            raise ValueError(f"mixer_init_gain must be positive, but is {self.init_gain}")

    @property
    def linear(self) -> dict[str, MixerOptions]:
        """Those of the mixers that the pattern uses."""
        return {letter: options for letter, options in self.mixers.items() if letter in self.pattern}


def mixer_options(args, **defaults: object) -> dict[str, MixerOptions]:
    """Letter -> mixer, from ``args.mixer`` and ``args.mixer_args``: one mixer, of the L layers, or one for each letter.

    Args:
        defaults: options that hold where the arguments give none.

    Raises:
        ValueError: letters that cannot be, and what ``mixer_class`` and ``Mixer.make_config`` refuse.
    """
    several = isinstance(args.mixer, Mapping)
    names = args.mixer if several else {"L": args.mixer}
    given = args.mixer_args if several else {"L": args.mixer_args}
    wrong = [letter for letter in names if len(letter) != 1 or not letter.isupper() or letter == SOFTMAX]
    if wrong or not names:
        raise ValueError(f"mixer must map capital letters other than {SOFTMAX} to mixers, but has {wrong or names}")
    unnamed = [name for name in names.values() if not isinstance(name, str)]
    if unnamed:
        raise ValueError(f"mixer must map letters to names of mixers, but has {unnamed}")
    for letter, options in given.items():
        if letter not in names or not isinstance(options, Mapping):
            raise ValueError(
                f"with several mixers, mixer_args must map their letters ({', '.join(names)}) to options, "
                f"but has {letter!r}: {options!r}"
            )
    found = {}
    for letter, name in names.items():
        mixer = mixer_class(name)
        config = mixer.make_config(args.hidden_size, args.num_attention_heads, defaults | given.get(letter, {}))
        found[letter] = MixerOptions(mixer, config)
    return found


def expand_pattern(pattern: str, num_layers: int, linear: Iterable[str] = "L") -> str:
    """The pattern repeated to the model's depth.

    Args:
        linear: the letters of linear layers.

    Raises:
        ValueError: no letter or an unknown one, or a depth that the pattern's length does not divide.
    """
    letters = dict.fromkeys(linear, "linear mixer") | {SOFTMAX: "softmax attention"}
    allowed = ", ".join(f"{letter} ({meaning})" for letter, meaning in letters.items())
    if not pattern:
        raise ValueError(f"layer_pattern is empty; it must have a letter a layer: {allowed}")
    unknown = sorted(set(pattern) - set(letters))
    if unknown:
        raise ValueError(f"layer_pattern {pattern!r} has unknown letters {unknown}; allowed: {allowed}")
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


def layer_specs(config, options: LayerOptions, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Specs of the layers of this pipeline stage (and virtual stage).

    Args:
        config: Megatron's TransformerConfig, or anything that has its attributes. options: see LayerOptions.
    """
    use_te = config.transformer_impl == "transformer_engine"
    if not use_te and config.transformer_impl != "local":
        raise ValueError(f"transformer_impl must be local or transformer_engine, but is {config.transformer_impl}")
    submodules = _te_submodules if use_te else _local_submodules
    moe = moe_layers(config.moe_layer_freq, config.num_moe_experts, config.num_layers)
    first_values: dict = {}
    every = []
    for depth, letter in enumerate(options.pattern):
        layer = submodules(config, moe[depth])
        if letter == SOFTMAX:
            every.append(ModuleSpec(module=TransformerLayer, submodules=layer))
        else:
            layer = _with_mixer(layer, options, depth, use_te, first_values)
            every.append(ModuleSpec(module=MixerTransformerLayer, submodules=layer))
    if config.pipeline_model_parallel_layout is not None:
        layout = config.pipeline_model_parallel_layout
        own = [every[i] for i in layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage)]
    else:
        offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
        own = every[offset : offset + get_num_layers_to_build(config, vp_stage=vp_stage)]
    return TransformerBlockSubmodules(layer_specs=own, layer_norm=_te_norm() if use_te else Norm)


def _with_mixer(
    softmax: TransformerLayerSubmodules, options: LayerOptions, depth: int, use_te: bool, first_values: dict
) -> TransformerLayerSubmodules:
    """A softmax layer with the mixer of that depth in its attention's place.

    The input norm is a module of its own also with Transformer Engine: router, read and write projections share it.
    """
    linear_proj = softmax.self_attention.submodules.linear_proj if use_te else RowParallelLinear
    chosen = options.mixers[options.pattern[depth]]
    mixer = ModuleSpec(
        module=MixerLayer,
        params={
            "mixer": chosen.mixer,
            "mixer_config": chosen.config,
            "depth": depth,
            "num_mixers": len(options.pattern),
            "mom": options.mom,
            "first_values": first_values,
            "recompute": options.recompute,
            "init_gain": options.init_gain,
        },
        submodules=MixerLayerSubmodules(linear_proj=linear_proj),
    )
    keys = {name: key for name, key in softmax.sharded_state_dict_keys_map.items() if name != "input_layernorm."}
    return replace(
        softmax,
        self_attention=mixer,
        input_layernorm=_te_norm() if use_te else Norm,
        sharded_state_dict_keys_map=keys,
    )


def _local_submodules(config, moe: bool) -> TransformerLayerSubmodules:
    """mcore's local layer, with a norm that allows sequence parallelism and torch's attention."""
    layer = get_gpt_layer_local_submodules(
        num_experts=config.num_moe_experts if moe else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )
    layer.self_attention.module = LatentAttention if config.multi_latent_attention else CachedSelfAttention
    attention = layer.self_attention.submodules
    attention.core_attention = TorchAttention
    if config.qk_layernorm and not config.qk_l2_norm:
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
            if getattr(attention, name, IdentityOp) is not IdentityOp:
                setattr(attention, name, Norm)
    # Transformer Engine fuses a norm into the projection behind it, and checkpoints name it after that projection.
    # The same names here make local and Transformer Engine checkpoints one format.
    if config.multi_latent_attention:
        keys = {f"self_attention.{x}_layernorm.": f"self_attention.linear_{x}_up_proj.layer_norm_" for x in ("q", "kv")}
    else:
        keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not moe:
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return replace(layer, input_layernorm=Norm, pre_mlp_layernorm=Norm, sharded_state_dict_keys_map=keys)


def _te_submodules(config, moe: bool) -> TransformerLayerSubmodules:
    layer = get_gpt_layer_with_transformer_engine_submodules(
        num_experts=config.num_moe_experts if moe else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        qk_l2_norm=config.qk_l2_norm,
        use_te_activation_func=config.use_te_activation_func,
    )
    layer.self_attention.module = CachedLatentAttention if config.multi_latent_attention else CachedSelfAttention
    return layer


def _te_norm():
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
