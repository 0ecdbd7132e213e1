"""gsa and rwkv6 on kernels, interpreted on the CPU, against their loops: outputs, final states, every gradient."""

import pytest
import torch

from linear_moe import ops
from linear_moe.ops import api
from linear_moe.ops.triton import launch, problem, rules, slots
from tests.helpers import fresh_seed, rel_err
from tests.ops import cases, composed

LAYOUTS = cases.layouts((0, 1), {name: cases.PACKED[name] for name in cases.PACKED if name != "packed"})
LAYOUTS["T130"] = (1, 130, None)


@pytest.fixture(params=composed.RULES)
def rule(request):
    return request.param


@pytest.fixture(autouse=True)
def half_precision_tiles(monkeypatch):
    """float32 too in the chunks of 64 that half precision takes; float32's own are shorter."""
    monkeypatch.setattr(problem, "configure", lambda *names_and_sizes: launch.configure(*names_and_sizes[:4]))


def compare(rule, x, cu_seqlens=None, dtype=torch.float32, forward=1e-5, gradient=1e-4):
    """The kernels in dtype against the loop in float64, both on operands rounded to dtype."""
    x = composed.rounded(x, dtype)
    expected = composed.run(rule, x, backend="reference", cu_seqlens=cu_seqlens)
    found = composed.run(rule, x, dtype, backend="triton", cu_seqlens=cu_seqlens)
    cases.assert_close(found, expected, forward, gradient)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_loop(rule, layout):
    fresh_seed()
    B, T, cu_seqlens = LAYOUTS[layout]
    compare(rule, composed.inputs(rule, B, T, cu_seqlens), cu_seqlens)


def test_half_precision(rule):
    """float16 stands for what the interpreter can't do, bfloat16: the same code, but for the products with states."""
    fresh_seed()
    compare(rule, composed.inputs(rule, 1, 70), None, torch.float16, forward=2e-3, gradient=4e-3)


def test_every_decay_strong(rule):
    fresh_seed()
    x = composed.inputs(rule, 1, 40)
    compare(rule, x | {"g": torch.full_like(x["g"], -50)})


def test_tiles_of_float32(rule, monkeypatch):
    monkeypatch.setattr(problem, "configure", launch.configure)
    fresh_seed()
    compare(rule, composed.inputs(rule, 1, 40))


@pytest.mark.parametrize("K, V, M", [(150, 70, 17), (20, 200, 150)])
def test_widths(K, V, M):
    """Several tiles a head, the last one ragged."""
    fresh_seed()
    compare("gsa", composed.inputs("gsa", 1, 40, K=K, V=V, M=M))


def test_exactly_causal(rule):
    """A border inside a chunk, and both ends of a packed sequence."""
    fresh_seed()
    cu_seqlens = torch.tensor([0, 33, 33, 50, 70], dtype=torch.int32)

    def run(**x):
        return composed.RULES[rule](**x, cu_seqlens=cu_seqlens, backend="triton")[0]

    cuts = [(slice(33, 40), hidden) for hidden in (slice(0, 33), slice(40, None))]
    cases.assert_causal(run, composed.inputs(rule, 1, 70, cu_seqlens), composed.TOKENS, cuts)


@pytest.mark.parametrize("rule, wanted", [("gsa", "q"), ("gsa", "g"), ("gsa", "initial_state"), ("rwkv6", "u")])
def test_single_gradients(rule, wanted):
    """Of an output that needs no other."""
    fresh_seed()
    x = {name: tensor.float() for name, tensor in composed.inputs(rule, 1, 70).items()}
    x[wanted].requires_grad_()
    outputs = [composed.RULES[rule](**x, backend=backend)[0] for backend in ("triton", "torch")]
    ours, expected = (torch.autograd.grad(o.square().sum(), x[wanted])[0] for o in outputs)
    assert rel_err(ours, expected) < 1e-4


def test_state_alone(rule):
    """Gradients of the final state, where nothing is asked of the output.

    Weak decays: behind strong ones the initial state's gradient is subnormal.
    """
    fresh_seed()
    x = {name: tensor.float().requires_grad_() for name, tensor in composed.inputs(rule, 1, 70, strong=False).items()}
    leaves = [x[name] for name in x if name not in ("q", "u")]
    results = []
    for backend in ("triton", "torch"):
        _, state = composed.RULES[rule](**x, return_state=True, backend=backend)
        results.append(torch.autograd.grad(state.square().sum(), leaves))
    assert all(rel_err(a, b) < 1e-4 for a, b in zip(*results))


def test_repeats_bit_for_bit():
    fresh_seed()
    x = composed.inputs("gsa", 1, 40)
    first, second = (composed.run("gsa", dict(x), torch.float32, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def what_is_compiled(rule, T, N):
    """Every launch's kernel, argument types and constants, forward and backward."""
    launch.recorded.clear()
    cu_seqlens = torch.zeros(N + 1, dtype=torch.int32) if N else None
    composed.run(rule, composed.inputs(rule, 1 if N else 2, T, cu_seqlens), torch.float32, cu_seqlens=cu_seqlens)
    return {
        (kernel.__name__, *(getattr(x, "dtype", type(x)) for x in arguments), *sorted(options.items(), key=str))
        for kernel, _, arguments, options in launch.recorded
    }


@pytest.mark.parametrize("packed", (0, 5), ids=("dense", "packed"))
def test_nothing_is_read_back_or_compiled_anew(rule, monkeypatch, packed):
    """Meta tensors have no values, and on them launches are only recorded."""
    monkeypatch.setattr(api, "choose_backend", lambda *args, **options: "triton")
    with torch.device("meta"):
        compiled = [what_is_compiled(rule, T, N) for T, N in ((16, packed), (17, packed), (4096, 2 * packed))]
    launch.recorded.clear()
    assert compiled[0] and compiled[0] == compiled[1] == compiled[2]


def test_forward_makes_no_gradients():
    """Reading by values shares a kernel with the backward, which then computes the answers alone."""
    launch.recorded.clear()
    with torch.device("meta"):
        x = {name: tensor.float() for name, tensor in composed.inputs("gsa", 1, 70).items()}
        slots.read_by_value(x["q"], x["s"], x["k"], x["g"], scale=1.0)
    (arguments,) = (a for kernel, _, a, _ in launch.recorded if kernel.__name__ == "key_gradients")
    launch.recorded.clear()
    given = dict(zip(rules.key_gradients.arg_names, arguments))
    assert given["dq"] is not None and all(given[name] is None for name in ("dstates", "dk", "dg"))


def test_refuses_wide_slots():
    x = {name: tensor.float() for name, tensor in composed.inputs("gsa", 1, 4).items() if name in composed.TOKENS}
    x |= {name: torch.zeros(1, 4, 2, 300) for name in ("s", "g")}
    with pytest.raises(ValueError, match="heads of at most 256 channels, not 300"):
        ops.gsa(**x, backend="triton")
