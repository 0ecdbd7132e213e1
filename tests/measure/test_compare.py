"""What counts as wrong."""

import pytest
import torch

from linear_moe.measure.compare import compare, relative_error, verdict

T, H = 50, 2


def decayed(x, device, *, scale=1.0):
    """Terms g v that cancel: v has the sign of its token's parity."""
    return {"o": x["v"] * x["g"].expand(1, T, H) * scale}


@pytest.mark.parametrize("per_token, right", [(("g",), True), ((), False)])
def test_a_sum_that_cancels_is_measured_by_its_terms(per_token, right):
    """Off by 1 % of one term in each, which is more than all of the sum that is left."""
    torch.manual_seed(0)
    v = torch.ones(1, T, H)
    direction = torch.randn(v.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = v / direction * torch.where(torch.arange(T) % 2 == 1, 1.0, -1.0)[:, None]
    inputs = {"v": v.float(), "g": torch.tensor([-0.5, -2.0])}

    def slightly_off(x, device):
        first = torch.arange(T, device=device)[:, None] == 0
        return {"o": x["v"] * x["g"].expand(1, T, H) * torch.where(first, 1.01, 1.0)}

    limits = (1e-1, 1e-3)
    found = compare(slightly_off, decayed, inputs, torch.float32, "cpu", per_token=per_token, limits=limits)
    assert (found["errors"]["dg"] < 1e-3) == right


def test_nan_and_zero():
    x = torch.ones(3)
    assert relative_error(x, x) == 0 and relative_error(0 * x, 0 * x) == 0
    assert relative_error(x, 0 * x) == float("inf")
    found = verdict({"o": x * float("nan"), "dq": x}, {"o": x, "dq": x}, (1e-2, 1e-2))
    assert not found["ok"] and found["text"] == "o nan (limit 1e-02)"


def test_both_sides_take_rounded_inputs():
    x = {"x": torch.randn(1000), "g": torch.randn(1000)}
    found = compare(lambda x, _: dict(x), lambda x, _: dict(x), x, torch.bfloat16, "cpu", wide=("g",))
    assert found["ok"] and found["errors"]["x"] == found["errors"]["g"] == 0
