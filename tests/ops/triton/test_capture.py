"""What a CUDA graph cannot capture, as far as it shows without a GPU: other devices and streams, graphs left over."""

import ast
import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import linear_moe
from linear_moe.mom import MoMConfig, Router, make_routes
from linear_moe.ops import api
from linear_moe.ops.sequences import Sequences
from linear_moe.ops.triton import launch
from linear_moe.ssm import MIXERS, mixer_class
from linear_moe.ssm.core import MixerCore

HIDDEN = 32


def layer(name, memories, device):
    """Function of x and cu_seqlens, and its parameters."""
    mixer, mom = mixer_class(name), MoMConfig(memories=memories) if memories else None
    options = {"num_heads": 2, "num_value_heads": 2, "head_dim": 16, "value_head_dim": 16}
    core = MixerCore(
        mixer(mixer.make_config(HIDDEN, 2, options), 1, 3),
        HIDDEN, memories=mom.projections if mom else 0, device=device,
    )  # fmt: skip
    router = Router(HIDDEN, memories, 2, dtype=torch.float32, device=device) if mom else None

    def run(x, cu_seqlens):
        routes = None
        if mom:
            routes = make_routes(router(x.flatten(0, 1)), mom, x.shape[:2], cu_seqlens, 1.0)
        return core(x, routes=routes, sequences=Sequences.of(x, cu_seqlens))

    return run, [*core.parameters(), *(router.parameters() if mom else ())], core


class OneDevice(TorchDispatchMode):
    """Notes every operation with a tensor elsewhere: a copy from the host cannot be captured."""

    def __init__(self, device):
        super().__init__()
        self.device, self.wrong = device, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if any(x.device.type != self.device for x in tensors):
            self.wrong.add(str(function))
        return result


@pytest.mark.parametrize("packed", (False, True), ids=("dense", "packed"))
@pytest.mark.parametrize("memories", (0, 3), ids=("plain", "mom"))
@pytest.mark.parametrize("name", MIXERS)
def test_every_tensor_is_on_the_device(monkeypatch, name, memories, packed):
    """Meta tensors stand for the GPU's, so what is made from Python numbers without a device shows."""
    monkeypatch.setattr(api, "choose_backend", lambda *args, **options: "triton")
    run, parameters, _ = layer(name, memories, "meta")
    x = torch.empty(1 if packed else 2, 40, HIDDEN, device="meta", requires_grad=True)
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta") if packed else None
    with OneDevice("meta") as mode:
        y = run(x, cu_seqlens)
        torch.autograd.grad(y, [x, *parameters], torch.empty_like(y), allow_unused=True)
    launch.recorded.clear()
    assert not mode.wrong
    with mode:
        torch.ones(1)
    assert mode.wrong == {"aten.ones.default"}


class Marked(torch.autograd.Function):
    """The identity, whose node is seen to die."""

    @staticmethod
    def forward(ctx, x, alive):
        ctx.mark = type("Mark", (), {})()
        alive.append(weakref.ref(ctx.mark))
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@pytest.mark.parametrize(
    "name, backend",
    [("gated_deltanet", "torch"), ("gla", "torch"), ("rwkv7", "torch"), ("gated_deltanet", "triton")],
)
def test_no_autograd_node_outlives_a_run(monkeypatch, name, backend):
    """A leaf's node keeps the stream of the first run that is still held, and a capture on another one fails."""
    monkeypatch.setattr(api, "choose_backend", lambda *args, **options: backend)
    run, _, core = layer(name, 3, "cpu")
    core.initialize(lambda w: torch.nn.init.normal_(w, std=0.2))
    x, alive = torch.randn(1, 20, HIDDEN, requires_grad=True), []
    gc.disable()
    try:
        y = run(Marked.apply(x, alive), None)
        assert alive[0]() is not None
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        del y
        assert alive[0]() is None and dx.shape == x.shape
    finally:
        gc.enable()


def test_no_source_names_a_stream():
    """Everything runs on the current one."""
    folder = Path(linear_moe.__file__).parent
    paths = [p for part in ("ops", "ssm", "mom") for p in (folder / part).rglob("*.py")]
    assert len(paths) > 40
    for path in paths:
        if path.name in ("measure.py",):  # captures graphs itself
            continue
        named = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
        assert not named & {"Stream", "stream", "default_stream", "ExternalStream", "wait_stream"}, path
