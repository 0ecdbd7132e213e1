"""gsa and rwkv6 in torch against their loops: outputs, final states and every gradient."""

import re
from functools import partial
from itertools import pairwise

import pytest
import torch

from linear_moe import ops
from linear_moe.ops import chunk
from tests.helpers import fresh_seed, rel_err
from tests.ops import cases, composed

LAYOUTS = cases.layouts((0, 1, 65, 130))


@pytest.fixture(params=composed.RULES)
def rule(request):
    return request.param


def compare(rule, x, cu_seqlens=None):
    """Both in float64, and in float32, against the loop in float64."""
    expected = composed.run(rule, x, backend="reference", cu_seqlens=cu_seqlens)
    cases.assert_close(composed.run(rule, x, cu_seqlens=cu_seqlens), expected, 1e-12, 1e-12)
    cases.assert_close(composed.run(rule, x, torch.float32, cu_seqlens=cu_seqlens), expected, 1e-5, 1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_loop(rule, layout):
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS[layout]
    compare(rule, composed.inputs(rule, B, T, cu_seqlens), cu_seqlens)


def test_longest_chunks(rule):
    fresh_seed()
    compare(rule, composed.inputs(rule, 1, 4 * chunk.MAX_CHUNK + 1))


@pytest.mark.parametrize("layout", cases.PACKED)
def test_packed_without_reading_lengths(rule, monkeypatch, layout):
    """The layout of a GPU, where lengths stay on the device."""
    monkeypatch.setattr(chunk, "Layout", partial(chunk.Layout, read_lengths=False))
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS[layout]
    compare(rule, composed.inputs(rule, B, T, cu_seqlens), cu_seqlens)


def test_every_decay_strong(rule):
    fresh_seed()
    x = composed.inputs(rule, 2, 40)
    compare(rule, x | {"g": torch.full_like(x["g"], -50)})


def test_without_a_state(rule):
    """As from zeros, and with a scale of the caller's."""
    fresh_seed()
    x = composed.inputs(rule, 2, 40)
    zeros = torch.zeros_like(x.pop("initial_state"))
    o, state = composed.RULES[rule](**x, scale=0.3)
    expected, _ = composed.RULES[rule](**x, initial_state=zeros, scale=0.3, backend="reference")
    assert state is None and rel_err(o, expected) < 1e-12


def test_bf16(rule):
    fresh_seed()
    x = composed.rounded(composed.inputs(rule, 2, 100), torch.bfloat16)
    expected = composed.run(rule, x, backend="reference")
    cases.assert_close(composed.run(rule, x, torch.bfloat16), expected, 1e-2, 1e-2)


def test_autocast_changes_nothing(rule):
    fresh_seed()
    x = {name: tensor.float() for name, tensor in composed.inputs(rule, 1, 40).items()}
    expected, _ = composed.RULES[rule](**x)
    with torch.autocast("cpu", torch.bfloat16):
        o, _ = composed.RULES[rule](**x)
    assert torch.equal(o, expected)


def test_gradcheck(rule):
    fresh_seed()
    cu_seqlens = torch.tensor([0, 0, 3, 4, 21], dtype=torch.int32)
    x = composed.inputs(rule, 1, 21, cu_seqlens, strong=False)

    def function(*tensors):
        return composed.RULES[rule](**dict(zip(x, tensors)), return_state=True, cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in x.values()], fast_mode=True)


def test_exactly_causal(rule):
    """Dense (later tokens) and packed (later tokens and other sequences)."""
    fresh_seed()

    def function(cu_seqlens):
        return lambda **x: composed.RULES[rule](**x, cu_seqlens=cu_seqlens)[0]

    cuts = [(slice(0, t), slice(t, None)) for t in (1, 30, 33, 64)]
    cases.assert_causal(function(None), composed.inputs(rule, 2, 70), composed.TOKENS, cuts)
    cu_seqlens = torch.tensor([0, 33, 33, 50, 90], dtype=torch.int32)
    cuts = [(slice(33, 40), hidden) for hidden in (slice(0, 33), slice(40, None))]
    cuts += [(slice(0, 33), slice(33, None)), (slice(50, 90), slice(0, 50))]
    cases.assert_causal(function(cu_seqlens), composed.inputs(rule, 1, 90, cu_seqlens), composed.TOKENS, cuts)


@pytest.mark.parametrize("cuts", ([0, 1, 34, 70], range(71)), ids=("parts", "tokens"))
def test_state_carries_over(rule, cuts):
    """Part by part, and as one decodes: token by token."""
    fresh_seed()
    x = composed.inputs(rule, 2, 70)
    state, function, parts = x.pop("initial_state"), composed.RULES[rule], []
    whole, last = function(**x, initial_state=state, return_state=True)
    for start, end in pairwise(cuts):
        part = {name: tensor if tensor.ndim == 2 else tensor[:, start:end] for name, tensor in x.items()}
        o, state = function(**part, initial_state=state, return_state=True)
        parts.append(o)
    assert rel_err(torch.cat(parts, 1), whole) < 1e-12
    assert rel_err(state, last) < 1e-12


