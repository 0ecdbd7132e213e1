"""RWKV-7's kernels, interpreted on the CPU, against the loop over tokens: outputs, final states, every gradient."""

import pytest
import torch

from linear_moe import ops
from linear_moe.ops.triton import dplr, launch, problem
from tests.helpers import fresh_seed, rel_err
from tests.ops import cases

LAYOUTS = cases.layouts((0, 1, 65, 130), {name: cases.PACKED[name] for name in cases.PACKED if name != "packed"})


@pytest.fixture(autouse=True)
def half_precision_tiles(monkeypatch):
    """float32 too in the chunks that half precision takes; float32's own are shorter."""
    monkeypatch.setattr(problem, "configure", lambda *names_and_sizes: launch.configure(*names_and_sizes[:4]))


def inputs(B, T, cu_seqlens=None, **options):
    return cases.inputs("dplr", "channel", B, T, cu_seqlens, **options)


def compare(x, cu_seqlens=None, dtype=torch.float32, forward=1e-5, gradient=1e-4):
    """The kernels in dtype against the loop in float64, both on operands rounded to dtype."""
    x = {name: y.to(dtype if name in cases.VECTORS else torch.float32).double() for name, y in x.items()}
    expected = cases.run("dplr", x, backend="reference", cu_seqlens=cu_seqlens)
    cases.assert_close(
        cases.run("dplr", x, dtype, backend="triton", cu_seqlens=cu_seqlens), expected, forward, gradient
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_loop(layout):
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS[layout]
    compare(inputs(B, T, cu_seqlens), cu_seqlens)


def test_half_precision():
    """float16 stands for what the interpreter can't do, bfloat16: the same code, but for the products with states."""
    fresh_seed()
    _, T, cu_seqlens = LAYOUTS["packed-empty-sequences"]
    compare(inputs(1, T, cu_seqlens), cu_seqlens, torch.float16, forward=2e-3, gradient=4e-3)


@pytest.mark.parametrize("decay", (0.0, -50.0, -torch.inf))
def test_every_decay(decay):
    """None, all strong, and a reset a token: nothing becomes nan."""
    fresh_seed()
    x = {name: y.float().double() for name, y in inputs(1, 40).items()}
    g = torch.full_like(x["g"], decay)
    expected = cases.run("dplr", x | {"g": g.clamp_min(-1e3)}, backend="reference")
    for backend in ("triton", "torch"):
        cases.assert_close(cases.run("dplr", x | {"g": g}, torch.float32, backend=backend), expected, 1e-5, 1e-4)


def test_tiles_of_float32(monkeypatch):
    monkeypatch.setattr(problem, "configure", launch.configure)
    fresh_seed()
    compare(inputs(1, 40))


@pytest.mark.parametrize("widths", ((150, 200), (64, 17)))
def test_widths(monkeypatch, widths):
    """Several tiles a head, the last one ragged."""
    for name, width in zip("KV", widths):
        monkeypatch.setattr(cases, name, width)
    fresh_seed()
    compare(inputs(1, 40))


def test_exactly_causal():
    """Borders of dense sequences inside a chunk, between chunks and levels, and both ends of a packed one."""
    fresh_seed()
    tokens = {*cases.VECTORS, "g"}

    def run(cu_seqlens):
        return lambda **x: ops.dplr(**x, cu_seqlens=cu_seqlens, backend="triton")[0]

    cuts = [(slice(0, t), slice(t, None)) for t in (30, 32, 33)]
    cases.assert_causal(run(None), inputs(1, 70), tokens, cuts)
    cu_seqlens = torch.tensor([0, 33, 33, 50, 90], dtype=torch.int32)
    cuts = [(slice(33, 40), hidden) for hidden in (slice(0, 33), slice(40, None))]
    cases.assert_causal(run(cu_seqlens), inputs(1, 90, cu_seqlens), tokens, cuts)


def test_state_carries_over():
    fresh_seed()
    x = {name: y.float() for name, y in inputs(1, 70).items()}
    state = x.pop("initial_state")
    whole, last = ops.dplr(**x, initial_state=state, return_state=True, backend="triton")
    parts = []
    for cut in (slice(0, 1), slice(1, 34), slice(34, 70)):
        part = {name: y[:, cut] for name, y in x.items()}
        o, state = ops.dplr(**part, initial_state=state, return_state=True, backend="triton")
        parts.append(o)
    assert rel_err(torch.cat(parts, 1), whole) < 1e-5
    assert rel_err(state, last) < 1e-5


def test_repeats_bit_for_bit():
    fresh_seed()
    x = inputs(1, 40)
    first, second = (cases.run("dplr", dict(x), torch.float32, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def what_is_compiled(T, N):
    """Every launch's kernel, argument types and constants, of a rule on meta tensors: they have no values, so
    reading one raises."""
    launch.recorded.clear()
    with torch.device("meta"):
        cu_seqlens = torch.zeros(N + 1, dtype=torch.int32) if N else None
        x = inputs(1 if N else 2, T, cu_seqlens)
        leaves = [y.float().requires_grad_() for y in x.values()]
        options = {"scale": 0.3, "return_state": True, "cu_seqlens": cu_seqlens}
        o, state = dplr.dplr(**dict(zip(x, leaves)), **options)
        torch.autograd.grad(o.sum() + state.sum(), leaves)
    found = set()
    for kernel, _, arguments, options in launch.recorded:
        fixed = [n for n, y in zip(kernel.arg_names, arguments) if isinstance(y, int) and n not in launch.RUNTIME]
        assert not fixed, f"{kernel.__name__}: integers that Triton specialises on: {fixed}"
        types = tuple(getattr(y, "dtype", type(y)) for y in arguments)
        found.add((kernel.__name__, types, tuple(sorted(options.items(), key=str))))
    launch.recorded.clear()
    return frozenset(found)


@pytest.mark.parametrize("packed", (0, 5), ids=("dense", "packed"))
def test_reads_no_value(packed):
    sizes = ((16, packed), (17, packed), (4096, 2 * packed), (100, packed and 1))
    assert len({what_is_compiled(*size) for size in sizes}) == 1
