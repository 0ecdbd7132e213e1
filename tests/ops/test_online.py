"""TTT-Linear and Titans in torch against the loop over tokens, and the loop against independent evaluations."""

import re
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import layer_norm, normalize

from linear_moe import ops
from linear_moe.ops import online
from linear_moe.ops.reference import norm_loss_gradient
from tests.helpers import fresh_seed, rel_err
from tests.ops import cases

H, K, V = 2, 8, 12
LAYOUTS = cases.layouts((0, 1, 15, 16, 17, 70))
RULES = ("ttt_linear", "titans_linear")
TOKENS = {"q", "k", "v", "eta", "token_scale", "theta", "g", "m"}


def inputs(rule, B, T, cu_seqlens=None, *, strong=True, K=K, V=V, H=H):
    """{name: float64 tensor} of a rule's differentiable operands. Strong decays mix up to -50 with about -0.1."""
    N, D = B if cu_seqlens is None else len(cu_seqlens) - 1, V
    K = D if rule == "ttt_linear" else K
    x = {"q": torch.randn(B, T, H, K), "k": normalize(torch.randn(B, T, H, K), dim=-1), "v": torch.randn(B, T, H, V)}
    if rule == "ttt_linear":
        x |= {"eta": 0.2 * torch.rand(B, T, H), "token_scale": torch.rand(B, T, H)}
        x |= {"weight": 1 + 0.2 * torch.randn(H, D), "bias": 0.2 * torch.randn(H, D)}
        x["initial_state"] = 0.3 * torch.randn(N, H, 2, D + 1, D)
    else:
        x["theta"] = 0.5 * torch.rand(B, T, H)
        for name in ("g", "m"):
            g = -0.2 * torch.rand(B, T, H)
            x[name] = torch.where(torch.rand(B, T, H) < 0.1, 250 * g, g) if strong else g
        x["initial_state"] = torch.randn(N, H, 3, K, V)
    return {name: tensor.double() for name, tensor in x.items()}


def offsets(B, cu_seqlens=None, mini_batch=16):
    return torch.randint(mini_batch, (B if cu_seqlens is None else len(cu_seqlens) - 1,))


def assert_matches_loop(rule, x, **options):
    """In float64 and in float32."""
    reference = cases.run(rule, dict(x), backend="reference", **options)
    cases.assert_close(cases.run(rule, dict(x), backend="torch", **options), reference, 1e-11, 1e-11)
    cases.assert_close(cases.run(rule, dict(x), torch.float32, backend="torch", **options), reference, 1e-5, 1e-4)


@pytest.fixture(params=RULES)
def rule(request):
    return request.param


