"""One-token steps of every rule, of the convolution and of the token shift, against the loop over a sequence."""

import re

import pytest
import torch

from linear_moe import ops
from tests.helpers import fresh_seed, rel_err
from tests.ops import steps
from tests.ops.steps import CASES, IDS, MINI_BATCH, SIZES

R, T, S = SIZES["R"], SIZES["T"], 7
every_case = pytest.mark.parametrize("case", CASES, ids=IDS)
backends = pytest.mark.parametrize("backend", ("torch", "reference"))


@backends
@every_case
def test_tokens_equal_the_loop(case, backend):
    """The first rows begin inside a mini-batch."""
    fresh_seed()
    rule, (x, state) = case[0], steps.draw(case)
    offset = torch.randint(MINI_BATCH, (R,))
    expected, final = steps.whole(rule, x, state, offset)
    for t in range(T):
        given, before = steps.map_state(torch.clone, state), state
        seen = (offset + t) % MINI_BATCH
        o, state = ops.step(rule, state, *steps.token(x, t), **steps.options(rule, seen), backend=backend)
        assert rel_err(o, expected[:, t]) < 1e-12 and o.isfinite().all()
        assert all(map(torch.equal, steps.parts(before), steps.parts(given)))
    assert all(rel_err(a, b) < 1e-12 for a, b in zip(steps.parts(state), steps.parts(final)))


@backends
@every_case
def test_entries_of_a_store_equal_their_own_sequences(case, backend):
    """Each token's rows go to other slots; every entry saw tokens of many rows."""
    fresh_seed()
    rule, (x, _), (_, store) = case[0], steps.draw(case), steps.draw(case, R=S)
    start, offset = steps.map_state(torch.clone, store), torch.randint(MINI_BATCH, (S,), dtype=torch.int32)
    first, seen, outputs = offset.clone(), [[] for _ in range(S)], {}
    for t in range(T):
        slots = torch.randperm(S, dtype=torch.int32)[:R]
        before = steps.map_state(torch.clone, store)
        given = steps.options(rule, offset.clone())
        o, after = ops.step(rule, store, *steps.token(x, t), **given, slots=slots, backend=backend)
        assert all(a is b for a, b in zip(steps.parts(after), steps.parts(store)))
        untouched = [n for n in range(S) if n not in slots.tolist()]
        for a, b in zip(steps.parts(store), steps.parts(before)):
            assert torch.equal(a[untouched], b[untouched])
        assert not given or torch.equal(given["offset"], offset)
        offset[slots.long()] = (offset[slots.long()] + 1) % MINI_BATCH
        for row, slot in enumerate(slots.tolist()):
            seen[slot].append((row, t))
            outputs[row, t] = o[row]
    for n, places in enumerate(seen):
        if places:
            rows, tokens = map(list, zip(*places))
            own = {name: y if steps.is_a_heads(name, y) else y[rows, tokens].unsqueeze(0) for name, y in x.items()}
            expected, final = steps.whole(rule, own, steps.entries(start, [n]), first[n : n + 1])
            assert rel_err(torch.stack([outputs[place] for place in places]), expected[0]) < 1e-12
            for a, b in zip(steps.parts(store), steps.parts(final)):
                assert rel_err(a[n], b[0]) < 1e-12


@every_case
def test_gradients(case):
    fresh_seed()
    rule, (x, state) = case[0], steps.draw(case, R=2, T=1, K=3, V=2, D=3, M=4)
    operands, count = steps.token(x, 0), len(steps.parts(state))
    given = steps.options(rule, torch.tensor([0, MINI_BATCH - 1]))

    def step(*tensors):
        state = tensors[:count] if count > 1 else tensors[0]
        o, state = ops.step(rule, state, *tensors[count:], **given)
        return o, *steps.parts(state)

    leaves = [y.clone().requires_grad_() for y in (*steps.parts(state), *operands)]
    assert torch.autograd.gradcheck(step, leaves, fast_mode=True)


