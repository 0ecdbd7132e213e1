"""What a segment does to a state, on kernels interpreted on the CPU, against the loop over tokens."""

import pytest
import torch

from linear_moe.ops import api
from linear_moe.ops.triton import launch, problem
from tests.helpers import fresh_seed, rel_err
from tests.ops import cases, composed
from tests.ops.summaries import SUMMARISED, every_rule, inputs, one_state, results, summary_by_loop, summary_of

PACKED = torch.tensor([0, 0, 5, 5, 22, 22], dtype=torch.int32)
# One of each way to go through packed sequences and through a transition: the interpreter is slow
IN_PACKS = [("linear_attention", "constant"), ("linear_attention", "channel"), ("delta_rule", "scalar")]
IN_PACKS += [("dplr", "channel"), ("rwkv6", "channel"), ("gsa", "channel")]


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


@pytest.mark.parametrize("rule, decay", [case for case in SUMMARISED if case[0] not in composed.RULES])
def test_matches_loop(rule, decay, monkeypatch):
    """Two chunks, of grouped heads. Keys are wide enough that a chunk of 64 does not erase nearly all of a state: the
    little that is then left of P is I minus what was erased, in float32."""
    monkeypatch.setattr(cases, "H", 1)
    monkeypatch.setattr(cases, "K", 32)
    fresh_seed()
    compare(rule, inputs(rule, decay, 1, 70, heads=2))


@pytest.mark.parametrize("rule, decay", IN_PACKS)
def test_packed(rule, decay):
    fresh_seed()
    compare(rule, inputs(rule, decay, 1, 22, PACKED, heads=2), PACKED)


@pytest.mark.parametrize(
    "cu_seqlens", (None, torch.zeros(4).int(), torch.zeros(1).int()), ids=("dense", "empty", "none")
)
@every_rule
def test_no_tokens(rule, decay, cu_seqlens):
    fresh_seed()
    compare(rule, inputs(rule, decay, 2 if cu_seqlens is None else 1, 0, cu_seqlens), cu_seqlens)


@pytest.mark.parametrize(
    "rule, decay", [("linear_attention", "constant"), ("delta_rule", "channel"), ("dplr", "channel")]
)
def test_half_precision_with_strong_decay(rule, decay):
    """float16 stands for what the interpreter can't do, bfloat16. What is left of a state is next to nothing here."""
    fresh_seed()
    x = inputs(rule, decay, 1, 20, heads=cases.H, strong=True)
    scales = {"transition": torch.ones(1, cases.H, x["k"].shape[-1])}
    if decay == "constant":
        scales["dg"] = torch.ones(cases.H) * x["v"].shape[1]
    compare(rule, x, None, torch.float16, 2e-3, 4e-3, scales)


@pytest.mark.parametrize("K, V", [(150, 20), (20, 150)])
@pytest.mark.parametrize("rule, decay", [("linear_attention", "channel"), ("delta_rule", "scalar")])
def test_widths(rule, decay, K, V, monkeypatch):
    """Several tiles a state, the last one ragged, and transitions wider and narrower than states."""
    monkeypatch.setattr(cases, "H", 1)
    monkeypatch.setattr(cases, "K", K)
    monkeypatch.setattr(cases, "V", V)
    fresh_seed()
    compare(rule, inputs(rule, decay, 1, 20, heads=cases.H))


@pytest.mark.parametrize("wanted", ("transition", "state"))
@pytest.mark.parametrize("rule, decay", [("linear_attention", "scalar"), ("delta_rule", "scalar"), ("dplr", "channel")])
def test_gradients_of_one_result(rule, decay, wanted):
    """The pass of the other one is left out."""
    fresh_seed()
    x = {name: t.float().requires_grad_() for name, t in inputs(rule, decay, 1, 20, heads=cases.H).items()}
    leaves = [x[name] for name in x if name not in ("q", "v", "initial_state")]
    found = []
    for backend in ("triton", "torch"):
        results = dict(zip(("transition", "state"), summary_of(rule, x, backend=backend)))
        loss = results[wanted].square().sum()
        found.append(torch.autograd.grad(loss, leaves, materialize_grads=True))
    assert all(rel_err(ours, expected) < 1e-4 for ours, expected in zip(*found))


def recorded(rule, decay, T, N, backward):
    """Every launch's kernel, and its arguments by name."""
    launch.recorded.clear()
    with torch.device("meta"):
        cu_seqlens = torch.zeros(N + 1, dtype=torch.int32) if N else None
        x = inputs(rule, decay, 1 if N else 2, T, cu_seqlens)
        x = {name: t.float().requires_grad_(backward) for name, t in x.items()}
        transition, state = summary_of(rule, x, cu_seqlens=cu_seqlens)
        if backward:
            loss = transition.sum() + one_state(state).sum()
            torch.autograd.grad(loss, [x[name] for name in x if name not in ("q", "u", "initial_state")])
    launches = [(kernel, dict(zip(kernel.arg_names, args)) | options) for kernel, _, args, options in launch.recorded]
    launch.recorded.clear()
    return launches


@pytest.mark.parametrize("packed", (0, 5), ids=("dense", "packed"))
@every_rule
def test_nothing_is_read_back_or_compiled_anew(rule, decay, packed, monkeypatch):
    """Meta tensors have no values, and on them launches are only recorded."""
    monkeypatch.setattr(api, "choose_backend", lambda *args, **options: "triton")

    def compiled(T, N):
        launches = recorded(rule, decay, T, N, backward=True)
        fixed = [{n: x for n, x in given.items() if n not in launch.RUNTIME} for _, given in launches]
        return {
            (kernel.__name__, *((name, str(getattr(x, "dtype", x))) for name, x in given.items()))
            for (kernel, _), given in zip(launches, fixed)
        }

    assert compiled(16, packed) == compiled(17, packed) == compiled(4096, 2 * packed)


@every_rule
def test_keeps_nothing_of_a_chunk(rule, decay, monkeypatch):
    """One preparation, then a walk for each result, which writes no outputs and no states between chunks."""
    monkeypatch.setattr(api, "choose_backend", lambda *args, **options: "triton")
    launches = recorded(rule, decay, 70, 0, backward=False)
    walks = [given for kernel, given in launches if kernel.__name__ == "scan_forward"]
    assert len(launches) == {"delta_rule": 3, "dplr": 3, "gsa": 4}.get(rule, 2)
    assert len(walks) == {"delta_rule": 2, "dplr": 2, "gsa": 2}.get(rule, 1)
    assert all(given["o"] is None and given["states"] is None and given["final"] is not None for given in walks)
