"""The peers' layers, [B, T, D] -> [B, T, D] or a tuple that starts with it.

Where a peer's layer is another model than ours in some part, that part is replaced, and the function that builds it
says so.
"""

from collections.abc import Callable
from functools import partialmethod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe.mom import MoMConfig
from tests.peers.interpreted import fla, transformers

D, H, K = 32, 2, 16  # hidden size; heads and their width, where a case does not say otherwise
NORM_EPS = 1e-2  # of the output norms: a small one amplifies the rounding of answers that almost vanish
FUSED_EPS = (
    1e-5  # of a norm that flash-linear-attention fuses into the output projection, whatever its layer's norm_eps
)
Builder = Callable[[pytest.MonkeyPatch], nn.Module]


def fla_layer(name: str, **options) -> Builder:
    """Of flash-linear-attention 0.6.0, as published."""
    options = {"num_heads": H, "norm_eps": NORM_EPS} | options
    return lambda patch: getattr(fla("layers"), name)(hidden_size=D, **options)


def also(layer: nn.Module, **arguments: Callable[[Tensor], Tensor | None]) -> nn.Module:
    """The layer with more arguments in each call: what the functions make of the input."""
    forward = layer.forward
    layer.forward = lambda x: forward(x, **{name: make(x) for name, make in arguments.items()})
    return layer


class HeadNorm(nn.Module):
    """An RMS norm of each head with one weight, where the published layer has one norm over all heads."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), None

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (-1, len(self.weight)))
        return F.rms_norm(heads, self.weight.shape, self.weight, NORM_EPS).flatten(-2)


def one_norm_a_head(patch: pytest.MonkeyPatch, layer: nn.Module, width: int) -> nn.Module:
    """Replaces the norm that flash-linear-attention's layer fuses into its output projection."""
    layer.g_norm = HeadNorm(width)
    module = fla(type(layer).__module__.removeprefix("fla."))
    patch.setattr(module, "rms_norm_linear", lambda x, norm, _, weight, bias: F.linear(layer.g_norm(x), weight, bias))
    return layer


class LightningActivation(nn.Module):
    """Of the fused q, k, v: not of v, and with a scale."""

    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (H, 3 * K)).chunk(3, -1)
        return torch.cat([F.silu(q) * K**-0.5, F.silu(k), v], -1).flatten(-2)


def lightning(patch: pytest.MonkeyPatch) -> nn.Module:
    """MiniMax's layer has no scale, SiLU on the values too, and one norm over all heads; not so here."""
    minimax = transformers(patch, "minimax")
    sizes = {"hidden_size": D, "num_attention_heads": H, "head_dim": K, "num_hidden_layers": 2, "block_size": 32}
    config = minimax.MiniMaxConfig(**sizes, layer_types=["linear_attention"] * 2)
    layer = minimax.MiniMaxLightningAttention(config, 0)
    layer.act_fn, layer.norm = LightningActivation(), HeadNorm(K)
    return also(layer, position_embeddings=lambda x: None, attention_mask=lambda x: None)


