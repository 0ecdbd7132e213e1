"""What a segment does to a state, on kernels interpreted on the CPU, against the loop over tokens."""

import pytest
import torch

from linear_moe.ops.triton import launch, problem
from tests.helpers import fresh_seed
from tests.ops import cases, composed
from tests.ops.summaries import every_rule, inputs, results, summary_by_loop, summary_of

LAYOUTS = cases.layouts(
    (0, 70), {name: cases.PACKED[name] for name in ("packed-empty-sequences", "packed-no-sequence")}
)


@pytest.fixture(autouse=True)
def half_precision_tiles(monkeypatch):
    """float32 too in the chunks that half precision takes; float32's own are shorter."""
    monkeypatch.setattr(problem, "configure", lambda *names_and_sizes: launch.configure(*names_and_sizes[:4]))


def compare(rule, x, cu_seqlens=None, dtype=torch.float32, forward=1e-5, gradient=1e-4, scales=None):
    """The kernels in dtype against the definition in float64, both on operands rounded to dtype."""
    narrow = {*cases.VECTORS, *composed.IN_DTYPE} - {"g"}
    x = {name: t.to(dtype if name in narrow else torch.float32).double() for name, t in x.items()}
    expected = results(summary_by_loop, rule, x, cu_seqlens=cu_seqlens)
    found = results(summary_of, rule, x, dtype, backend="triton", cu_seqlens=cu_seqlens)
    cases.assert_close(found, expected, forward, gradient, scales)


@pytest.mark.parametrize("layout", LAYOUTS)
@every_rule
def test_matches_loop(rule, decay, layout):
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS[layout]
    heads = cases.HV if cu_seqlens is None else cases.H  # grouped where sequences are dense
    compare(rule, inputs(rule, decay, B, T, cu_seqlens, heads=heads), cu_seqlens)


@every_rule
def test_half_precision_with_strong_decay(rule, decay):
    """float16 stands for what the interpreter can't do, bfloat16. What is left of a state is next to nothing here."""
    fresh_seed()
    x = inputs(rule, decay, 1, 70, heads=cases.H, strong=True)
    scales = {"transition": torch.ones(1, cases.H, x["k"].shape[-1])}
    if decay == "constant":
        scales["dg"] = torch.ones(cases.H) * x["v"].shape[1]
    compare(rule, x, None, torch.float16, 2e-3, 4e-3, scales)


@pytest.mark.parametrize("K, V", [(150, 20), (20, 150)])
@pytest.mark.parametrize(
    "rule, decay", [("linear_attention", "channel"), ("delta_rule", "scalar"), ("dplr", "channel")]
)
def test_widths(rule, decay, K, V, monkeypatch):
    """Several tiles a state, the last one ragged, and transitions wider and narrower than states."""
    monkeypatch.setattr(cases, "K", K)
    monkeypatch.setattr(cases, "V", V)
    fresh_seed()
    compare(rule, inputs(rule, decay, 1, 40, heads=cases.H))
