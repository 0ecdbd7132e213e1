"""The benchmark runs on short sequences, and names the extra it needs."""

import sys

import pytest

from linear_moe.measure import torch_benchmark as benchmark
from tests.helpers import fresh_seed


def test_runs(capsys):
    pytest.importorskip("transformers")
    fresh_seed()
    benchmark.run(repeats=1, scale=1 / 64)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("delta_rule T=64") for line in lines)
    assert any(line.startswith("linear_attention T=128") for line in lines)
    for rule in benchmark.LOOPS:
        assert any(line.startswith(f"{rule} T=64") and "the loop" in line for line in lines)


def test_missing_transformers_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.models.qwen3_next.modeling_qwen3_next", None)
    with pytest.raises(ImportError, match=r"linear-moe\[hf\]"):
        benchmark.run(repeats=1, scale=1 / 64)