@pytest.mark.parametrize("packed", (False, True), ids=("dense", "packed"))
def test_nothing_is_read_back(rule, packed):
    """Meta tensors take a GPU's path and have no values."""
    with torch.device("meta"):
        cu_seqlens = torch.zeros(5, dtype=torch.int32) if packed else None
        composed.run(rule, composed.inputs(rule, 1 if packed else 2, 100, cu_seqlens), cu_seqlens=cu_seqlens)


def test_gsa_agrees_with_fla():
    naive = pytest.importorskip("fla.ops.gsa.naive", reason="flash-linear-attention (fla) is not installed")
    fresh_seed()
    x = {name: tensor.float() for name, tensor in composed.inputs("gsa", 2, 50).items()}

    def theirs(*, initial_state, return_state, **x):
        keys, values = initial_state.split([x["k"].shape[-1], x["v"].shape[-1]], -1)
        initial = keys.mT, values  # its keys' state is [N, H, K, M]
        o, (keys, values) = naive.naive_recurrent_gsa(**x, initial_state=initial, output_final_state=True)
        return o, torch.cat([keys.mT, values], -1)

    cases.assert_close(cases.results(composed.gsa, x), cases.results(theirs, x), 1e-5, 1e-4)


def test_rwkv6_agrees_with_fla():
    naive = pytest.importorskip("fla.ops.rwkv6.recurrent_naive", reason="flash-linear-attention (fla) is not installed")
    fresh_seed()
    x = {name: tensor.float() for name, tensor in composed.inputs("rwkv6", 2, 50).items()}

    def theirs(*, q, k, v, g, u, initial_state, return_state):
        q, k, v, g = (tensor.transpose(1, 2) for tensor in (q, k, v, g))
        o, state = naive.naive_recurrent_rwkv6(q, k, v, g, u, initial_state=initial_state, output_final_state=True)
        return o.transpose(1, 2), state

    cases.assert_close(cases.results(ops.rwkv6, x), cases.results(theirs, x), 1e-5, 1e-4)


BAD_RWKV6 = {
    "g": ({"g": torch.zeros(1, 6, 2)}, "rwkv6: g must be [B, T, H, K] = [1, 6, 2, 8], not [1, 6, 2]"),
    "no g": ({"g": None}, "rwkv6: g must be a tensor, not NoneType"),
    "u": ({"u": torch.zeros(2, 7)}, "rwkv6: u must be [H, K] = [2, 8], not [2, 7]"),
    "heads": (
        {"v": torch.zeros(1, 6, 4, 12).double(), "g": torch.zeros(1, 6, 4, 8)},
        "rwkv6: k must be [B, T, H, K] = [1, 6, 4, 8], not [1, 6, 2, 8]",
    ),
    "state": ({"initial_state": torch.zeros(1, 2, 8, 8)}, "rwkv6: state must be [N, HV, K, V] = [1, 2, 8, 12]"),
}
BAD_GSA = {
    "s": ({"s": torch.zeros(1, 6, 10)}, "gsa: s must be a tensor [B, T, H, channels]"),
    "slots": ({"s": torch.zeros(1, 6, 2, 9).double()}, "gsa: g must be [B, T, H, M] = [1, 6, 2, 9], not [1, 6, 2, 10]"),
    "heads": ({"q": torch.zeros(1, 6, 1, 8).double()}, "gsa: q must be [B, T, H, K] = [1, 6, 2, 8], not [1, 6, 1, 8]"),
    "dtypes": ({"s": torch.zeros(1, 6, 2, 10)}, "gsa: q, k, v, s must share a dtype, not torch.float64"),
    "state": ({"initial_state": torch.zeros(1, 2, 10, 8)}, "gsa: the state must be a tuple"),
    "values": (
        {"initial_state": (torch.zeros(1, 2, 10, 8), torch.zeros(1, 2, 10, 8))},
        "gsa: values' state must be [N, H, M, V] = [1, 2, 10, 12], not [1, 2, 10, 8]",
    ),
    "cu_seqlens": ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "cu_seqlens must run from 0 to T (6)"),
}
BAD = [("rwkv6", *BAD_RWKV6[name]) for name in BAD_RWKV6] + [("gsa", *BAD_GSA[name]) for name in BAD_GSA]


@pytest.mark.parametrize("rule, change, message", BAD, ids=[f"{rule}-{next(iter(change))}" for rule, change, _ in BAD])
def test_refuses(rule, change, message):
    x = composed.inputs(rule, 1, 6)
    del x["initial_state"]
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(ops, rule)(**x | change)