def hgrn2(patch: pytest.MonkeyPatch, heads: int) -> nn.Module:
    """The lower bound is an argument there, and a logit here; several heads get a norm each. There is a scale of
    K^-1/2 before the norm, by which only its eps differs."""
    layer = fla_layer("HGRN2Attention", expand_ratio=D // heads, use_short_conv=True, layer_idx=1)(patch)
    layer.lower_bound = nn.Parameter(torch.randn(D))
    layer = layer if heads == 1 else one_norm_a_head(patch, layer, D // heads)
    return also(layer, lower_bound=lambda x: layer.lower_bound.sigmoid())


def gsa(patch: pytest.MonkeyPatch, heads: int) -> nn.Module:
    """Several heads get a norm each; the scale is an option there, and 1 by default."""
    layer = fla_layer("GatedSlotAttention", num_heads=heads, num_slots=12, scale=(D // heads) ** -0.5)(patch)
    return layer if heads == 1 else one_norm_a_head(patch, layer, D // heads)


def based(patch: pytest.MonkeyPatch) -> nn.Module:
    return fla("layers").BasedLinearAttention(D, num_heads=H, num_key_value_heads=H, mode="chunk")


def rebased(patch: pytest.MonkeyPatch) -> nn.Module:
    """By the torch reference that the layer brings along: its kernels do not take the divisor's eps."""
    layer = fla_layer("ReBasedLinearAttention", num_key_value_heads=H, eps=0.1)(patch)
    layer.forward = layer.forward_reference
    return layer


def t2r(patch: pytest.MonkeyPatch) -> nn.Module:
    """With the bias of arXiv 2103.13076, which the layer leaves out."""
    layer = fla_layer("LinearAttention", feature_map="t2r")(patch)
    for name in "qk":
        setattr(layer, f"feature_map_{name}", fla("modules.feature_map").T2RFeatureMap(K, bias=True))
    return layer


def mamba2(patch: pytest.MonkeyPatch) -> nn.Module:
    """Four heads of 16 in two groups, without the convolution's bias."""
    module = transformers(patch, "mamba2")
    sizes = {"hidden_size": D, "expand": 2, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": H}
    options = {"use_conv_bias": False, "chunk_size": 32, "layer_norm_epsilon": NORM_EPS}
    config = module.Mamba2Config(**sizes, **options, num_hidden_layers=1)
    return module.Mamba2Mixer(config, 0)


def qwen3_next(patch: pytest.MonkeyPatch) -> nn.Module:
    """Two value heads a key head."""
    module = transformers(patch, "qwen3_next")
    heads = {"linear_num_key_heads": H, "linear_num_value_heads": 2 * H}
    widths = {"linear_key_head_dim": K, "linear_value_head_dim": 8}
    config = module.Qwen3NextConfig(hidden_size=D, num_hidden_layers=1, rms_norm_eps=NORM_EPS, **heads, **widths)
    layer = module.Qwen3NextGatedDeltaNet(config, 0)
    nn.init.constant_(layer.dt_bias, -3.0)  # as published models start; the module alone starts at 1
    return layer


def rwkv6(patch: pytest.MonkeyPatch) -> nn.Module:
    """Without strong decays, under which the kernels lose digits."""
    layer = fla_layer("RWKV6Attention", expand_k=1.0, proj_low_rank_dim=4, gate_low_rank_dim=6)(patch)
    nn.init.constant_(layer.w_proj.linear.lora[2].bias, -2.0)
    return layer


def rwkv7(patch: pytest.MonkeyPatch, layer: int) -> nn.Module:
    """The first layer's values, which other layers mix into theirs, are the input here (see test_layers.Layer). The
    rule is flash-linear-attention's loop: its kernels solve triangular systems in float16."""

    def loop(r, w, k, v, a, b, scale, **options):
        recurrence = fla("ops.generalized_delta_rule.dplr.naive").dplr_recurrence
        operands = (r * scale * K**0.5, k, v, a, b, w)  # the loop has a scale of its own
        return recurrence(*(x.transpose(1, 2) for x in operands))[0].transpose(1, 2), None

    patch.setattr(fla("layers.rwkv7"), "chunk_rwkv7", loop)
    ranks = {"decay_low_rank_dim": 4, "a_low_rank_dim": 5, "gate_low_rank_dim": 6, "v_low_rank_dim": 7}
    peer = fla_layer("RWKV7Attention", head_dim=K, layer_idx=layer, num_hidden_layers=2, **ranks)(patch)
    return also(peer, v_first=lambda x: x)


def mom(patch: pytest.MonkeyPatch, config: MoMConfig) -> nn.Module:
    """In evaluation mode, as all peers here; in training its convolution crosses bucket borders. Its sort of the
    tokens by memory becomes a stable one."""
    patch.setattr(torch.Tensor, "argsort", partialmethod(torch.Tensor.argsort, stable=True))
    sizes = {"head_dim": K, "expand_v": 1, "num_memories": config.memories, "topk": config.topk}
    return fla_layer("MomAttention", shared_mem=config.shared, single_kv_proj=config.single_kv, **sizes)(patch)
