"""The layer benchmark on the CPU: errors are checked, times say nothing."""

import torch

from linear_moe.measure import layer_benchmark as benchmark
from tests.helpers import fresh_seed


def test_table_and_checks(capsys, monkeypatch):
    fresh_seed()
    monkeypatch.setattr(benchmark, "SIZES", [benchmark.Size(4, 2048, 32, 64)])
    benchmark.mom(repeats=1, device="cpu", scale=1 / 32)
    out = capsys.readouterr().out
    assert "| write projections, gather and F.grouped_mm " in out
    for name in ("ours MoM", "ours plain", "ours MoM, recompute"):
        assert f"| {name} " in out and f"ok   2/64/1/64 {name}: errors" in out


def test_saved_bytes_count_a_storage_once():
    class Square(torch.nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y * y.view(-1).view_as(y)

    x = torch.randn(8, 4)
    assert benchmark.saved_bytes(benchmark.Side("", Square(4, 16)), x) == x.nbytes + 8 * 16 * 4
