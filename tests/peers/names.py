"""How the peers name our parameters.

Our parameter is the peer's of that name, or a function of all of the peer's by name, which cuts or stacks them. It
serves values and gradients alike.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from linear_moe.mom import MoMConfig
from tests.peers.layers import H, K

Part = Callable[[Mapping[str, Tensor]], Tensor]
Names = dict[str, str | Part]


def cut(name: str, *sizes: int) -> list[Part]:
    """The parts of those sizes of a fused parameter, along its first dimension."""
    return [lambda p, i=i: p[name].split(sizes)[i] for i in range(len(sizes))]


def cut_heads(name: str, *sizes: int) -> list[Part]:
    """Likewise where each head has its parts side by side."""
    return [lambda p, i=i: p[name].unflatten(0, (-1, sum(sizes))).split(sizes, 1)[i] for i in range(len(sizes))]


def low_rank(name: str, down: str, up: str, bias: str | None = None) -> Names:
    """bias: our name of the second map's bias."""
    return {f"{name}.down": f"{down}.weight", f"{name}.up": f"{up}.weight"} | ({bias: f"{up}.bias"} if bias else {})


QKV = {**{name: f"{name}_proj.weight" for name in "qkv"}, "out": "o_proj.weight"}
CONV = {f"conv_{name}": f"{name}_conv1d.weight" for name in "qkv"}
GATE = {"gate": "g_proj.weight", "norm": "g_norm_swish_gate.weight"}
MAPS = {f"{x}_map": f"feature_map_{x}.layer.weight" for x in "qk"}
MAPS |= {f"{x}_map_bias": f"feature_map_{x}.layer.bias" for x in "qk"}
DECAY = {"A_log": "A_log", "dt_bias": "dt_bias"}
DELTA = {**QKV, **CONV, "beta": "b_proj.weight", "norm": "o_norm.weight"}
GATED_DELTA = {**DELTA, **DECAY, "a": "a_proj.weight", "gate": "g_proj.weight"}
KDA = {
    **DELTA,
    **DECAY,
    **low_rank("a", "f_proj.0", "f_proj.1"),
    **low_rank("gate", "g_proj.0", "g_proj.1", "gate_bias"),
}
GSA = {**QKV, "slots": "f_proj.weight", "norm": "g_norm.weight"}


def lightning() -> Names:
    q, k, v = cut_heads("qkv_proj.weight", K, K, K)
    return {"q": q, "k": k, "v": v, "gate": "output_gate.weight", "norm": "norm.weight", "out": "out_proj.weight"}


def hgrn2() -> Names:
    names = {"q": "q_proj.weight", "a": "f_proj.weight", "v": "i_proj.weight", "lower_bound": "lower_bound"}
    names |= {f"conv_{ours}": f"{theirs}_conv1d.weight" for ours, theirs in zip("qav", "qfi")}
    return {**names, "norm": "g_norm.weight", "out": "o_proj.weight"}


def mamba2() -> Names:
    gate, v, k, q, dt = cut("in_proj.weight", 64, 64, H * 8, H * 8, 4)
    conv_v, conv_k, conv_q = cut("conv1d.weight", 64, H * 8, H * 8)
    names = {"q": q, "k": k, "v": v, "dt": dt, "gate": gate, "conv_q": conv_q, "conv_k": conv_k, "conv_v": conv_v}
    return {**names, **DECAY, "D": "D", "norm": "norm.weight", "out": "out_proj.weight"}


def qwen3_next() -> Names:
    q, k, v, gate = cut_heads("in_proj_qkvz.weight", K, K, 2 * 8, 2 * 8)
    beta, a = cut_heads("in_proj_ba.weight", 2, 2)
    conv_q, conv_k, conv_v = cut("conv1d.weight", H * K, H * K, 2 * H * 8)
    names = {"q": q, "k": k, "v": v, "gate": gate, "beta": beta, "a": a}
    names |= {"conv_q": conv_q, "conv_k": conv_k, "conv_v": conv_v}
    return {**names, **DECAY, "norm": "norm.weight", "out": "out_proj.weight"}


def rwkv6() -> Names:
    names = {"mix": "x_proj.0.mu", "u": "bonus", "norm_weight": "g_norm.weight", "norm_bias": "g_norm.bias"}
    names |= low_rank("w", "w_proj.linear.lora.0", "w_proj.linear.lora.2", bias="w0")
    names |= {ours: f"{theirs}_proj.linear.weight" for ours, theirs in zip(("q", "k", "v", "gate"), "rkvg")}
    for i, name in enumerate(("q", "w", "k", "v", "gate")):
        names[f"mix_{name}"] = lambda p, i=i: p["x_bias"][i]
        names[f"mix_down_{name}"] = lambda p, i=i: p["x_proj.0.linear.weight"].chunk(5)[i]
        names[f"mix_up_{name}"] = lambda p, i=i: p["x_proj.2.weight"].chunk(5, 1)[i]
    return {**names, "out": "o_proj.weight"}


def rwkv7(layer: int) -> Names:
    names = {**QKV, "q": "r_proj.weight", "xi": "k_k", "alpha": "k_a", "bonus": "r_k"}
    names |= {"norm_weight": "g_norm.weight", "norm_bias": "g_norm.bias"}
    names |= {f"mix_{ours}": f"x_{theirs}" for ours, theirs in zip(("q", "w", "k", "v", "iclr", "gate"), "rwkvag")}
    names |= low_rank("w", "w_lora.lora.0", "w_lora.lora.2", bias="w0")
    names |= low_rank("iclr", "a_lora.lora.0", "a_lora.lora.2", bias="iclr0")
    names |= low_rank("gate", "g_lora.lora.0", "g_lora.lora.2")
    if layer:
        names |= low_rank("nu", "v_lora.lora.0", "v_lora.lora.2", bias="nu0")
    return names


def mom(config: MoMConfig) -> Names:
    """Write projections are one parameter here, and one for each memory there."""

    def stack(name: str) -> str | Part:
        if config.single_kv:
            return f"shared_{name}.weight"
        names = [f"{name}_proj.{m}.weight" for m in range(config.memories)]
        names += [f"shared_{name}.weight"] * config.shared
        return lambda p: torch.stack([p[name] for name in names])

    writes = {ours: stack(theirs) for ours, theirs in zip(("k", "v", "beta", "a"), "kvba")}
    return {**GATED_DELTA, **writes, "router": "gate.weight"}
