"""python tests/gpu/check.py cuda|cpu: every rule, step, layer and a model's loss on the device against the CPU."""

import itertools
import sys

import torch

import linear_moe
from linear_moe import ops
from linear_moe.mom import MoMConfig, Router, make_routes
from linear_moe.ssm import mixer_class
from linear_moe.ssm.core import MixerCore
from tests.helpers import rel_err
from tests.ops import composed
from tests.ops import test_online as online

LENGTHS = [70, 0, 1, 130]
T, SIZES = sum(LENGTHS), ((2, 2, 16, 16), (2, 4, 128, 64), (1, 2, 128, 128), (2, 2, 256, 200))  # H, HV, K, V


def decays(HV, K):
    return {"none": None, "constant": (HV,), "scalar": (1, T, HV), "channel": (1, T, HV, K)}


def check_rules(device: str) -> None:
    """In float32 and bfloat16, outputs, states and every gradient; packed, with empty sequences; and step by step."""
    for (H, HV, K, V), rule in itertools.product(SIZES, ("linear_attention", "delta_rule")):
        for name, shape in decays(HV, K).items():
            q, k, v = torch.randn(1, T, H, K), torch.randn(1, T, H, K), torch.randn(1, T, HV, V)
            x = {"q": q, "k": torch.nn.functional.normalize(k, dim=-1), "v": v}
            x = {n: t.bfloat16().float() for n, t in x.items()}
            if rule == "delta_rule":
                x["beta"] = torch.rand(1, T, HV)
            if shape:
                x["g"] = -torch.rand(shape) * 5
            x["initial_state"] = torch.randn(len(LENGTHS), HV, K, V)
            check_rule(device, rule, f"{rule} {name} {H}/{HV}/{K}/{V}", x)
            del x["initial_state"]
            check_steps(device, rule, x)


def check_dplr(device: str) -> None:
    for H, _, K, V in SIZES:
        a = torch.nn.functional.normalize(torch.randn(1, T, H, K), dim=-1)
        x = {"q": torch.randn(1, T, H, K), "k": torch.randn(1, T, H, K), "v": torch.randn(1, T, H, V)}
        x = {n: t.bfloat16().float() for n, t in (x | {"a": a, "b": -torch.rand(1, T, H, K) * a}).items()}
        x |= {"g": -torch.rand(1, T, H, K) * 5, "initial_state": torch.randn(len(LENGTHS), H, K, V)}
        check_rule(device, "dplr", f"dplr {H}/{K}/{V}", x)
        del x["initial_state"]
        check_steps(device, "dplr", x)


def check_composed(device: str) -> None:
    """gsa, with 64 slots, and rwkv6 likewise."""
    cu = torch.tensor([0, *LENGTHS]).cumsum(0)
    for (H, _, K, V), rule in itertools.product(SIZES, composed.RULES):
        x = composed.inputs(rule, 1, T, cu, H=H, K=K, V=V, M=64)
        check_rule(device, rule, f"{rule} {H}/{K}/{V}", composed.rounded(x, torch.bfloat16))


def check_online(device: str) -> None:
    """The rules that learn online, whose sequences go on inside mini-batches."""
    cu = torch.tensor([0, *LENGTHS]).cumsum(0)
    for rule, (K, V) in itertools.product(online.RULES, ((16, 16), (64, 40), (128, 128))):
        x = online.inputs(rule, 1, T, cu, K=K, V=V)
        x = {n: (t.bfloat16() if n in ("q", "k", "v") else t).float() for n, t in x.items()}
        check_rule(device, rule, f"{rule} {K}/{V}", x, online.offsets(1, cu))


def check_rule(device: str, rule: str, label: str, x: dict, offset=None) -> None:
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    directions = torch.randn_like(x["v"]).double(), torch.randn_like(x["initial_state"]).double()
    results = []
    for where, dtype, backend in (
        ("cpu", torch.float64, "reference"),
        (device, torch.float32, "auto"),
        (device, torch.bfloat16, "auto"),
    ):
        wide = torch.promote_types(dtype, torch.float32)  # of gates and states
        leaves = {n: t.to(where, dtype if n in ("q", "k", "v", "s", "a", "b") else wide) for n, t in x.items()}
        leaves = {n: t.requires_grad_() for n, t in leaves.items()}
        function = composed.RULES.get(rule) or getattr(ops, rule)
        options = {} if offset is None else {"offset": offset.to(where)}
        outputs = function(**leaves, **options, return_state=True, cu_seqlens=cu.to(where), backend=backend)
        loss = sum((y.double() * towards.to(where)).sum() for y, towards in zip(outputs, directions))
        grads = torch.autograd.grad(loss, list(leaves.values()))
        results.append([y.detach().cpu() for y in (*outputs, *grads)])
    for ours, forward, gradient in zip(results[1:], (1e-5, 1e-2), (1e-4, 2e-2)):
        errors = [rel_err(a, b) for a, b in zip(ours, results[0])]
        print(f"{label}: " + " ".join(f"{error:.1e}" for error in errors))
        assert max(errors[:2]) < forward and max(errors) < gradient