@pytest.mark.parametrize("slots", (None, torch.tensor([2, 0, 1])), ids=("states", "store"))
@pytest.mark.parametrize("dtype, kept", ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)), ids=str)
@every_case
def test_dtypes(case, dtype, kept, slots):
    """Autocast changes nothing either."""
    rule, (x, state) = case[0], steps.draw(case, T=1)
    x = {name: y.to(dtype) if name in steps.ROUNDED else y for name, y in x.items()}
    states = [steps.map_state(lambda y: y.to(kept, copy=True), state) for _ in range(2)]
    o, new = ops.step(rule, states[0], *steps.token(x, 0), slots=slots)
    assert o.dtype == dtype and all(y.dtype == kept for y in steps.parts(new))
    with torch.autocast("cpu", torch.bfloat16):
        again, same = ops.step(rule, states[1], *steps.token(x, 0), slots=slots)
    assert torch.equal(o, again) and all(map(torch.equal, steps.parts(new), steps.parts(same)))


def test_scale_and_eps():
    fresh_seed()
    x, state = steps.draw(("ttt_linear", None), T=1)
    given = {"scale": 0.3, "eps": 0.1}
    o, new = ops.step("ttt_linear", state, *steps.token(x, 0), **given)
    expected, final = ops.ttt_linear(*x.values(), **given, initial_state=state, return_state=True)
    assert rel_err(o, expected[:, 0]) < 1e-12 and rel_err(new, final) < 1e-12


@pytest.mark.parametrize("normalize", (None, 3), ids=("plain", "normalized"))
@pytest.mark.parametrize("activation", ("silu", None))
@pytest.mark.parametrize("width", (1, 4, None))
@pytest.mark.parametrize("stored", (False, True), ids=("states", "store"))
def test_conv_steps(stored, width, activation, normalize):
    fresh_seed()
    D, given = 6, {"activation": activation, "normalize": normalize}
    x = torch.randn(R, T, D, dtype=torch.float64)
    weight = None if width is None else torch.randn(D, width, dtype=torch.float64)
    store = None if width is None else torch.randn(S, D, width - 1, dtype=torch.float64)
    slots = torch.randperm(S)[:R]
    start = None if store is None else store.clone()
    own = None if store is None else start[slots]
    expected, final = ops.short_conv(x, weight, **given, initial_state=own, return_state=store is not None)
    state = store if stored else own
    for t in range(T):
        y, state = ops.conv_step(x[:, t], weight, state, **given, slots=slots if stored else None)
        assert rel_err(y, expected[:, t]) < 1e-12
    if width is None:
        assert state is None
        return
    assert (state is store) == stored
    assert torch.equal(state[slots] if stored else state, final)
    untouched = [n for n in range(S) if n not in slots.tolist()]
    assert torch.equal(store[untouched], start[untouched])


@pytest.mark.parametrize("stored", (False, True), ids=("states", "store"))
def test_shift_steps(stored):
    fresh_seed()
    x, store, slots = torch.randn(R, T, 6), torch.randn(S, 6), torch.randperm(S)[:R]
    start = store.clone()
    expected, final = ops.token_shift(x, initial_state=start[slots], return_state=True)
    state = store if stored else start[slots]
    for t in range(T):
        previous, state = ops.shift_step(x[:, t], state, slots=slots if stored else None)
        assert torch.equal(previous, expected[:, t])
    assert (state is store) == stored
    assert torch.equal(state[slots] if stored else state, final)
    untouched = [n for n in range(S) if n not in slots.tolist()]
    assert torch.equal(store[untouched], start[untouched])


def float64(*shape):
    return torch.zeros(shape, dtype=torch.float64)


