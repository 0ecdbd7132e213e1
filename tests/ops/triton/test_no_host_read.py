"""The Triton path reads nothing back to the host, and compiles nothing anew when lengths change.

Meta tensors have no values, so reading one raises; on them `launch` only records what it would run.
"""

import ast
from pathlib import Path

import pytest
import torch

import linear_moe.ops.triton
from linear_moe import ops
from linear_moe.mom import MoMConfig, Router, make_routes
from linear_moe.ops import api, decoding
from linear_moe.ops.sequences import Sequences
from linear_moe.ops.triton import launch
from linear_moe.ssm.core import MixerCore
from linear_moe.ssm.registry import mixer_class
from tests.ops import cases, steps

READS = {"item", "tolist", "cpu", "numpy", "nonzero", "tensor", "as_tensor", "synchronize", "unique", "masked_select"}


@pytest.fixture(autouse=True)
def on_meta(monkeypatch):
    for module in (api, decoding):
        monkeypatch.setattr(module, "choose_backend", lambda *args, **options: "triton")
    launch.recorded.clear()
    with torch.device("meta"):
        yield
    launch.recorded.clear()


def rule(name, decay, T, N):
    cu_seqlens = torch.zeros(N + 1, dtype=torch.int32) if N else None
    x = cases.inputs(name, decay, 1 if N else 2, T, cu_seqlens)
    leaves = [t.float().requires_grad_() for t in x.values()]
    o, state = getattr(ops, name)(**dict(zip(x, leaves)), return_state=True, cu_seqlens=cu_seqlens)
    torch.autograd.grad(o.sum() + state.sum(), leaves)


def step(case, T, stored):
    """The last token of a sequence whose length is in its strides, on states of R rows or in a store of T."""
    x, state = steps.draw(case, R=T if stored else 3, T=T)
    x = {n: t[:3].float() if n not in ("u", "weight", "bias") and t.ndim > 1 else t.float() for n, t in x.items()}
    state = steps.map_state(torch.Tensor.float, state)
    slots, offset = torch.zeros(3, dtype=torch.int64) if stored else None, torch.zeros(T if stored else 3).int()
    with torch.no_grad():
        ops.step(case[0], state, *steps.token(x, -1), **steps.options(case[0], offset), slots=slots)


def layer(name, memories, T, N):
    mixer = mixer_class(name)
    config = mixer.make_config(32, 2, {"num_heads": 2, "conv_size": 4})
    mom = MoMConfig(memories=memories) if memories else None
    core = MixerCore(mixer(config, 0, 2), 32, memories=mom.projections if mom else 0, device="meta")
    cu_seqlens = torch.zeros(N + 1, dtype=torch.int32) if N else None
    x, routes = torch.zeros(1 if N else 2, T, 32, requires_grad=True), None
    if mom:
        router = Router(32, memories, 2, dtype=torch.float32, device="meta")
        routes = make_routes(router(x.flatten(0, 1), lambda p: p), mom, x.shape[:2], cu_seqlens, 1.0)
    core(x, routes=routes, sequences=Sequences.of(x, cu_seqlens)).sum().backward()


def what_is_compiled(function, *args):
    """Every launch's kernel, argument types and constants."""
    launch.recorded.clear()
    function(*args)
    assert launch.recorded
    for kernel, _, arguments, _ in launch.recorded:
        fixed = [n for n, x in zip(kernel.arg_names, arguments) if isinstance(x, int) and n not in launch.RUNTIME]
        assert not fixed, f"{kernel.__name__}: integers that Triton specialises on: {fixed}"
    return {
        (
            kernel.__name__,
            tuple(getattr(x, "dtype", type(x)) for x in arguments),
            tuple(sorted(options.items(), key=str)),
        )
        for kernel, _, arguments, options in launch.recorded
    }


@pytest.mark.parametrize("packed", (0, 5), ids=("dense", "packed"))
@pytest.mark.parametrize("decay", cases.DECAYS)
@pytest.mark.parametrize("name", ("linear_attention", "delta_rule"))
def test_rules(name, decay, packed):
    sizes = ((16, packed), (17, packed), (4096, 2 * packed), (100, packed and 1))
    assert len({frozenset(what_is_compiled(rule, name, decay, *size)) for size in sizes}) == 1


@pytest.mark.parametrize("stored", (False, True), ids=("states", "store"))
@pytest.mark.parametrize("case", steps.CASES, ids=steps.IDS)
def test_steps(case, stored):
    assert len({frozenset(what_is_compiled(step, case, T, stored)) for T in (3, 10, 11, 64)}) == 1


@pytest.mark.parametrize("packed", (0, 5), ids=("dense", "packed"))
@pytest.mark.parametrize("memories", (0, 3), ids=("plain", "mom"))
@pytest.mark.parametrize("name", ("gated_deltanet", "gla", "mamba2"))
def test_layers(name, memories, packed):
    sizes = ((16, packed), (17, packed), (4096, 2 * packed), (100, packed and 1))
    assert len({frozenset(what_is_compiled(layer, name, memories, *size)) for size in sizes}) == 1


def test_sources_name_nothing_that_reads():
    """Nor what copies from the host, which a CUDA graph cannot capture."""
    folder = Path(linear_moe.ops.triton.__path__[0])
    for path in folder.glob("*.py"):
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        found = {f.attr for f in calls if isinstance(f, ast.Attribute)} & READS
        assert not found, f"{path.name} calls {found}"
