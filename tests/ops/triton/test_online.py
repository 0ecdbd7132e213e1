"""The kernels of TTT and Titans, interpreted on the CPU, against the loop over tokens: outputs, states, gradients."""

from functools import partial
from itertools import pairwise

import pytest
import torch

from linear_moe import ops
from linear_moe.ops import api
from linear_moe.ops.triton import launch
from tests.helpers import fresh_seed, rel_err
from tests.ops import cases
from tests.ops.test_online import LAYOUTS, RULES, TOKENS, inputs, offsets


@pytest.fixture(params=RULES)
def rule(request):
    return request.param


def compare(rule, x, dtype=torch.float32, forward=1e-5, gradient=1e-4, **options):
    """The kernels in dtype against the loop in float64, both on operands rounded to dtype."""
    x = {name: t.to(dtype).double() if name in cases.VECTORS else t.float().double() for name, t in x.items()}
    reference = cases.run(rule, dict(x), backend="reference", **options)
    cases.assert_close(cases.run(rule, x, dtype, backend="triton", **options), reference, forward, gradient)


@pytest.mark.parametrize("offset", (False, True), ids=("whole", "offset"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_loop(rule, layout, offset):
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS[layout]
    seen = offsets(B, cu_seqlens) if offset else None
    compare(rule, inputs(rule, B, T, cu_seqlens), cu_seqlens=cu_seqlens, offset=seen)


def test_tokens_that_are_not_there_have_no_norm():
    """Without eps and without a bias theirs is 1 / 0, in a mini-batch of 5 of 16 tokens."""
    fresh_seed()
    x = inputs("ttt_linear", 1, 5)
    x["initial_state"][..., -1, :] = 0
    compare("ttt_linear", x, eps=0.0)


def test_half_precision(rule):
    """float16 stands for what the interpreter can't do, bfloat16: the same code, but for the products with states."""
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS["packed-empty-sequences"]
    x = inputs(rule, B, T, cu_seqlens)
    compare(rule, x, torch.float16, 2e-3, 4e-3, cu_seqlens=cu_seqlens, offset=offsets(B, cu_seqlens))


@pytest.mark.parametrize("mini_batch", (5, 32))
def test_other_mini_batches(rule, mini_batch):
    fresh_seed()
    compare(rule, inputs(rule, 1, 37), mini_batch=mini_batch, offset=offsets(1, mini_batch=mini_batch))


@pytest.mark.parametrize("names", (("g",), ("m",), ("g", "m")), ids="+".join)
def test_every_decay_strong(names):
    fresh_seed()
    x = inputs("titans_linear", 2, 40)
    compare("titans_linear", x | {name: torch.full_like(x[name], -50) for name in names})


def test_reset():
    """A log decay of -inf forgets everything, and nothing becomes nan."""
    fresh_seed()
    x = {name: t.float() for name, t in inputs("titans_linear", 2, 40).items()}
    resets = {name: torch.where(torch.rand(x[name].shape) < 0.3, -torch.inf, x[name]) for name in ("g", "m")}
    finite = x | {name: t.clamp_min(-1e3) for name, t in resets.items()}
    expected = cases.run("titans_linear", {n: t.double() for n, t in finite.items()}, backend="reference")
    found = cases.run("titans_linear", x | resets, torch.float32, backend="triton")
    cases.assert_close(found, expected, 1e-5, 1e-4)


@pytest.mark.parametrize("K, V", [(128, 128), (17, 70)])
def test_widths(rule, K, V):
    """Several tiles a head, the last one ragged."""
    fresh_seed()
    compare(rule, inputs(rule, 1, 40, K=K, V=V))


@pytest.mark.parametrize("layout", ("T17", "packed-empty-sequences"))
def test_defaults(rule, layout):
    """Without a state, an offset and token_scale; and gradients of the output alone."""
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS[layout]
    x = {name: t.float() for name, t in inputs(rule, B, T, cu_seqlens).items()}
    x.pop("initial_state")
    if x.pop("token_scale", None) is not None:
        x["token_scale"] = None
    leaves = [t.requires_grad_() for t in x.values() if t is not None]
    results = []
    for backend in ("triton", "torch"):
        o, state = getattr(ops, rule)(**x, cu_seqlens=cu_seqlens, return_state=True, backend=backend)
        results.append([o, state, *torch.autograd.grad(o.square().sum(), leaves)])
    limits = [1e-5, 1e-5] + [1e-4] * len(leaves)
    assert all(rel_err(a, b) < limit for a, b, limit in zip(*results, limits))


def test_empty_sequences_without_a_gradient_of_the_state(rule, monkeypatch):
    """Memory that nobody writes holds nan here: every gradient is written all the same."""
    fresh_seed()
    cu_seqlens = torch.tensor([0, 0, 5, 5], dtype=torch.int32)
    x = {name: t.float().requires_grad_() for name, t in inputs(rule, 1, 5, cu_seqlens).items()}
    monkeypatch.setattr(torch, "empty_like", lambda t, **options: torch.full_like(t, torch.nan, **options))
    o, _ = getattr(ops, rule)(**x, cu_seqlens=cu_seqlens, backend="triton")
    gradients = torch.autograd.grad(o.sum(), list(x.values()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[-1][[0, 2]].any()


def test_exactly_causal(rule):
    fresh_seed()
    cuts = [(slice(0, t), slice(t, None)) for t in (15, 30)]
    for offset in (None, offsets(1)):
        dense = partial(getattr(ops, rule), offset=offset, backend="triton")
        cases.assert_causal(lambda dense=dense, **x: dense(**x)[0], inputs(rule, 1, 40), TOKENS, cuts)
    cu_seqlens = torch.tensor([0, 33, 33, 50, 70], dtype=torch.int32)
    cuts = [(slice(33, 40), hidden) for hidden in (slice(0, 33), slice(40, None))]
    packed = partial(getattr(ops, rule), cu_seqlens=cu_seqlens, backend="triton")
    cases.assert_causal(lambda **x: packed(**x)[0], inputs(rule, 1, 70, cu_seqlens), TOKENS, cuts)


def test_parts_equal_the_whole(rule):
    fresh_seed()
    x = {name: t.float() for name, t in inputs(rule, 2, 70).items()}
    state, seen = x.pop("initial_state"), offsets(2)
    run = partial(getattr(ops, rule), return_state=True, backend="triton")
    whole, last = run(**x, initial_state=state, offset=seen)
    cuts, parts = [0, *sorted(torch.randint(71, (5,)).tolist()), 70], []
    for start, end in pairwise(cuts):
        part = {name: t[:, start:end] if name in TOKENS else t for name, t in x.items()}
        o, state = run(**part, initial_state=state, offset=seen)
        seen = (seen + end - start) % 16
        parts.append(o)
    assert rel_err(torch.cat(parts, 1), whole) < 1e-5, f"cut at {cuts}"
    assert rel_err(state, last) < 1e-5, f"cut at {cuts}"


def test_repeats_bit_for_bit(rule):
    fresh_seed()
    x = inputs(rule, 1, 40)
    first, second = (cases.run(rule, dict(x), torch.float32, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("packed", (0, 5), ids=("dense", "packed"))
def test_compiles_once(rule, packed, monkeypatch):
    """Nothing is read back, and nothing compiled anew when lengths change: launches on meta tensors are recorded."""
    monkeypatch.setattr(api, "choose_backend", lambda *args, **options: "triton")
    found = set()
    for T, N in ((16, packed), (17, packed), (4096, 2 * packed), (100, packed and 1)):
        cu_seqlens = torch.zeros(N + 1, dtype=torch.int32, device="meta") if N else None
        shapes = inputs(rule, 1 if N else 2, 1, cu_seqlens)
        x = {n: t.expand(-1, T, *t.shape[2:]) if n in TOKENS else t for n, t in shapes.items()}
        x = {name: t.to("meta", torch.float32).requires_grad_() for name, t in x.items()}
        seen = torch.zeros(N or 2, dtype=torch.int64, device="meta")
        launch.recorded.clear()
        o, state = getattr(ops, rule)(**x, offset=seen, return_state=True, cu_seqlens=cu_seqlens)
        torch.autograd.grad(o.sum() + state.sum(), list(x.values()))
        assert launch.recorded
        builds = set()
        for kernel, _, arguments, options in launch.recorded:
            fixed = [n for n, y in zip(kernel.arg_names, arguments) if isinstance(y, int) and n not in launch.RUNTIME]
            assert not fixed, f"{kernel.__name__}: integers that Triton specialises on: {fixed}"
            types = tuple(getattr(y, "dtype", type(y)) for y in arguments)
            builds.add((kernel.__name__, types, tuple(sorted(options.items(), key=str))))
        found.add(frozenset(builds))
    launch.recorded.clear()
    assert len(found) == 1