BAD = {  # changes of a token of the delta rule
    "rule": ({"rule": "softmax"}, "step: rule ('softmax') must be one of linear_attention, delta_rule, dplr"),
    "many": ({"rule": "linear_attention"}, "linear_attention: the operands are q, k, v, g, not 5"),
    "state": ({"state": None}, "the state must be a tensor"),
    "pair": ({"state": (float64(3, 4, 8, 12),) * 2}, "the state must be a tensor"),
    "state-shape": ({"state": float64(2, 4, 8, 12)}, "state must be [R, HV, K, V] = [3, 4, 8, 12], not [2, 4, 8, 12]"),
    "store-shape": (
        {"state": float64(7, 4, 8, 13), "slots": torch.arange(3)},
        "state must be [S, HV, K, V] = [7, 4, 8, 12], not [7, 4, 8, 13]",
    ),
    "q": ({"q": float64(3, 1, 2, 8)}, "q must be [R, H, K], not [3, 1, 2, 8]"),
    "k": ({"k": float64(3, 2, 7)}, "k must be [R, H, K] = [3, 2, 8], not [3, 2, 7]"),
    "v": ({"v": None}, "v must be a tensor, not NoneType"),
    "heads": ({"v": float64(3, 3, 12), "beta": float64(3, 3), "g": None}, "(3) must be a multiple of key heads (2)"),
    "dtype": ({"k": torch.zeros(3, 2, 8)}, "q, k, v must share a dtype, not torch.float64, torch.float32"),
    "beta": ({"beta": float64(3, 2)}, "beta must be [R, HV] = [3, 4], not [3, 2]"),
    "beta-missing": ({"beta": None}, "beta must be a tensor, not NoneType"),
    "g": ({"g": float64(3, 4, 12)}, "g must be [HV] = [4] or [R, HV] = [3, 4] or [R, HV, K] = [3, 4, 8]"),
    "offset": ({"offset": torch.zeros(3).int()}, "delta_rule: offset is no option of this rule"),
    "mini-batch": ({"mini_batch": 16}, "delta_rule: mini_batch is no option of this rule"),
    "slots": ({"slots": torch.arange(2)}, "slots must be an int32 or int64 tensor [R] = [3], not torch.int64 [2]"),
    "slots-dtype": ({"slots": torch.zeros(3)}, "slots must be an int32 or int64 tensor [R] = [3], not torch.float32"),
    "slots-type": ({"slots": [0, 1, 2]}, "slots must be an int32 or int64 tensor [R] = [3], not list"),
    "slots-value": ({"slots": torch.tensor([0, 3, 1])}, "slots must be at least 0 and below S (3): [0, 3, 1]"),
    "store-dtype": (
        {"state": torch.zeros(3, 4, 8, 12), "slots": torch.arange(3)},
        "the store must be contiguous torch.float64 to be written in place, not torch.float32",
    ),
    "store-strides": (
        {"state": float64(3, 4, 12, 8).mT, "slots": torch.arange(3)},
        "the store must be contiguous torch.float64 to be written in place, not torch.float64 with strides (384, 96, 1",
    ),
    "gradient": (
        {"state": float64(3, 4, 8, 12).requires_grad_(), "slots": torch.arange(3)},
        "with slots there is no backward; decode under torch.no_grad()",
    ),
    "device": ({"g": torch.zeros(4, device="meta")}, "g and the input must be on one device (cpu)"),
    "backend": ({"backend": "cuda"}, "backend ('cuda') must be one of"),
}


@pytest.mark.parametrize("bad", BAD)
def test_refuses(bad):
    change, message = BAD[bad]
    x, state = steps.draw(("delta_rule", "R T HV"), T=1)
    given = {"rule": "delta_rule", "state": state} | dict(zip(x, steps.token(x, 0))) | change
    operands = [given.pop(name) for name in x]
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.step(given.pop("rule"), given.pop("state"), *operands, **given)


