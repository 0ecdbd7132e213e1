"""The kernel benchmark on the CPU, where its times say nothing."""

import pytest

from linear_moe.measure import h200, peers
from linear_moe.measure import kernel_benchmark as benchmark
from linear_moe.measure.timing import MODES
from tests.helpers import fresh_seed


@pytest.fixture(autouse=True)
def seeded():
    fresh_seed()


@pytest.mark.parametrize("rule", ("retention", "kda"))
def test_table(capsys, monkeypatch, rule):
    monkeypatch.setattr(benchmark, "SIZES", [benchmark.Size(4, 2048, 16, 64)])
    monkeypatch.setattr(benchmark, "REFERENCE_TOKENS", 20)
    assert benchmark.kernels(repeats=1, rules=[rule], device="cpu", scale=1 / 64) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"| {rule}") and "2/32/1/64" in lines[-1]


def test_unknown_rule():
    with pytest.raises(ValueError, match=r"rules \(foo\) must be among linear_attention, "):
        benchmark.kernels(rules=["foo"], device="cpu")


def test_decode():
    rule = next(rule for rule in benchmark.RULES if rule.name == "gated_deltanet")
    assert benchmark.decode_speed(rule, benchmark.Size(2, 0, 1, 64), context=20, repeats=1, device="cpu", steps=2) > 0


def test_packed_inputs_and_grouped_heads():
    size = benchmark.Size(3, 16, 2, 16, HV=4, packed=True)
    rule = next(rule for rule in benchmark.RULES if rule.name == "gated_deltanet")
    inputs = benchmark.draw(rule, size, "cpu", benchmark.torch.float32)
    assert benchmark.ours(rule, size, "cpu", "torch")(*inputs.values()).shape == (1, 48, 4, 16)
    assert str(size) == "3/16/2:4/16 packed"


def test_floor_is_the_longer_of_bytes_and_flops():
    x = benchmark.torch.zeros(1000, requires_grad=True)
    none = dict.fromkeys(MODES, 0)
    moved = h200.floor([x], x, none)
    assert moved["forward"] == pytest.approx(1e3 * 8000 / h200.BANDWIDTH)
    assert moved["both"] == pytest.approx(moved["forward"] + moved["backward"])
    assert h200.floor([x], x, none | {"both": 790e12})["both"] == pytest.approx(1e3)


def test_a_missing_peer_names_the_extra():
    with pytest.raises(ImportError, match=r"linear-moe\[peers\]"):
        peers.load("no_such_module:function", "fla")
