"""The fused short convolution against gather, short_conv, silu and l2_norm in torch: outputs and every gradient."""

import pytest
import torch
from torch.nn.functional import silu

from linear_moe import ops
from linear_moe.ops.norm import l2_norm
from linear_moe.ops.routing import gather, route
from linear_moe.ops.triton import conv
from linear_moe.ops.triton.conv import places, short_conv
from tests.helpers import fresh_seed, rel_err

DTYPES = {torch.float32: (1e-5, 1e-4), torch.float16: (1e-2, 1e-2)}
PACKED = {"packed": [0, 1, 1, 3, 6, 45, 45], "all-empty": [0, 0, 0], "no-sequence": [0]}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that a few rows are many segments, steps and programs."""
    small = {"TILE": 128, "L": 3, "STEPS": 2, "BD": 32, "BR": 16}

    def configure(*args):
        return {name: small.get(name, value) for name, value in tuned(*args).items()}

    tuned = conv.configure
    monkeypatch.setattr(conv, "configure", configure)


def reference(x, weight, state, *, activation, normalize, cu_seqlens, routes=None):
    if routes is not None:
        x = gather(x.flatten(0, 1), routes).unsqueeze(0)
        cu_seqlens = routes.cu_seqlens
    if weight is None:
        y, last = silu(x) if activation else x, None
    else:
        options = {"initial_state": state, "return_state": True, "cu_seqlens": cu_seqlens, "backend": "torch"}
        y, last = ops.short_conv(x, weight, activation=activation, **options)
    if normalize is not None:
        y = l2_norm(y.unflatten(-1, (-1, normalize))).flatten(2)
    return y, last


def compare(x, weight, state, dtype, *, activation, normalize, cu_seqlens=None, routes=None, with_state=False):
    """Both on the same rounded values, the torch version in float64."""
    options = {"activation": activation, "normalize": normalize}
    operands = {"x": x, "weight": weight, "state": state}
    low = {k: v if v is None else v.to(dtype, copy=True).requires_grad_() for k, v in operands.items()}
    high = {k: v if v is None else v.detach().double().requires_grad_() for k, v in low.items()}
    expected = reference(**high, **options, cu_seqlens=cu_seqlens, routes=routes)
    where = {"cu_seqlens": cu_seqlens}
    if routes is not None:
        where = {"cu_seqlens": routes.cu_seqlens, "token": routes.token, "row": routes.row}
    actual = short_conv(
        low["x"], low["weight"], initial_state=low["state"], return_state=with_state, **options, **where
    )
    forward, backward = DTYPES[dtype]
    assert actual[0].dtype == dtype
    pairs = [(a, e) for a, e in zip(actual, expected) if a is not None]
    assert all(rel_err(a, e) < forward for a, e in pairs)
    grads = [torch.randn_like(a) for a, _ in pairs]
    torch.autograd.backward([a for a, _ in pairs], grads)
    torch.autograd.backward([e for _, e in pairs], [g.double() for g in grads])
    for name in operands:
        if low[name] is not None:
            assert low[name].grad.dtype == dtype
            assert rel_err(low[name].grad, high[name].grad) < backward, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation, normalize", (("silu", 12), (None, 8), (None, None)))
@pytest.mark.parametrize("T", (0, 3, 60))
@pytest.mark.usefixtures("small_tiles")
def test_dense(T, activation, normalize, dtype):
    fresh_seed()
    compare(torch.randn(2, T, 24), torch.randn(24, 4), None, dtype, activation=activation, normalize=normalize)


@pytest.mark.parametrize("width", (1, 3, 5, None))
@pytest.mark.parametrize("layout", (None, *PACKED))
@pytest.mark.usefixtures("small_tiles")
def test_taps(layout, width):
    fresh_seed()
    cu = None if layout is None else torch.tensor(PACKED[layout], dtype=torch.int32)
    x = torch.randn(2, 9, 40) if cu is None else torch.randn(1, PACKED[layout][-1], 40)
    weight = None if width is None else torch.randn(40, width)
    compare(x, weight, None, torch.float32, activation="silu", normalize=20, cu_seqlens=cu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", (2, 20, *PACKED))
@pytest.mark.usefixtures("small_tiles")
def test_states(layout, dtype):
    fresh_seed()
    cu = None if layout not in PACKED else torch.tensor(PACKED[layout], dtype=torch.int32)
    x = torch.randn(2, layout, 20) if cu is None else torch.randn(1, PACKED[layout][-1], 20)
    weight, state = (
        torch.randn(4, 20).mT,
        torch.randn(2 if cu is None else len(cu) - 1, 3, 20).mT,
    )  # strides of any kind
    options = {"activation": "silu", "normalize": 20, "cu_seqlens": cu}
    compare(x, weight, state, dtype, **options, with_state=True)
    compare(x, weight, None, dtype, **options, with_state=True)


@pytest.mark.parametrize("cu", (None, [0, 100, 101, 101, 150]), ids=str)
def test_tuned_tiles(cu):
    fresh_seed()
    cu = None if cu is None else torch.tensor(cu, dtype=torch.int32)
    compare(
        torch.randn(1, 150, 128), torch.randn(128, 4), None, torch.float32,
        activation="silu", normalize=128, cu_seqlens=cu,
    )  # fmt: skip


def routes_of(B, T, M, k, shared, cu_seqlens=None):
    indices = torch.rand(B, T, M).argsort(-1)[..., :k]
    return route(indices, torch.rand(B, T, k), num_memories=M, shared=shared, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k, shared", ((1, False), (2, True)))
@pytest.mark.parametrize("width", (4, None))
@pytest.mark.usefixtures("small_tiles")
def test_rows_of_tokens(width, k, shared, dtype):
    fresh_seed()
    weight = None if width is None else torch.randn(16, width)
    for B, T, cu in ((2, 11, None), (1, 40, torch.tensor([0, 11, 11, 40], dtype=torch.int32))):
        routes = routes_of(B, T, 4, k, shared, cu)
        compare(torch.randn(B, T, 16), weight, None, dtype, activation="silu", normalize=16, routes=routes)


@pytest.mark.usefixtures("small_tiles")
def test_states_of_buckets():
    fresh_seed()
    routes = routes_of(2, 10, 4, 2, True)
    state = torch.randn(len(routes.cu_seqlens) - 1, 32, 3)
    options = {"activation": "silu", "normalize": 16, "routes": routes, "with_state": True}
    compare(torch.randn(2, 10, 32), torch.randn(32, 4), state, torch.float32, **options)


@pytest.mark.parametrize("normalize", (16, None))
def test_slice_of_projection_and_float_weight(normalize):
    fresh_seed()
    wide = torch.randn(2, 30, 100).half().requires_grad_()
    weight = torch.randn(48, 4, requires_grad=True)
    y, _ = short_conv(wide[..., 20:68], weight, activation="silu", normalize=normalize)
    grad = torch.randn_like(y)
    dwide, dweight = torch.autograd.grad(y, (wide, weight), grad)
    copied, _ = short_conv(wide[..., 20:68].contiguous(), weight, activation="silu", normalize=normalize)
    assert torch.equal(y, copied)
    assert dweight.dtype == torch.float32
    x, w = wide.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected, _ = reference(x[..., 20:68], w, None, activation="silu", normalize=normalize, cu_seqlens=None)
    for a, e in zip((dwide, dweight), torch.autograd.grad(expected, (x, w), grad.double())):
        assert rel_err(a, e) < 1e-2


def test_transposed_input_is_copied():
    fresh_seed()
    x, weight = torch.randn(2, 48, 30).mT, torch.randn(48, 4)
    assert rel_err(short_conv(x, weight)[0], ops.short_conv(x, weight, activation=None)[0]) < 1e-5


def test_places():
    fresh_seed()
    for N in (0, 1, 2, 7, 300):
        lengths = torch.randint(0, 4, (N,))
        cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
        place = torch.cat([torch.arange(n) for n in lengths] or [torch.arange(0)])
        sequence = torch.arange(N).repeat_interleave(lengths)
        assert torch.equal(places(cu, int(cu[-1])), torch.stack([place, sequence]).int())


def test_on_meta_tensors():
    routes = [torch.empty(24, dtype=torch.int64, device="meta"), torch.empty(8, 3, dtype=torch.int64, device="meta")]
    x = torch.empty(2, 4, 32, device="meta", requires_grad=True)
    weight = torch.empty(32, 4, device="meta", requires_grad=True)
    cu = torch.empty(11, dtype=torch.int32, device="meta")
    y, _ = short_conv(x, weight, activation="silu", normalize=16, cu_seqlens=cu, token=routes[0], row=routes[1])
    assert y.shape == (1, 24, 32)
    assert [g.shape for g in torch.autograd.grad(y.sum(), (x, weight))] == [x.shape, weight.shape]
