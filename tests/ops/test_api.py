"""The public functions: dtypes, and what they refuse."""

import re

import pytest
import torch

from linear_moe import ops
from tests.helpers import fresh_seed, rel_err
from tests.ops import cases

RULES = ("linear_attention", "delta_rule")


@pytest.mark.parametrize("dtype, kept", ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)))
@pytest.mark.parametrize("rule", RULES)
def test_dtypes(rule, dtype, kept):
    x = cases.inputs(rule, "scalar", 2, 5)
    x |= {name: x[name].to(dtype) for name in ("q", "k", "v")}
    o, state = getattr(ops, rule)(**x, return_state=True)
    assert (o.dtype, state.dtype) == (dtype, kept)


@pytest.mark.parametrize("rule", RULES)
def test_autocast_changes_nothing(rule):
    fresh_seed()
    x = {name: tensor.float() for name, tensor in cases.inputs(rule, "scalar", 1, 40).items()}
    expected, _ = getattr(ops, rule)(**x)
    with torch.autocast("cpu", torch.bfloat16):
        o, _ = getattr(ops, rule)(**x)
    assert torch.equal(o, expected)


@pytest.mark.parametrize("rule", RULES)
def test_scale_and_missing_state(rule):
    fresh_seed()
    x = cases.inputs(rule, "none", 2, 20)
    zeros = torch.zeros_like(x.pop("initial_state"))
    o, state = getattr(ops, rule)(**x, scale=0.3)
    assert state is None
    expected, _ = getattr(ops, rule)(**x, initial_state=zeros, scale=1.0)
    assert rel_err(o, 0.3 * expected) < 1e-12


def cu(*ends, dtype=torch.int32):
    return torch.tensor(ends, dtype=dtype)


BAD = {
    "q-shape": ({"q": torch.zeros(1, 6, 2, 7)}, "q must be [B, T, H, K] = [1, 6, 2, 8], not [1, 6, 2, 7]"),
    "k-dimensions": ({"k": torch.zeros(1, 6, 8)}, "k must be [B, T, heads, channels], not [1, 6, 8]"),
    "k-dtype": ({"k": torch.zeros(1, 6, 2, 8)}, "q, k, v must share a dtype"),
    "v-tokens": ({"v": torch.zeros(1, 5, 4, 12)}, "q must be [B, T, H, K] = [1, 5, 2, 8], not [1, 6, 2, 8]"),
    "heads": ({"v": torch.zeros(1, 6, 3, 12)}, "value heads (3) must be a multiple of key heads (2)"),
    "integers": ({"v": torch.zeros(1, 6, 4, 12, dtype=torch.int64)}, "v must be floating point, not torch.int64"),
    "g-shape": ({"g": torch.zeros(1, 6, 2)}, "g must be [HV] = [4] or [B, T, HV] = [1, 6, 4] or [B, T, HV, K]"),
    "beta-shape": ({"beta": torch.zeros(1, 6)}, "beta must be [B, T, HV] = [1, 6, 4], not [1, 6]"),
    "beta-missing": ({"beta": None}, "beta must be a tensor, not NoneType"),
    "state-shape": ({"initial_state": torch.zeros(1, 4, 8, 8)}, "state must be [N, HV, K, V] = [1, 4, 8, 12]"),
    "cu-dtype": ({"cu_seqlens": cu(0, 6, dtype=torch.int16)}, "cu_seqlens must be int32 or int64, not torch.int16"),
    "cu-shape": ({"cu_seqlens": torch.zeros(1, 2, dtype=torch.int32)}, "cu_seqlens must be [N + 1], not [1, 2]"),
    "backend": ({"backend": "cuda"}, "backend ('cuda') must be one of ['auto', 'triton', 'torch', 'reference']"),
}


@pytest.mark.parametrize("bad", BAD)
def test_rules_refuse(bad):
    change, message = BAD[bad]
    arguments = cases.inputs("delta_rule", "scalar", 1, 6) | change
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.delta_rule(**arguments)
    if not bad.startswith("beta"):
        del arguments["beta"]
        with pytest.raises(ValueError, match=re.escape(message)):
            ops.linear_attention(**arguments)


def test_packed_batch_must_be_one():
    with pytest.raises(ValueError, match=re.escape("with cu_seqlens the batch size (2) must be 1")):
        ops.linear_attention(**cases.inputs("linear_attention", "none", 2, 6), cu_seqlens=cu(0, 6))


BAD_CONV = {
    "x": ({"x": torch.zeros(2, 6)}, "x must be a tensor [B, T, D]"),
    "weight": ({"weight": torch.zeros(5, 4)}, "weight must be [D, W] = [3, 4], not [5, 4]"),
    "width": ({"weight": torch.zeros(3, 0)}, "weight must have at least one column"),
    "state": ({"initial_state": torch.zeros(2, 3, 4)}, "initial_state must be [N, D, W - 1] = [2, 3, 3]"),
    "activation": ({"activation": "gelu"}, "activation ('gelu') must be 'silu' or None"),
    "cu_seqlens": ({"cu_seqlens": cu(0, 6)}, "with cu_seqlens the batch size (2) must be 1"),
    "normalize": ({"normalize": 2}, "the channels (3) must be a multiple of the normalised width (2)"),
}


@pytest.mark.parametrize("bad", BAD_CONV)
def test_short_conv_refuses(bad):
    change, message = BAD_CONV[bad]
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.short_conv(**{"x": torch.zeros(2, 6, 3), "weight": torch.zeros(3, 4)} | change)


BAD_NORM = {
    "weight": ({"weight": torch.ones(4)}, "weight must be [V] = [3], not [4]"),
    "gate": ({"gate": torch.ones(6, 3)}, "gate must be [tokens, HV, V] = [6, 2, 3], not [6, 3]"),
    "activation": ({"activation": "relu"}, "activation ('relu') must be 'silu' or 'sigmoid'"),
}


@pytest.mark.parametrize("bad", BAD_NORM)
def test_gated_norm_refuses(bad):
    change, message = BAD_NORM[bad]
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.gated_norm(**{"o": torch.zeros(6, 2, 3), "weight": torch.ones(3), "eps": 1e-5} | change)
