"""Which code runs an op, and what a user is told where it cannot be the kernels."""

import re
import warnings
from types import SimpleNamespace

import pytest
import torch
import triton

from linear_moe import ops
from linear_moe.ops import backend
from linear_moe.ops.triton import launch


def on_gpu(dtype=torch.bfloat16):
    """What choose_backend looks at of a tensor on a GPU."""
    return SimpleNamespace(device=torch.device("cuda"), dtype=dtype)


def test_triton_on_gpus_torch_elsewhere():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.choose_backend("op", "auto", on_gpu(), 256, 17) == "triton"
        assert backend.choose_backend("op", "auto", torch.zeros(1)) == "torch"
        assert backend.choose_backend("op", "torch", on_gpu()) == "torch"


@pytest.mark.parametrize(
    "x, widths, reason",
    [(on_gpu(torch.float64), (), "not torch.float64"), (on_gpu(), (64, 300), "256 channels, not 300")],
)
def test_falls_back_with_one_warning(x, widths, reason):
    backend._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=f"delta_rule falls back to torch.*{reason}"):
        assert backend.choose_backend("delta_rule", "auto", x, *widths) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.choose_backend("delta_rule", "auto", x, *widths) == "torch"
    with pytest.raises(ValueError, match=f"delta_rule: backend 'triton' cannot run: .*{reason}"):
        backend.choose_backend("delta_rule", "triton", x, *widths)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the package triton is not installed"):
        backend.choose_backend("op", "triton", on_gpu())


@pytest.mark.parametrize("version", ("3.4.0", "3.6.0", "3.7.1", "3.7.0+git1234"))
def test_hopper_refuses_a_triton_that_compiles_wrong_code(monkeypatch, version):
    backend.check_compiler.cache_clear()
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.delenv(backend.UNSAFE, raising=False)
    for name in ("auto", "triton"):
        with pytest.raises(ValueError, match=re.escape(f"Triton {version} compiles wrong code for Hopper")) as error:
            backend.choose_backend("op", name, on_gpu())
    assert all(word in str(error.value) for word in ("triton>=3.8", "torch 2.11", "backend='torch'", backend.UNSAFE))
    assert "\n" not in str(error.value)
    assert backend.choose_backend("op", "torch", on_gpu()) == "torch"


@pytest.mark.parametrize(
    "version, capability, allowed", [("3.8.0", (9, 0), ""), ("3.6.0", (8, 0), ""), ("3.6.0", (9, 0), "1")]
)
def test_others_run(monkeypatch, version, capability, allowed):
    backend.check_compiler.cache_clear()
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    monkeypatch.setenv(backend.UNSAFE, allowed)
    assert backend.choose_backend("op", "auto", on_gpu()) == "triton"


@pytest.fixture(autouse=True)
def forget_the_compiler():
    yield
    backend.check_compiler.cache_clear()


def test_kernels_on_the_cpu_want_the_interpreter(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        ops.linear_attention(*torch.randn(3, 1, 4, 1, 8), backend="triton")


def test_a_differentiated_step_is_refused():
    state, (q, k, v) = torch.zeros(1, 1, 8, 8, requires_grad=True), torch.randn(3, 1, 1, 8)
    with pytest.raises(ValueError, match=re.escape("decode under torch.no_grad()")):
        ops.step("linear_attention", state, q, k, v, backend="triton")
    with torch.no_grad():
        ops.step("linear_attention", state, q, k, v, backend="triton")


@pytest.mark.parametrize(
    "call",
    [
        lambda meta: ops.short_conv(torch.zeros(1, 4, 8), meta(8, 4)),
        lambda meta: ops.grouped_linear(torch.zeros(4, 8), meta(2, 6, 8), torch.zeros(2, dtype=torch.int32)),
        lambda meta: ops.gated_norm(torch.zeros(4, 2, 8), meta(8), eps=1e-5),
        lambda meta: ops.gated_norm(torch.zeros(4, 2, 8), torch.ones(8), meta(4, 2, 8), eps=1e-5),
    ],
    ids=("conv", "grouped", "norm", "gate"),
)
def test_one_device(call):
    with pytest.raises(ValueError, match="must be on one device"):
        call(lambda *shape: torch.zeros(shape, device="meta"))
