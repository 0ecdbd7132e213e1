"""A layer's whole tensors by name, the router and the output projection among them."""

import pytest
import torch

import linear_moe

MODEL = {"num_layers": 1, "layer_pattern": "L"}


def layer(seed=1, **options):
    return linear_moe.build_model("tiny", seed=seed, **MODEL, **options).decoder.layers[0].self_attention


@pytest.mark.parametrize("single_kv", [False, True], ids=["own-kv", "single-kv"])
def test_layer_gives_and_takes_all_of_itself(single_kv):
    options = {"mixer": "kda", "mom_memories": 2, "mom_single_kv": single_kv, "disable_bias_linear": False}
    one, other = layer(1, **options), layer(2, **options)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.normal_()
    state = one.full_state()
    memories = [] if single_kv else [3]
    expected = {"q": [64, 64], "k": [*memories, 64, 64], "a.down": [*memories, 16, 64], "a.up": [*memories, 64, 16]}
    expected |= {"A_log": [4], "dt_bias": [4, 16], "router": [2, 64], "out": [64, 64], "out.bias": [64]}
    assert {name: [*state[name].shape] for name in expected} == expected
    assert state["router"].equal(one.router.weight) and state["out"].equal(one.linear_proj.weight)
    assert state["dt_bias"].flatten().equal(one.core.heads.dt_bias)
    other.load_full_state(state)
    assert all(a.equal(b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"missing tensors: router \[2, 64\]; out \[64, 64\]"):
        other.load_full_state({name: tensor for name, tensor in state.items() if name not in ("router", "out")})