def check_steps(device: str, rule: str, x: dict) -> None:
    x = {n: t[:, :20].to(device) if t.ndim > 1 else t.to(device) for n, t in x.items()}
    whole, final = getattr(ops, rule)(**x, return_state=True, backend="reference")
    state, outputs = torch.zeros_like(final), []
    for t in range(whole.shape[1]):
        o, state = ops.step(rule, state, **{n: y[:, t] if y.ndim > 1 else y for n, y in x.items()})
        outputs.append(o)
    assert rel_err(torch.stack(outputs, 1), whole) < 1e-5 and rel_err(state, final) < 1e-5


def check_layer(device: str) -> None:
    """A Mixture-of-Memories layer in float32 against the CPU; on CUDA also captured in a graph and replayed."""
    for name in ("gated_deltanet", "gla"):
        hidden, direction = torch.randn(2, 2, 150, 64)
        expected = layer_run(name, "cpu", hidden, direction)[1]()
        x, run = layer_run(name, device, hidden, direction)
        found = [t.cpu() for t in run()]
        error = max(rel_err(a, b) for a, b in zip(found, expected))
        print(f"MoM over {name}: {error:.1e}")
        assert error < 1e-4
        if device == "cuda":
            check_graph(run, x, found)


def layer_run(name: str, device: str, hidden, direction):
    """(its input, function that runs a layer forward and backward and returns output and gradients)."""
    mixer, mom = mixer_class(name), MoMConfig(memories=4)
    config = mixer.make_config(64, 2, {"num_heads": 2, "conv_size": 4})
    torch.manual_seed(1)
    core = MixerCore(mixer(config, 0, 2), 64, memories=mom.projections)
    core.initialize(lambda w: w.normal_(std=0.2))
    router = Router(64, 4, 2, dtype=torch.float32, device="cpu")
    torch.nn.init.normal_(router.weight)
    core, router, x = core.to(device), router.to(device), hidden.to(device).requires_grad_()
    leaves, towards = [x, *core.parameters(), *router.parameters()], direction.to(device)

    def run():
        routes = make_routes(router(x.flatten(0, 1), lambda p: p), mom, x.shape[:2], None, 1.0)
        y = core(x, routes=routes)
        return [y.detach(), *torch.autograd.grad(y, leaves, towards)]

    return x, run


def check_graph(run, x, expected) -> None:
    """Captured once, replayed with other input and then the first one's: bit for bit what ran before."""
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph, first = torch.cuda.CUDAGraph(), x.detach().clone()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    with torch.no_grad():
        x.copy_(first)
    graph.replay()
    assert all(torch.equal(a.cpu(), b) for a, b in zip(captured, expected)), "a replayed graph differs"


def check_grouped(device: str) -> None:
    offsets = torch.tensor(LENGTHS).cumsum(0, dtype=torch.int32)
    x, weight = torch.randn(sum(LENGTHS), 12), torch.randn(len(LENGTHS), 13, 12)
    expected = ops.grouped_linear(x, weight, offsets)
    ours = ops.grouped_linear(x.to(device).bfloat16(), weight.to(device).bfloat16(), offsets.to(device))
    error = rel_err(ours.float().cpu(), expected)
    print(f"grouped_linear in bfloat16: {error:.1e}")
    assert error < 1e-2


def check_model(device: str) -> None:
    """On the GPU initial values are its own, so the CPU's are copied there; in bfloat16, as the kernels want."""
    options = {"use_cpu_initialization": True, "transformer_impl": "local"}
    model = linear_moe.build_model("examples/configs/tiny.yaml", **options).to("cpu")
    tokens = torch.randint(512, (2, 100))
    losses = []
    for where, dtype in ((device, torch.float32), (device, torch.bfloat16)):
        model = model.to(where, dtype)
        args = (tokens.to(where), torch.arange(100, device=where).expand(2, 100), None)
        losses.append(model(*args, labels=tokens.to(where)).float().mean())
        losses[-1].backward()
    print(f"loss in float32 {losses[0]:.4f}, in bfloat16 {losses[1]:.4f}")
    assert abs(losses[0] - losses[1]) < 2e-2


if __name__ == "__main__":
    torch.manual_seed(0)
    device = sys.argv[1]
    check_rules(device)
    check_dplr(device)
    check_composed(device)
    check_online(device)
    check_grouped(device)
    check_layer(device)
    check_model(device)
    print("all agree")
