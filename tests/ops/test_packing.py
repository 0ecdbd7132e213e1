"""cu_seqlens of every op: rows that no sequence holds are refused, on every backend, and int64 is as good as int32."""

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from linear_moe import ops
from linear_moe.ops import api
from linear_moe.ops.triton import launch

T, H, D = 9, 2, 16
BORDERS = [0, 4, 4, T]


def draw(*size):
    return torch.randn(size)


def decay(*size):
    return -torch.rand(size)


def heads(count):
    return [draw(1, T, H, D) for _ in range(count)]


OPS = {
    "linear_attention": lambda **o: ops.linear_attention(*heads(3), **o),
    "delta_rule": lambda **o: ops.delta_rule(*heads(3), torch.rand(1, T, H), **o),
    "dplr": lambda **o: ops.dplr(*heads(5), decay(1, T, H, D), **o),
    "rwkv6": lambda **o: ops.rwkv6(*heads(3), decay(1, T, H, D), draw(H, D), **o),
    "gsa": lambda **o: ops.gsa(*heads(4), decay(1, T, H, D), **o),
    "ttt_linear": lambda **o: ops.ttt_linear(*heads(3), torch.rand(1, T, H), None, draw(H, D), draw(H, D), **o),
    "titans_linear": lambda **o: ops.titans_linear(*heads(3), torch.rand(1, T, H), decay(1, T, H), decay(1, T, H), **o),
    "short_conv": lambda **o: ops.short_conv(draw(1, T, D), draw(D, 4), **o),
    "route": lambda **o: routed(**o),
    "token_shift": lambda backend=None, **o: ops.token_shift(draw(1, T, D), **o),
}


def routed(**options):
    indices = torch.tensor([0, 1, 2] * 3).view(1, T, 1)
    routes = ops.route(indices, torch.rand(1, T, 1), num_memories=3, shared=True, **options)
    return routes.row, routes.cu_seqlens


def run(name, borders, backend, dtype=torch.int32):
    torch.manual_seed(0)
    return OPS[name](cu_seqlens=torch.tensor(borders, dtype=dtype), backend=backend)


@pytest.mark.parametrize("backend", ("torch", "triton", "reference"))
@pytest.mark.parametrize("name", OPS)
def test_refused(name, backend):
    for borders in ([0, 4, T - 1], [0, 4, T + 1], [1, T], [0, 6, 4, T]):
        message = f"{name}: cu_seqlens must run from 0 to T ({T}) and not decrease: {borders}"
        with pytest.raises(ValueError, match=re.escape(message)):
            run(name, borders, backend)


@pytest.mark.parametrize("name", OPS)
def test_int64(name):
    ours, expected = (run(name, BORDERS, "torch", dtype)[0] for dtype in (torch.int64, torch.int32))
    assert torch.equal(ours, expected) and not ours.isnan().any()


@pytest.mark.parametrize("name", [name for name in OPS if name != "token_shift"])
def test_kernels_get_int32(monkeypatch, name):
    monkeypatch.setattr(api, "choose_backend", lambda *args, **options: "triton")
    launch.recorded.clear()
    with torch.device("meta"):
        OPS[name](cu_seqlens=torch.zeros(4, dtype=torch.int64))
    seen = {x.dtype for _, _, args, _ in launch.recorded for x in args if torch.is_tensor(x) and [*x.shape] == [4]}
    launch.recorded.clear()
    assert seen == {torch.int32}


class Assertions(TorchDispatchMode):
    """Notes what the device is asked to assert."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._assert_async.msg:
            self.messages.append(args[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize("name", OPS)
def test_a_device_asserts_it_once(monkeypatch, name, backend):
    """Meta tensors have no values: reading one would raise."""
    monkeypatch.setattr(api, "choose_backend", lambda *args, **options: backend)
    with torch.device("meta"), Assertions() as device:
        cu_seqlens = torch.zeros(3, dtype=torch.int32)
        OPS[name](cu_seqlens=cu_seqlens, backend=backend)
        assert device.messages == [f"{name}: cu_seqlens must run from 0 to T ({T}) and not decrease"]
        OPS[name](cu_seqlens=cu_seqlens, backend=backend)
        assert len(device.messages) == 1
        cu_seqlens.zero_()  # may be other borders now
        OPS[name](cu_seqlens=cu_seqlens, backend=backend)
        assert len(device.messages) == 2


def test_offsets_of_groups(monkeypatch):
    x, weight = draw(T, D), draw(2, 6, D)
    for ends in ([4, T - 1], [6, 4], [-1, T]):
        message = f"grouped_linear: offsets must end at the number of rows ({T}) and not decrease: {ends}"
        with pytest.raises(ValueError, match=re.escape(message)):
            ops.grouped_linear(x, weight, torch.tensor(ends, dtype=torch.int32))
    monkeypatch.setattr(api, "choose_backend", lambda *args, **options: "triton")
    with torch.device("meta"), Assertions() as device:
        ops.grouped_linear(draw(T, D), draw(2, 6, D), torch.zeros(2, dtype=torch.int32))
    assert device.messages == [f"grouped_linear: offsets must end at the number of rows ({T}) and not decrease"]


def test_what_routing_made_is_not_asserted_again(monkeypatch):
    monkeypatch.setattr(api, "choose_backend", lambda *args, **options: "triton")
    with torch.device("meta"), Assertions() as device:
        indices = torch.zeros(1, T, 1, dtype=torch.int64)
        routes = ops.route(indices, torch.rand(1, T, 1), num_memories=3, shared=False)
        ops.grouped_linear(draw(T, D), draw(3, 6, D), routes.memory_offsets, routes=routes)
        ops.linear_attention(*heads(3), cu_seqlens=routes.cu_seqlens)
    assert device.messages == []
