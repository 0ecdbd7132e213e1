"""Which independent layer each mixer is compared with, and with which options."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from linear_moe.mom import MoMConfig
from tests.peers import layers, names
from tests.peers.interpreted import fla
from tests.peers.layers import FUSED_EPS, NORM_EPS, Builder, D, H, K, fla_layer
from tests.peers.names import DELTA, GATE, GATED_DELTA, GSA, KDA, MAPS, QKV, Names, low_rank


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison.

    Args:
        mixer: its registered name. peer: makes the other layer. layer, layers: ours.
        options: of our mixer, beside norm_eps = NORM_EPS.
        shape: B, T: more than a chunk of 64, and one sequence where the interpreter is slow.
        mom: Mixture-of-Memories over the mixer. loss: what the peer's output adds to the loss.
    """

    mixer: str
    peer: Builder
    names: Names
    options: dict = field(default_factory=dict)
    layer: int = 0
    layers: int = 1
    shape: tuple[int, int] = (2, 70)
    mom: MoMConfig | None = None
    loss: Callable[[tuple], Tensor] | None = None


def linear_attention(feature_map: str, maps: Names = MAPS, peer: Builder | None = None, **options) -> Case:
    theirs = {"feature_map": feature_map, "do_feature_map_norm": options.get("normalize", False)}
    return Case(
        mixer="linear_attention",
        peer=peer or fla_layer("LinearAttention", **theirs),
        names={**QKV, "norm": "norm.weight", **maps},
        options={"feature_map": feature_map, **options},
    )


def hgrn2(heads: int) -> Case:
    eps = FUSED_EPS if heads == 1 else NORM_EPS
    return Case(
        mixer="hgrn2",
        peer=partial(layers.hgrn2, heads=heads),
        names=names.hgrn2(),
        options={"num_heads": heads, "conv_size": 4, "norm_eps": D // heads * eps},
        layer=1,
        layers=2,
        shape=(1, 70),
    )


def gsa(heads: int) -> Case:
    options = {"num_heads": heads, "num_slots": 12} | ({"norm_eps": FUSED_EPS} if heads == 1 else {})
    return Case(mixer="gsa", peer=partial(layers.gsa, heads=heads), names=GSA, options=options, shape=(1, 70))


def rwkv7(layer: int) -> Case:
    options = {"decay_rank": 4, "iclr_rank": 5, "gate_rank": 6, "value_rank": 7, "value_residual": True}
    peer = partial(layers.rwkv7, layer=layer)
    return Case(mixer="rwkv7", peer=peer, names=names.rwkv7(layer), options=options, layer=layer, layers=2)


def mom(**options) -> Case:
    """Over Gated DeltaNet, flash-linear-attention's only one; the balance loss weighs enough to be seen."""
    config = MoMConfig(memories=3, topk=2, balance_coeff=1000.0, **options)

    def balance(outputs: tuple) -> Tensor:
        """There it is k times ours."""
        loss = fla("models.mom.modeling_mom").load_balancing_loss_func((outputs[3],), config.memories, config.topk)
        return config.balance_coeff / config.topk * loss

    return Case(
        mixer="gated_deltanet",
        peer=partial(layers.mom, config=config),
        names=names.mom(config),
        shape=(1 + config.shared, 40),
        mom=config,
        loss=balance,
    )


CASES = {
    "linear_attention-elu": linear_attention("elu", {}),
    "linear_attention-elu-normalized": linear_attention("elu", {}, normalize=True),
    "linear_attention-relu": linear_attention("relu", {}),
    "linear_attention-identity": linear_attention("identity", {}),
    "linear_attention-dpfp": linear_attention("dpfp", {}, nu=4),
    "linear_attention-hedgehog": linear_attention("hedgehog"),
    "linear_attention-t2r": linear_attention("t2r", peer=layers.t2r),
    "retention": Case(
        mixer="retention",
        peer=fla_layer("MultiScaleRetention", expand_v=2.0),
        names={**QKV, **GATE},
        options={"value_head_dim": 2 * K},
    ),
    "lightning": Case(mixer="lightning", peer=layers.lightning, names=names.lightning(), layers=2),
    "gla": Case(
        mixer="gla",
        peer=fla_layer("GatedLinearAttention", expand_k=0.5),
        names={**QKV, **GATE, **low_rank("a", "gk_proj.0", "gk_proj.1", bias="g_bias")},
        options={"head_dim": K // 2},
    ),
    "hgrn2": hgrn2(heads=H),
    "hgrn2-one-head": hgrn2(heads=1),
    "based": Case(
        mixer="based",
        peer=layers.based,
        names=QKV,
        options={"divisor_eps": 1e-10},
    ),
    "rebased": Case(
        mixer="rebased",
        peer=layers.rebased,
        names={**QKV, "gamma": "feature_map.gamma", "beta": "feature_map.beta"},
        options={"divisor_eps": 0.1},
    ),
    "gsa": gsa(heads=H),
    "gsa-one-head": gsa(heads=1),
    "mamba2": Case(
        mixer="mamba2",
        peer=layers.mamba2,
        names=names.mamba2(),
        options={"num_value_heads": 4, "head_dim": 8},
    ),
    "deltanet": Case(
        mixer="deltanet",
        peer=fla_layer("DeltaNet", mode="fused_recurrent"),  # the chunked kernel refuses float32
        names=DELTA,
        shape=(1, 70),
    ),
    "gated_deltanet": Case(
        mixer="gated_deltanet",
        peer=fla_layer("GatedDeltaNet", head_dim=K, expand_v=0.5),
        names=GATED_DELTA,
        options={"value_head_dim": K // 2},
        shape=(1, 70),
    ),
    "gated_deltanet-grouped": Case(
        mixer="gated_deltanet",
        peer=fla_layer("GatedDeltaNet", head_dim=K, expand_v=1.0, num_v_heads=2 * H),
        names=GATED_DELTA,
        options={"num_value_heads": 2 * H},
        shape=(1, 70),
    ),
    "gated_deltanet-qwen3_next": Case(
        mixer="gated_deltanet",
        peer=layers.qwen3_next,
        names=names.qwen3_next(),
        options={"num_value_heads": 2 * H, "value_head_dim": 8},
    ),
    "kda": Case(mixer="kda", peer=fla_layer("KimiDeltaAttention", head_dim=K), names=KDA, shape=(1, 70)),
    "rwkv6": Case(
        mixer="rwkv6", peer=layers.rwkv6, names=names.rwkv6(), options={"mix_rank": 4, "decay_rank": 6}, shape=(1, 70)
    ),
    "rwkv7": rwkv7(layer=1),
    "rwkv7-first-layer": rwkv7(layer=0),
    "mom": mom(shared=True),
    "mom-not-shared": mom(shared=False),
    "mom-single-kv": mom(shared=True, single_kv=True),
}

# Registered mixers whose layer is compared with none, and why.
WITHOUT_PEER = {
    "ttt": "no package has its layer; test_ttt_rule compares the rule with flash-linear-attention's reference",
    "titans": "flash-linear-attention's reference has a layer norm in its inner loss, and here the loss is linear",
}
