"""The one-token kernel against the torch version and, token by token, against the loop."""

import pytest
import torch

from linear_moe.ops import reference
from linear_moe.ops import step as torch_step
from linear_moe.ops.triton.step import step
from tests.helpers import fresh_seed, rel_err

RULES = ("linear_attention", "delta_rule")  # dplr: test_dplr.py
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3}
SHAPES = {  # B, H, HV, K, V
    "plain": (3, 2, 2, 64, 64),
    "grouped": (2, 2, 6, 20, 37),
    "largest": (1, 1, 2, 256, 256),
    "narrow": (2, 1, 1, 1, 1),
    "odd": (2, 3, 3, 129, 5),
    "no-sequence": (0, 2, 2, 16, 16),
}
DECAYS = {"none": (), "constant": ("HV",), "scalar": ("B", "HV"), "channel": ("B", "HV", "K")}


def draw(rule, shape, decay, dtype, strength=1.0):
    B, H, HV, K, V = SHAPES[shape]
    sizes = {"B": B, "HV": HV, "K": K}
    q, k, v = torch.randn(B, H, K), torch.nn.functional.normalize(torch.randn(B, H, K), dim=-1), torch.randn(B, HV, V)
    beta = torch.rand(B, HV).to(dtype) if rule == "delta_rule" else None
    g = -strength * torch.rand([sizes[name] for name in DECAYS[decay]]) if DECAYS[decay] else None
    return torch.randn(B, HV, K, V), *(x.to(dtype) for x in (q, k, v)), beta, g


def assert_close(found, operands, rule, scale=0.3):
    exact = [None if x is None else x.double() for x in operands]
    wanted = torch_step(rule, *exact, scale=scale, backend="torch")
    assert found[0].dtype == operands[3].dtype and found[1].dtype == torch.float32
    assert rel_err(found[0], wanted[0]) < TOLERANCES[operands[3].dtype]
    assert rel_err(found[1], wanted[1]) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_matches_torch(rule, shape, decay, dtype):
    fresh_seed()
    operands = draw(rule, shape, decay, dtype)
    before = operands[0].clone()
    assert_close(step(rule, *operands, scale=0.3), operands, rule)
    assert torch.equal(operands[0], before)


@pytest.mark.parametrize("rule", RULES)
def test_strong_decay(rule):
    fresh_seed()
    operands = draw(rule, "plain", "channel", torch.float32, strength=50.0)
    assert_close(step(rule, *operands, scale=0.3), operands, rule)


@pytest.mark.parametrize("rule", RULES)
def test_slices_of_a_projection(rule):
    """Operands are read where they lie, whatever their strides, also a state and a decay by channel."""
    fresh_seed()
    B, H, HV, K, V = SHAPES["grouped"]
    fused = torch.randn(B, 2 * H * K + HV * V + HV)
    q, k, v, beta = fused.split((H * K, H * K, HV * V, HV), -1)
    beta = beta if rule == "delta_rule" else None
    state, g = torch.randn(B, K, HV, V).transpose(1, 2), -torch.rand(B, K, HV).mT
    operands = state, q.view(B, H, K), k.view(B, H, K) / K, v.view(B, HV, V), beta, g
    assert_close(step(rule, *operands, scale=0.3), operands, rule)


@pytest.mark.parametrize("rule", RULES)
def test_in_place_decoding_equals_the_loop(rule):
    fresh_seed()
    tokens = [draw(rule, "grouped", "scalar", torch.float32)[1:] for _ in range(5)]
    state = start = torch.randn(*SHAPES["grouped"][:1], *SHAPES["grouped"][2:])
    state = state.clone()
    outputs = []
    for token in tokens:
        o, new = step(rule, state, *token, scale=0.3, out_state=state)
        assert new is state
        outputs.append(o)
    operands = [torch.stack(x, 1).double() for x in zip(*tokens) if x[0] is not None]
    o, final = getattr(reference, rule)(*operands, scale=0.3, initial_state=start.double(), return_state=True)
    assert rel_err(torch.stack(outputs, 1), o) < 1e-5
    assert rel_err(state, final) < 1e-5


@pytest.mark.parametrize(
    "out", (torch.zeros(3, 2, 64, 64).mT, torch.zeros(3, 2, 64, 64, dtype=torch.float16)), ids=("strides", "dtype")
)
def test_bad_out_state(out):
    operands = draw("delta_rule", "plain", "none", torch.float32)
    with pytest.raises(ValueError, match="out_state must be contiguous"):
        step("delta_rule", *operands, scale=1.0, out_state=out)
