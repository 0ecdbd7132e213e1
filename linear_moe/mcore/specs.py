"""From a pattern to the specs of Megatron's HybridModel: a layer for each kind of letter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from linear_moe.mcore.attention import LatentAttention, TorchAttention
from linear_moe.mcore.cached_attention import CachedLatentAttention, CachedSelfAttention
from linear_moe.mcore.mixer_layer import MixerLayer, MixerLayerSubmodules, MixerTransformerLayer
from linear_moe.mcore.norm import Norm
from linear_moe.mcore.pattern import RESERVED, Pattern, make_pattern, mixer_letters
from linear_moe.mom import MoMConfig
from linear_moe.ssm import Mixer, mixer_class


@dataclass(frozen=True)
class MixerOptions:
    """A mixer and its options."""

    mixer: type[Mixer]
    config: Mixer.Config


@dataclass(frozen=True)
class LayerOptions:
    """What our arguments say about a model's layers.

    Args:
        pattern: the letters of all layers.
        mixers: letter -> the mixer of its layers.
        mom: Mixture-of-Memories in the linear layers, or None. recompute: see MixerCore. init_gain: see MixerLayer.

    Raises:
        ValueError: an init_gain that is not positive.
    """

    pattern: Pattern
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
        return {letter: options for letter, options in self.mixers.items() if letter in self.pattern.every}


def mixer_options(args, **defaults: object) -> dict[str, MixerOptions]:
    """Letter -> mixer, from ``args.mixer`` and ``args.mixer_args``: one mixer, of the L, G or M layers, or one for each
    letter.

    Args:
        defaults: options that hold where the arguments give none.

    Raises:
        ValueError: letters that cannot be, and what ``mixer_class`` and ``Mixer.make_config`` refuse.
    """
    several = isinstance(args.mixer, Mapping)
    letters = mixer_letters(args.mixer)
    names = args.mixer if several else dict.fromkeys(letters, args.mixer)
    given = args.mixer_args if several else dict.fromkeys(letters, args.mixer_args)
    wrong = [letter for letter in names if len(letter) != 1 or not letter.isupper() or letter in RESERVED]
    if wrong or not names:
        reserved = ", ".join(RESERVED)
        raise ValueError(f"mixer must map capital letters other than {reserved} to mixers, but has {wrong or names}")
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


def layer_options(args) -> LayerOptions:
    """What the arguments say about the layers.

    Args:
        args: parsed arguments, Megatron's and ours.

    Raises:
        ValueError: whatever does not fit together, with the rule and the values.
    """
    mixers = mixer_options(args, norm_eps=args.layernorm_epsilon)
    pattern = make_pattern(args, mixers)
    mom = None
    if args.mom_memories < 0:
        raise ValueError(f"mom_memories must be 0 (no MoM) or the number of memories, but is {args.mom_memories}")
    if args.mom_memories:
        mom = MoMConfig(
            memories=args.mom_memories,
            topk=args.mom_topk,
            shared=args.mom_shared_memory,
            single_kv=args.mom_single_kv,
            balance_coeff=args.mom_balance_coeff,
            z_loss_coeff=args.mom_z_loss_coeff,
        )
    return LayerOptions(pattern, mixers, mom, args.mixer_recompute, args.mixer_init_gain)


def hybrid_spec(config, options: LayerOptions) -> ModuleSpec:
    """What Megatron's HybridModel is built from.

    Args:
        config: Megatron's TransformerConfig, or anything that has its attributes. options: see LayerOptions.
    """
    use_te = config.transformer_impl == "transformer_engine"
    if not use_te and config.transformer_impl != "local":
        raise ValueError(f"transformer_impl must be local or transformer_engine, but is {config.transformer_impl}")
    submodules = _te_submodules if use_te else _local_submodules
    dense = submodules(config, False)
    softmax = ModuleSpec(module=TransformerLayer, submodules=_attention(dense))
    experts = ModuleSpec(module=MoETransformerLayer, submodules=_feed_forward(submodules(config, True)))
    return ModuleSpec(
        module=HybridStack if use_te else LocalStack,
        submodules=HybridStackSubmodules(
            gdn_layer=ModuleSpec(
                module=MixerTransformerLayer,
                params={"options": options, "first_values": {}},
                submodules=_mixer(dense, use_te),
            ),
            attention_layer=softmax,
            mla_layer=softmax,
            mlp_layer=ModuleSpec(module=TransformerLayer, submodules=_feed_forward(dense)),
            moe_layer=experts if config.num_moe_experts else IdentityOp,
            mtp_block_spec=_mtp(use_te),
        ),
    )


class LocalStack(HybridStack):
    """Megatron's, whose last norm is Transformer Engine's, with the local one."""

    def __init__(self, config, *args, post_layer_norm: bool = True, **kwargs):
        super().__init__(config, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = Norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


def _attention(layer: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    """Of a whole layer, what mixes the sequence."""
    return _half(layer, ("input_layernorm", "self_attention", "self_attn_bda"))


def _feed_forward(layer: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    """Of a whole layer, what does not."""
    return _half(layer, ("pre_mlp_layernorm", "mlp", "mlp_bda"))


def _half(layer: TransformerLayerSubmodules, names: tuple[str, ...]) -> TransformerLayerSubmodules:
    keys = {old: new for old, new in layer.sharded_state_dict_keys_map.items() if old.startswith(names)}
    return TransformerLayerSubmodules(**{n: getattr(layer, n) for n in names}, sharded_state_dict_keys_map=keys)


def _mixer(softmax: TransformerLayerSubmodules, use_te: bool) -> TransformerLayerSubmodules:
    """A mixer in the attention's place; `MixerTransformerLayer` knows which.

    The input norm is a module of its own also with Transformer Engine: router, read and write projections share it.
    """
    linear_proj = softmax.self_attention.submodules.linear_proj if use_te else RowParallelLinear
    return TransformerLayerSubmodules(
        input_layernorm=_te_norm() if use_te else Norm,
        self_attention=ModuleSpec(module=MixerLayer, submodules=MixerLayerSubmodules(linear_proj=linear_proj)),
        self_attn_bda=softmax.self_attn_bda,
    )


def _mtp(use_te: bool) -> ModuleSpec:
    """Multi-token prediction: a depth's norms and projection; its layers are the stack's."""
    norm, linear = (_te_norm(), _te_column()) if use_te else (Norm, ColumnParallelLinear)
    layer = MultiTokenPredictionLayerSubmodules(
        enorm=norm, hnorm=norm, eh_proj=linear, mtp_model_layer=None, layer_norm=norm
    )
    depth = ModuleSpec(module=MultiTokenPredictionLayer, submodules=layer)
    return ModuleSpec(
        module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[depth])
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


def _te_column():
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    return TEColumnParallelLinear