BAD_OF_RULES = {  # (rule, changes, message)
    "dplr": ("dplr", {"a": None}, "dplr: a must be a tensor, not NoneType"),
    "dplr-heads": ("dplr", {"v": float64(3, 4, 12)}, "dplr: v must be [R, H, V] = [3, 2, 12], not [3, 4, 12]"),
    "rwkv6": ("rwkv6", {"u": float64(3, 2, 8)}, "rwkv6: u must be [H, K] = [2, 8], not [3, 2, 8]"),
    "gsa": ("gsa", {"g": float64(3, 2, 9)}, "gsa: g must be [R, H, M] = [3, 2, 10], not [3, 2, 9]"),
    "gsa-state": ("gsa", {"state": float64(3, 2, 10, 8)}, "gsa: the state must be a tuple of two tensors"),
    "ttt": ("ttt_linear", {"state": float64(3, 2, 2, 12, 12)}, "state must be [R, H, 2, D+1, D] = [3, 2, 2, 13, 12]"),
    "titans-eps": ("titans_linear", {"eps": 1e-6}, "titans_linear: eps is no option of this rule"),
    "mini-batch": ("titans_linear", {"mini_batch": 0}, "mini_batch (0) must be at least 1"),
    "offset": ("ttt_linear", {"offset": torch.tensor([1, 16, 0])}, "offset must be at least 0 and below mini_batch"),
    "offset-store": (
        "ttt_linear",
        {"offset": torch.zeros(2).int(), "slots": torch.arange(3)},
        "offset must be an int32 or int64 tensor [S] = [3]",
    ),
}


@pytest.mark.parametrize("bad", BAD_OF_RULES)
def test_rules_refuse(bad):
    rule, change, message = BAD_OF_RULES[bad]
    x, state = steps.draw((rule, None), T=1)
    given = {"state": state} | dict(zip(x, steps.token(x, 0))) | change
    operands = [given.pop(name) for name in x]
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.step(rule, given.pop("state"), *operands, **given)


BAD_CONV = {
    "x": ({"x": torch.zeros(3, 1, 6)}, "conv_step: x must be a tensor [R, D]"),
    "weight": ({"weight": torch.zeros(5, 4)}, "weight must be [D, W] = [6, 4], not [5, 4]"),
    "state": ({"state": torch.zeros(3, 6, 4)}, "state must be [R, D, W - 1] = [3, 6, 3], not [3, 6, 4]"),
    "state-missing": ({"state": None}, "state must be a tensor, not NoneType"),
    "store": ({"slots": torch.tensor([0, 1])}, "slots must be an int32 or int64 tensor [R] = [3]"),
    "store-dtype": (
        {"state": float64(3, 6, 3), "slots": torch.arange(3)},
        "the store must be contiguous torch.float32 to be written in place, not torch.float64",
    ),
    "no-weight": ({"weight": None}, "without a weight there is no state"),
    "activation": ({"activation": "gelu"}, "activation ('gelu') must be 'silu' or None"),
    "normalize": ({"normalize": 4}, "the channels (6) must be a multiple of the normalised width (4)"),
    "gradient": (
        {"weight": torch.zeros(6, 4, requires_grad=True), "slots": torch.arange(3)},
        "with slots there is no backward",
    ),
}


@pytest.mark.parametrize("bad", BAD_CONV)
def test_conv_step_refuses(bad):
    change, message = BAD_CONV[bad]
    given = {"x": torch.zeros(3, 6), "weight": torch.zeros(6, 4), "state": torch.zeros(3, 6, 3)} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.conv_step(**given)


def test_shift_step_refuses():
    with pytest.raises(ValueError, match=re.escape("state must be [R, D] = [3, 6], not [2, 6]")):
        ops.shift_step(torch.zeros(3, 6), torch.zeros(2, 6))
    with pytest.raises(ValueError, match=re.escape("slots must be at least 0 and below S (2): [0, 2, 1]")):
        ops.shift_step(torch.zeros(3, 6), torch.zeros(2, 6), slots=torch.tensor([0, 2, 1]))