@pytest.mark.parametrize("offset", (False, True), ids=("whole", "offset"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_loop(rule, layout, offset):
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS[layout]
    seen = offsets(B, cu_seqlens) if offset else None
    assert_matches_loop(rule, inputs(rule, B, T, cu_seqlens), cu_seqlens=cu_seqlens, offset=seen)


@pytest.mark.parametrize("layout", cases.PACKED)
def test_packed_without_reading_lengths(rule, monkeypatch, layout):
    """The layout of a GPU, where lengths stay on the device."""
    monkeypatch.setattr(online, "Layout", partial(online.Layout, read_lengths=False))
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS[layout]
    x = inputs(rule, B, T, cu_seqlens)
    for seen in (None, offsets(B, cu_seqlens)):
        assert_matches_loop(rule, x, cu_seqlens=cu_seqlens, offset=seen)


@pytest.mark.parametrize("packed", (False, True), ids=("dense", "packed"))
def test_reads_nothing_from_a_device(rule, packed):
    """Meta tensors have no values: reading one raises."""
    cu_seqlens = torch.zeros(5, dtype=torch.int32, device="meta") if packed else None
    x = {name: t.to("meta").requires_grad_() for name, t in inputs(rule, 1 if packed else 2, 40, cu_seqlens).items()}
    for seen in (None, torch.zeros(4 if packed else 2, dtype=torch.int64, device="meta")):
        o, state = getattr(ops, rule)(**x, cu_seqlens=cu_seqlens, offset=seen, return_state=True, backend="torch")
        torch.autograd.grad(o.sum() + state.sum(), list(x.values()))


@pytest.mark.parametrize("mini_batch", (1, 5, 32))
def test_other_mini_batches(rule, mini_batch):
    fresh_seed()
    seen = offsets(2, mini_batch=mini_batch)
    assert_matches_loop(rule, inputs(rule, 2, 40), mini_batch=mini_batch, offset=seen)


def test_defaults(rule):
    """No state is zeros, no token_scale is ones, and scale multiplies the queries."""
    fresh_seed()
    x = inputs(rule, 2, 20)
    zeros, given = torch.zeros_like(x.pop("initial_state")), dict(x)
    if rule == "ttt_linear":
        x["token_scale"], given["token_scale"] = None, torch.ones_like(x["eta"])
    given["q"] = 0.3 * x["q"]
    for backend in ("torch", "reference"):
        o, state = getattr(ops, rule)(**x, scale=0.3, backend=backend)
        assert state is None
        expected, _ = getattr(ops, rule)(**given, initial_state=zeros, scale=1.0, backend=backend)
        assert rel_err(o, expected) < 1e-12
        default, _ = getattr(ops, rule)(**x, backend=backend)
        assert rel_err(default, getattr(ops, rule)(**x, scale=x["k"].shape[-1] ** -0.5)[0]) < 1e-12


@pytest.mark.parametrize("names", (("g",), ("m",), ("g", "m")), ids="+".join)
def test_every_decay_strong(names):
    fresh_seed()
    x = inputs("titans_linear", 2, 40)
    assert_matches_loop("titans_linear", x | {name: torch.full_like(x[name], -50) for name in names})


def test_reset():
    """A log decay of -inf forgets everything, and nothing becomes nan."""
    fresh_seed()
    x = inputs("titans_linear", 2, 40)
    resets = {name: torch.where(torch.rand(x[name].shape) < 0.3, -torch.inf, x[name]) for name in ("g", "m")}
    expected = cases.run("titans_linear", x | {n: t.clamp_min(-1e3) for n, t in resets.items()}, backend="reference")
    cases.assert_close(cases.run("titans_linear", x | resets, backend="torch"), expected, 1e-11, 1e-11)


def test_bf16(rule):
    """bf16 operands against the loop in float64 on the same rounded operands: only the output is rounded, and its
    gradient, in sums of which terms cancel."""
    fresh_seed()
    x = inputs(rule, 2, 100)
    x |= {name: x[name].bfloat16().double() for name in ("q", "k", "v")}
    cases.assert_close(cases.run(rule, x, torch.bfloat16), cases.run(rule, x, backend="reference"), 1e-2, 2e-2)


def test_gradcheck(rule):
    fresh_seed()
    cu_seqlens = torch.tensor([0, 0, 3, 4, 21], dtype=torch.int32)
    x, seen = inputs(rule, 1, 21, cu_seqlens, strong=False), offsets(1, cu_seqlens)

    def function(*tensors):
        options = {"return_state": True, "cu_seqlens": cu_seqlens, "offset": seen}
        return getattr(ops, rule)(**dict(zip(x, tensors)), **options)

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in x.values()], fast_mode=True)


def test_exactly_causal(rule):
    fresh_seed()
    cuts = [(slice(0, t), slice(t, None)) for t in (1, 16, 30, 31, 60)]
    for offset in (None, offsets(2)):
        dense = partial(getattr(ops, rule), offset=offset)
        cases.assert_causal(lambda dense=dense, **x: dense(**x)[0], inputs(rule, 2, 70), TOKENS, cuts)
    cu_seqlens = torch.tensor([0, 33, 33, 50, 90], dtype=torch.int32)
    cuts = [(slice(33, 40), hidden) for hidden in (slice(0, 33), slice(40, None))]
    cuts += [(slice(0, 33), slice(33, None)), (slice(50, 90), slice(0, 50))]
    packed = partial(getattr(ops, rule), cu_seqlens=cu_seqlens)
    cases.assert_causal(lambda **x: packed(**x)[0], inputs(rule, 1, 90, cu_seqlens), TOKENS, cuts)


