"""A peer's autotuning in shares."""

from types import SimpleNamespace

import pytest
import triton.testing
from triton.runtime.autotuner import Autotuner

from linear_moe.measure import peers


@pytest.mark.parametrize("count", (1, 7))
def test_shares_are_all_configurations(monkeypatch, count):
    configurations = [f"configuration {i}" for i in range(count)]
    tuner = SimpleNamespace(configs=configurations)
    found = []
    for share in range(3):
        with monkeypatch.context() as patched:
            patched.setattr(Autotuner, "prune_configs", lambda self, kwargs: self.configs)
            peers.keep_share(share, 3)
            found.append(Autotuner.prune_configs(tuner, {}))
    assert {name for some in found for name in some} == {*configurations}
    assert all(found)  # autotuning without any configuration would fail
    assert sum(map(len, found)) == max(count, 3)


def test_short_tuning(monkeypatch):
    called = []
    monkeypatch.setattr(triton.testing, "do_bench", lambda function, **options: called.append(options))
    for _ in range(2):  # every task of a process asks for it
        peers.shorten_tuning()
    triton.testing.do_bench(None, warmup=25, rep=100, quantiles=(0.5,))
    assert called == [{"warmup": peers.WARM_UP, "rep": peers.REPEATS, "quantiles": (0.5,)}]
