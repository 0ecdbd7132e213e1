"""The one-token kernels against the torch version in float64, on states of their own and in a store."""

import pytest
import torch

from linear_moe import ops
from tests.helpers import fresh_seed, rel_err
from tests.ops import steps
from tests.ops.steps import CASES, IDS, MINI_BATCH

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3}
S = 5
SIZES = {  # and whether the states lie in a store
    "states": ({"R": 2, "HV": 2, "K": 32, "V": 32, "D": 32, "M": 40}, False),
    "store": ({"R": 2, "H": 1, "HV": 3, "K": 20, "V": 37, "D": 37, "M": 70}, True),
    "narrow": ({"R": 2, "H": 1, "HV": 1, "K": 1, "V": 1, "D": 2, "M": 1}, True),
    "no-row": ({"R": 0}, True),
}
LARGEST = {"R": 1, "H": 1, "HV": 1, "K": 256, "V": 256, "D": 128, "M": 20}  # online rules: at most 128 channels
every_case = pytest.mark.parametrize("case", CASES, ids=IDS)


def assert_matches_torch(case, x, stored, dtype=torch.float32, change=lambda y: y):
    """One token, rounded to dtype and laid out as `change` does."""
    rule, R = case[0], len(x["v"])
    state = steps.draw(case, R=S if stored else R, **sizes_of(x))[1]
    state = steps.map_state(torch.Tensor.float, state)
    x = {name: y.to(dtype if name in steps.ROUNDED else torch.float32) for name, y in x.items()}
    operands, exact = steps.token(x, 0), steps.token({name: y.double() for name, y in x.items()}, 0)
    slots = torch.randperm(S, dtype=torch.int32)[:R] if stored else None
    given = steps.options(rule, torch.randint(MINI_BATCH, (len(steps.parts(state)[0]),)))
    before = steps.map_state(torch.clone, state)
    with torch.no_grad():
        o, new = ops.step(rule, state, *map(change, operands), **given, slots=slots, backend="triton")
    twin = steps.map_state(torch.Tensor.double, before)
    expected, final = ops.step(rule, twin, *exact, **given, slots=slots, backend="torch")
    assert o.dtype == dtype and rel_err(o, expected) < TOLERANCES[dtype]
    for a, b, old, kept in zip(*map(steps.parts, (new, final, before, state))):
        assert a.dtype == torch.float32 and rel_err(a, b) < 1e-5
        assert torch.equal(kept, old) != stored or R == 0
        if stored:
            untouched = [n for n in range(S) if n not in slots.tolist()]
            assert a is kept and torch.equal(a[untouched], old[untouched])


def sizes_of(x):
    """What draw takes to draw a state for these operands."""
    (H, K), (HV, V) = x["k"].shape[2:], x["v"].shape[2:]
    return {"H": H, "K": K, "HV": HV, "V": V, "D": V, "M": x["s"].shape[-1] if "s" in x else 1}


@pytest.mark.parametrize("sizes", SIZES)
@every_case
def test_matches_torch(case, sizes):
    fresh_seed()
    sizes, stored = SIZES[sizes]
    assert_matches_torch(case, steps.draw(case, T=1, **sizes)[0], stored)


@every_case
def test_half_precision(case):
    fresh_seed()
    assert_matches_torch(case, steps.draw(case, R=1, T=1)[0], stored=False, dtype=torch.float16)


@pytest.mark.parametrize("case", CASES[7:], ids=IDS[7:])
def test_largest_heads(case):
    fresh_seed()
    widths = LARGEST | ({"K": 128, "V": 128} if case[0] == "titans_linear" else {})
    assert_matches_torch(case, steps.draw(case, T=1, **widths)[0], stored=True)


@every_case
def test_every_decay_strong(case):
    fresh_seed()
    x, _ = steps.draw(case, R=1, T=1)
    x |= {name: torch.full_like(x[name], -50) for name in ("g", "m") if name in x}
    assert_matches_torch(case, x, stored=True)


@every_case
def test_operands_of_any_layout(case):
    """Slices of a fused projection, and decays with their channels outside."""
    fresh_seed()

    def change(y):
        if y.ndim == 3 and y.shape[1] == 2:
            return torch.cat([y, y], 1)[:, 2:]
        return y.mT.contiguous().mT if y.ndim > 1 else torch.stack([y, y], 1)[:, 0]

    assert_matches_torch(case, steps.draw(case, R=2, T=1)[0], stored=False, change=change)


@every_case
def test_decoding_in_a_store_equals_the_loop(case):
    fresh_seed()
    rule, R, T = case[0], 1, 5
    x, state = steps.draw(case, R=R, T=T, HV=2)
    offset, slots = torch.randint(MINI_BATCH, (S,)), torch.randperm(S)[:R]
    expected, final = steps.whole(rule, x, state, offset[slots])
    store = steps.map_state(lambda y: torch.zeros(S, *y.shape[1:]).index_copy(0, slots, y.float()), state)
    x = {name: y.float() for name, y in x.items()}
    for t in range(T):
        given = steps.options(rule, (offset + t) % MINI_BATCH)
        o, _ = ops.step(rule, store, *steps.token(x, t), **given, slots=slots, backend="triton")
        assert rel_err(o, expected[:, t]) < 1e-5
    assert all(rel_err(a[slots], b) < 1e-5 for a, b in zip(steps.parts(store), steps.parts(final)))


@pytest.mark.parametrize("rule", ("ttt_linear", "titans_linear"))
def test_wide_heads_of_rules_that_learn_online(rule):
    x, state = steps.draw((rule, None), T=1, K=129, V=129, D=129)
    x, state = {name: y.float() for name, y in x.items()}, state.float()
    with pytest.raises(ValueError, match="heads of at most 128 channels, not 129"):
        ops.step(rule, state, *steps.token(x, 0), backend="triton")