@pytest.mark.parametrize("backend", ("torch", "reference"))
def test_parts_equal_the_whole(rule, backend):
    """Cut anywhere: the state and how far its mini-batch got are all that a part needs."""
    fresh_seed()
    x = inputs(rule, 2, 70)
    state, seen = x.pop("initial_state"), offsets(2)
    run = partial(getattr(ops, rule), return_state=True, backend=backend)
    whole, last = run(**x, initial_state=state, offset=seen)
    cuts, parts = [0, *sorted(torch.randint(71, (5,)).tolist()), 70], []
    for start, end in pairwise(cuts):
        part = {name: t[:, start:end] if name in TOKENS else t for name, t in x.items()}
        o, state = run(**part, initial_state=state, offset=seen)
        seen = (seen + end - start) % 16
        parts.append(o)
    assert rel_err(torch.cat(parts, 1), whole) < 1e-12, f"cut at {cuts}"
    assert rel_err(state, last) < 1e-12, f"cut at {cuts}"


def test_gradient_of_the_loss():
    """The closed form against autograd through torch's own layer norm."""
    fresh_seed()
    z, target = torch.randn(2, 5, 12, dtype=torch.float64).requires_grad_()
    weight, bias = torch.randn(2, 12, dtype=torch.float64)
    loss = 0.5 * (layer_norm(z, (12,), weight, bias, eps=1e-6) - target).square().sum()
    assert rel_err(norm_loss_gradient(z, target, weight, bias, 1e-6), torch.autograd.grad(loss, z)[0]) < 1e-12


def test_ttt_agrees_with_fla():
    """What fla calls eta is token_scale, and eta is 1; its output ends with a layer norm and a residual, applied here.

    It ends the last mini-batch early, filled up with tokens of zeros, which spoil its bias (not the weights).
    """
    naive = pytest.importorskip("fla.ops.ttt.naive", reason="flash-linear-attention (fla) is not installed")
    fresh_seed()
    x = {name: t.float() for name, t in inputs("ttt_linear", 2, 70).items()}
    state, W = x.pop("initial_state"), x["weight"].shape[-1]
    state[:, :, 1] = 0
    expected, h, _ = naive.chunk_ttt_linear_ref(
        *(x[name].clone() for name in ("q", "k", "v", "weight", "bias")),
        x["token_scale"].unsqueeze(-1).clone(),
        initial_state=state[:, :, 0, :-1].clone(),
        initial_state_bias=state[:, :, 0, -1:].clone(),
        output_final_state=True,
    )
    for backend in ("torch", "reference"):
        given = x | {"eta": torch.ones_like(x["eta"])}
        o, last = ops.ttt_linear(**given, initial_state=state, return_state=True, backend=backend)
        o = o + layer_norm(o, (W,), eps=1e-6) * x["weight"] + x["bias"]
        assert rel_err(o, expected) < 1e-5
        ended = last[:, :, 0] - x["token_scale"][:, -1, :, None, None] * last[:, :, 1]
        assert rel_err(ended[:, :, :-1], h) < 1e-5


@pytest.mark.parametrize("backend", ("torch", "reference"))
def test_titans_dense(backend):
    """Without any recurrence: all tokens' writes by one triangular system, with every coefficient a product of decays.

    fla's own naive form is no witness: its loss has a layer norm, and one of its brackets is misplaced.
    """
    fresh_seed()
    T = 50
    x = inputs("titans_linear", 1, T, strong=False)
    del x["initial_state"]
    o, _ = ops.titans_linear(**x, backend=backend)
    q, k, v, theta, g, m = (x[name][0].movedim(1, 0) for name in ("q", "k", "v", "theta", "g", "m"))  # [H, T, ...]
    keep, momentum = torch.ones(H, T, T).double().tril(), torch.ones(H, T, T).double().tril()
    for t in range(T):
        for i in range(t):
            keep[:, t, i] = g[:, i + 1 : t + 1].exp().prod(1)
            momentum[:, t, i] = m[:, i + 1 : t + 1].exp().prod(1)
    c = keep @ momentum  # of the write j in the memory at t
    start = torch.arange(T) // 16 * 16
    at_start = torch.where(
        (start > 0)[:, None], c[:, start - 1], 0
    )  # in the memory that token t's gradient is taken at
    system = torch.eye(T) + theta[..., None] * at_start * (k @ k.mT)
    u = torch.linalg.solve(system, theta[..., None] * v)
    expected = K**-0.5 * (c * (q @ k.mT)) @ u
    assert rel_err(o[0].movedim(1, 0), expected) < 1e-12


