"""python tests/gpu/check.py cuda|cpu: every rule, grouped_linear and a model's loss on the device against the CPU."""

import sys

import torch

import linear_moe
from linear_moe import ops
from tests.helpers import rel_err

HEADS, K, V, LENGTHS = 2, 16, 16, [70, 0, 1, 130]
DECAYS = {
    "none": None,
    "constant": (HEADS,),
    "scalar": (1, sum(LENGTHS), HEADS),
    "channel": (1, sum(LENGTHS), HEADS, K),
}


def check_rules(device: str) -> None:
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    for rule in ("linear_attention", "delta_rule"):
        for name, shape in DECAYS.items():
            q, k, v = torch.randn(3, 1, sum(LENGTHS), HEADS, K)
            x = {"q": q, "k": torch.nn.functional.normalize(k, dim=-1), "v": v}
            if rule == "delta_rule":
                x["beta"] = torch.rand(1, sum(LENGTHS), HEADS)
            if shape:
                x["g"] = -torch.rand(shape) * 5
            direction, results = torch.randn(v.shape, dtype=torch.float64), []
            for where, dtype, backend in (("cpu", torch.float64, "reference"), (device, torch.float32, "auto")):
                leaves = {n: t.to(where, dtype).requires_grad_() for n, t in x.items()}
                o, _ = getattr(ops, rule)(**leaves, cu_seqlens=cu.to(where), backend=backend)
                grads = torch.autograd.grad((o * direction.to(where, dtype)).sum(), list(leaves.values()))
                results.append([o.cpu(), *(grad.cpu() for grad in grads)])
            errors = [rel_err(ours, expected) for expected, ours in zip(*results)]
            print(f"{rule} {name}: " + " ".join(f"{error:.1e}" for error in errors))
            assert errors[0] < 1e-5 and max(errors) < 1e-4


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
    check_grouped(device)
    check_model(device)
    print("all agree")
