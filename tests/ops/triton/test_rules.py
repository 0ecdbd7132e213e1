"""The rules' kernels, interpreted on the CPU, against the loop over tokens: outputs, final states, every gradient."""

import pytest
import torch

from linear_moe import ops
from linear_moe.ops.triton import launch, problem
from tests.helpers import fresh_seed, rel_err
from tests.ops import cases

LAYOUTS = cases.layouts((0, 1, 130), {name: cases.PACKED[name] for name in cases.PACKED if name != "packed"})


@pytest.fixture(params=["linear_attention", "delta_rule"])
def rule(request):
    return request.param


@pytest.fixture(autouse=True)
def half_precision_tiles(monkeypatch):
    """float32 too in the chunks of 64 that half precision takes; float32's own are shorter."""
    monkeypatch.setattr(problem, "configure", lambda *names_and_sizes: launch.configure(*names_and_sizes[:4]))


def compare(rule, x, cu_seqlens=None, dtype=torch.float32, forward=1e-5, gradient=1e-4):
    """The kernels in dtype against the loop in float64, both on operands rounded to dtype."""
    x = {name: t.to(dtype).double() if name in ("q", "k", "v") else t.float().double() for name, t in x.items()}
    reference = cases.run(rule, x, backend="reference", cu_seqlens=cu_seqlens)
    found = cases.run(rule, x, dtype, backend="triton", cu_seqlens=cu_seqlens)
    scales = {}
    if dtype == torch.float16 and "g" in x and x["g"].ndim == 1:
        scales["dg"] = cases.terms_of_constant_decay(rule, x, cu_seqlens) / 4  # 1e-3 of them; 4e-4 in 30 draws
    cases.assert_close(found, reference, forward, gradient, scales)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decay", cases.DECAYS)
def test_matches_loop(rule, decay, layout):
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS[layout]
    heads = cases.HV if cu_seqlens is None else cases.H  # grouped where sequences are dense
    compare(rule, cases.inputs(rule, decay, B, T, cu_seqlens, heads=heads), cu_seqlens)


@pytest.mark.parametrize("decay", cases.DECAYS)
def test_half_precision(rule, decay):
    """float16 stands for what the interpreter can't do, bfloat16: the same code, but for the products with states."""
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS["packed-empty-sequences"]
    x = cases.inputs(rule, decay, B, T, cu_seqlens, heads=cases.H)
    compare(rule, x, cu_seqlens, torch.float16, forward=2e-3, gradient=4e-3)


@pytest.mark.parametrize("decay", ("constant", "scalar", "channel"))
def test_every_decay_strong(rule, decay):
    fresh_seed()
    x = cases.inputs(rule, decay, 1, 40, heads=cases.H)
    compare(rule, x | {"g": torch.full_like(x["g"], -50)})


@pytest.mark.parametrize("decay", cases.DECAYS)
def test_tiles_of_float32(rule, decay, monkeypatch):
    monkeypatch.setattr(problem, "configure", launch.configure)
    fresh_seed()
    compare(rule, cases.inputs(rule, decay, 1, 40, heads=cases.H))


@pytest.mark.parametrize("backend", ("triton", "torch"))
@pytest.mark.parametrize("decay", ("constant", "scalar", "channel"))
def test_reset(rule, decay, backend):
    """A log decay of -inf forgets everything, and nothing becomes nan."""
    fresh_seed()
    x = cases.inputs(rule, decay, 1, 40, heads=cases.H)
    g = torch.where(torch.rand(x["g"].shape) < 0.3, -torch.inf, x["g"])
    x = {name: t.float() for name, t in (x | {"g": g}).items()}
    expected = cases.run(rule, {n: t.double() for n, t in x.items()} | {"g": g.clamp_min(-1e3)}, backend="reference")
    cases.assert_close(cases.run(rule, x, torch.float32, backend=backend), expected, 1e-5, 1e-4)


@pytest.mark.parametrize("K, V", [(150, 200), (64, 17)])
@pytest.mark.parametrize("decay", ("scalar", "channel"))
def test_widths(rule, decay, monkeypatch, K, V):
    """Several tiles a head, the last one ragged."""
    monkeypatch.setattr(cases, "K", K)
    monkeypatch.setattr(cases, "V", V)
    fresh_seed()
    compare(rule, cases.inputs(rule, decay, 1, 70, heads=cases.H))


@pytest.mark.parametrize("decay", ("scalar", "channel"))
def test_exactly_causal(rule, decay):
    """Three borders of dense sequences, inside a chunk, between chunks and levels, and both ends of a packed one."""
    fresh_seed()
    tokens = {"q", "k", "v", "beta", "g"}

    def run(cu_seqlens):
        return lambda **x: getattr(ops, rule)(**x, cu_seqlens=cu_seqlens, backend="triton")[0]

    cuts = [(slice(0, t), slice(t, None)) for t in (30, 33, 64)]
    cases.assert_causal(run(None), cases.inputs(rule, decay, 1, 70, heads=cases.H), tokens, cuts)
    cu_seqlens = torch.tensor([0, 33, 33, 50, 90], dtype=torch.int32)
    cuts = [(slice(33, 40), hidden) for hidden in (slice(0, 33), slice(40, None))]
    cases.assert_causal(run(cu_seqlens), cases.inputs(rule, decay, 1, 90, cu_seqlens, heads=cases.H), tokens, cuts)


def test_equal_keys():
    """All keys alike: the products of the triangular system grow to binomial coefficients, its solution does not."""
    fresh_seed()
    x = cases.inputs("delta_rule", "none", 1, 130, heads=cases.H)
    compare("delta_rule", x | {"k": x["k"][:, :1].expand_as(x["k"]), "beta": torch.full_like(x["beta"], 0.999)})


def test_constant_decay_without_gradient(rule):
    """Its gradient is not computed where nobody asks."""
    fresh_seed()
    x = {name: t.float() for name, t in cases.inputs(rule, "constant", 1, 70, heads=cases.H).items()}
    leaves = [t.requires_grad_() for name, t in x.items() if name != "g"]
    results = []
    for backend in ("triton", "torch"):
        o, _ = getattr(ops, rule)(**x, backend=backend)
        results.append(torch.autograd.grad(o.square().sum(), leaves))
    assert all(rel_err(a, b) < 1e-4 for a, b in zip(*results))


def test_beta_zero():
    """What is not written has a gradient all the same."""
    fresh_seed()
    x = cases.inputs("delta_rule", "scalar", 1, 70, heads=cases.H)
    compare("delta_rule", x | {"beta": torch.where(torch.rand(x["beta"].shape) < 0.5, 0.0, x["beta"])})


def test_repeats_bit_for_bit(rule):
    fresh_seed()
    x = cases.inputs(rule, "scalar", 1, 70)
    first, second = (cases.run(rule, dict(x), torch.float32, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