@pytest.mark.parametrize("dtype, kept", ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)))
def test_dtypes(rule, dtype, kept):
    x = inputs(rule, 2, 5)
    x |= {name: x[name].to(dtype) for name in ("q", "k", "v")}
    o, state = getattr(ops, rule)(**x, return_state=True)
    assert (o.dtype, state.dtype) == (dtype, kept)


def test_autocast_changes_nothing(rule):
    fresh_seed()
    x = {name: tensor.float() for name, tensor in inputs(rule, 1, 40).items()}
    expected, _ = getattr(ops, rule)(**x)
    with torch.autocast("cpu", torch.bfloat16):
        o, _ = getattr(ops, rule)(**x)
    assert torch.equal(o, expected)


BAD = {
    "q-shape": ({"q": torch.zeros(1, 6, 2, 7)}, "q must be [B, T, H, K] = [1, 6, 2, {K}], not [1, 6, 2, 7]"),
    "k-missing": ({"k": None}, "k must be a tensor [B, T, H, K]"),
    "v-shape": ({"v": torch.zeros(6, 2, 12)}, "v must be a tensor [B, T, H, V]"),
    "k-dtype": ({"v": torch.zeros(1, 6, 2, 12)}, "q, k, v must share a dtype"),
    "gate": ({"eta": torch.zeros(1, 6), "theta": torch.zeros(1, 6)}, "must be [B, T, H] = [1, 6, 2], not [1, 6]"),
    "state": ({"initial_state": torch.zeros(1, 2, 8, 12)}, "initial_state must be [N, H, {n}"),
    "offset-shape": (
        {"offset": torch.zeros(2, dtype=torch.int64)},
        "offset must be an int32 or int64 tensor [N] = [1]",
    ),
    "offset-dtype": ({"offset": torch.zeros(1)}, "offset must be an int32 or int64 tensor [N] = [1]"),
    "offset": ({"offset": torch.tensor([16])}, "offset must be at least 0 and below mini_batch (16): [16]"),
    "mini-batch": ({"mini_batch": 0}, "mini_batch (0) must be at least 1"),
    "cu_seqlens": ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "cu_seqlens must run from 0 to T (6)"),
    "backend": ({"backend": "cuda"}, "backend ('cuda') must be one of ['auto', 'triton', 'torch', 'reference']"),
}


@pytest.mark.parametrize("bad", BAD)
def test_refuses(rule, bad):
    change, message = BAD[bad]
    x, ttt = inputs(rule, 1, 6), rule == "ttt_linear"
    for name in {"eta", "theta"} & change.keys() - x.keys():
        change = {n: t for n, t in change.items() if n != name}
    message = message.format(K=V if ttt else K, n="2, D + 1, D]" if ttt else "3, K, V]")
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(ops, rule)(**x | change)


def test_refuses_weights():
    x = inputs("ttt_linear", 1, 6)
    with pytest.raises(ValueError, match=re.escape("weight must be [H, V] = [2, 12], not [12]")):
        ops.ttt_linear(**x | {"weight": torch.ones(12)})


def test_kernels_refuse(rule):
    """Where the kernels cannot run, backend "triton" says why."""
    with pytest.raises(ValueError, match="its kernels take heads of at most 128 channels, not 130"):
        getattr(ops, rule)(**inputs(rule, 1, 1, V=130), backend="triton")
    with pytest.raises(ValueError, match="its kernels take mini-batches of at most 64 tokens, not 65"):
        getattr(ops, rule)(**inputs(rule, 1, 1), mini_batch=65, backend="triton")
