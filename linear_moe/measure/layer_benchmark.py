"""Our Mixture-of-Memories layer beside fla's and beside a plain Gated DeltaNet layer: times, memory, and checks.

Checked: the layer in float64, fla's layer with the same weights, that nothing makes the host wait, and that forward and
backward replay from a CUDA graph with the same bits.
"""

import copy
import warnings
from dataclasses import dataclass

import torch
from torch import nn

from linear_moe.mom import MoMConfig, Router, make_routes
from linear_moe.ops import grouped_linear
from linear_moe.ssm.core import MixerCore
from linear_moe.ssm.gated_deltanet import GatedDeltaNet

from . import flops
from .compare import TOLERANCE, relative_error
from .h200 import floor
from .kernel_benchmark import RULES, Size
from .machine import heading, require_gpu
from .peers import load
from .tables import table
from .timing import MODES, gradients, graph_of, measure, peak, sets

SIZES = [Size(4, 4096, 8, 128), Size(8, 2048, 4, 256)]
MOM = MoMConfig(memories=4, topk=2, shared=True)
RULE = next(rule for rule in RULES if rule.name == "gated_deltanet")
ROWS = MOM.topk + MOM.shared  # that MoM processes for one of a plain layer
FACTOR = {"forward": 1, "backward": 2, "both": 3}  # products of a projection in each pass
THEIRS = {"MoM": "fla.layers.mom:MomAttention", "plain": "fla.layers.gated_deltanet:GatedDeltaNet"}


class Layer(nn.Module):
    """What linear_moe.mcore.mixer_layer does, without Megatron: x [B, T, H * D] -> the same shape."""

    def __init__(self, size, mom, dtype, device, recompute=False):
        super().__init__()
        options = {"num_heads": size.H, "num_value_heads": size.H, "head_dim": size.D, "value_head_dim": size.D}
        hidden, factory = size.H * size.D, {"dtype": dtype, "device": device}
        self.mom = mom
        mixer = GatedDeltaNet(GatedDeltaNet.Config(**options, conv_size=4))
        self.core = MixerCore(mixer, hidden, memories=mom.projections if mom else 0, recompute=recompute, **factory)
        self.core.initialize(lambda weight: nn.init.normal_(weight, std=hidden**-0.5))
        if mom:
            self.router = Router(hidden, mom.memories, mom.topk, **factory)
            nn.init.normal_(self.router.weight, std=hidden**-0.5)
        self.out = nn.Linear(hidden, hidden, bias=False, **factory)

    def forward(self, x, routing=None):
        """routing: given instead of the router's own, so that two dtypes route alike."""
        routes = None
        if self.mom:
            routing = routing or self.router(x.flatten(0, 1))
            routes = make_routes(routing, self.mom, x.shape[:2], None, 1.0)
        return self.out(self.core(x, routes=routes))

    def flops(self, tokens):
        """Operations of the projections, forward."""
        rows = tokens * ROWS if self.mom else 0
        shared = [self.core.tokens.weight, self.out.weight] + ([self.router.weight] if self.mom else [])
        per_row = self.core.rows.weight[0].numel() if self.mom else 0
        return 2 * (tokens * sum(w.numel() for w in shared) + rows * per_row)


@dataclass
class Side:
    """A layer under test: a function of its input and of its parameters, which are only named to be differentiated."""

    name: str
    layer: nn.Module

    def __call__(self, x, *parameters):
        out = self.layer(x)
        return out[0] if isinstance(out, tuple) else out

    def inputs(self, x):
        return [x, *self.layer.parameters()]


def peer_layer(kind, size, dtype, device):
    """fla's layer of the same size; kind "MoM" or "plain"."""
    options = {"hidden_size": size.H * size.D, "head_dim": size.D, "num_heads": size.H, "expand_v": 1, "conv_size": 4}
    if kind == "MoM":
        options |= {"num_memories": MOM.memories, "topk": MOM.topk, "shared_mem": MOM.shared}
    return load(THEIRS[kind], "fla")(**options).to(device, dtype)


@torch.no_grad()
def take_weights(layer, other):
    """Gives our MoM layer the weights of fla's."""
    tokens = {"q": other.q_proj, "gate": other.g_proj}
    rows = {"k": other.k_proj, "v": other.v_proj, "beta": other.b_proj, "a": other.a_proj}
    last = {"k": other.shared_k, "v": other.shared_v, "beta": other.shared_b, "a": other.shared_a}
    core = layer.core
    core.tokens.weight.copy_(torch.cat([tokens[name].weight for name in core.tokens.local]))
    for m, weight in enumerate(core.rows.weight):
        parts = [last[name] if m == MOM.memories else rows[name][m] for name in core.rows.local]
        weight.copy_(torch.cat([part.weight for part in parts]))
    for name in ("q", "k", "v"):
        core.heads.get_parameter(f"conv_{name}").copy_(getattr(other, f"{name}_conv1d").weight.squeeze(1))
    core.heads.A_log.copy_(other.A_log)
    core.heads.dt_bias.copy_(other.dt_bias)
    core.shared.norm.copy_(other.o_norm.weight)
    layer.router.weight.copy_(other.gate.weight)
    layer.out.weight.copy_(other.o_proj.weight)


def saved_bytes(side, x):
    """Bytes that the forward pass keeps for the backward one, parameters and output not counted.

    On a GPU what the allocator holds then. Elsewhere distinct storages of saved tensors, but for those that a layer
    saves under hooks of its own.
    """
    if x.is_cuda:
        before = torch.cuda.memory_allocated()
        out = side(x)
        return torch.cuda.memory_allocated() - before - out.nbytes
    known, kept = {p.untyped_storage()._cdata for p in side.layer.parameters()}, {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        side(x)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in known)


def waits(side, x):
    """How often one forward and backward pass makes the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            inputs = side.inputs(x)
            gradients(side(*inputs), inputs, torch.ones_like(x))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in caught)


def error(layer, size, device, dtype):
    """Relative errors of the output and of the worst gradient, from the same layer in float64 on the CPU."""
    exact = copy.deepcopy(layer).to("cpu", torch.float64)
    x = torch.randn(2, 150, size.H * size.D, device=device).to(dtype).requires_grad_()
    wide = x.detach().to("cpu", torch.float64).requires_grad_()
    do, routing, same, leaves, wide_leaves = torch.randn_like(wide), None, None, [x], [wide]
    if layer.mom:  # both take one router's choices: they differ in another precision
        routing = layer.router(x.flatten(0, 1))
        routing = type(routing)(*(r.detach() for r in routing))
        same = type(routing)(*(r.double().cpu() if r.is_floating_point() else r.cpu() for r in routing))
        leaves.append(routing.weights.requires_grad_())
        wide_leaves.append(same.weights.requires_grad_())
    o, expected = layer(x, routing), exact(wide, same)
    mine = gradients(o, [*leaves, *layer.core.parameters()], do.to(device, dtype))
    reference = gradients(expected, [*wide_leaves, *exact.core.parameters()], do)
    return relative_error(o.cpu(), expected), max(relative_error(a.cpu(), b) for a, b in zip(mine, reference))


def difference(layer, other, size, device, dtype):
    """Relative difference of our MoM layer's output from fla's, with fla's weights.

    In evaluation mode, where fla's convolution keeps to its buckets as ours always does.
    """
    take_weights(layer, other)
    x = torch.randn(2, 512, size.H * size.D, device=device).to(dtype)
    other.eval()
    found = relative_error(layer(x), other(x)[0])
    other.train()
    return found


def replay(side, x, repeats):
    """(milliseconds of forward and backward replayed from a CUDA graph, whether the bits are those of a plain run)."""
    inputs, do = side.inputs(x), torch.ones_like(x)
    expected = gradients(side(*inputs), inputs, do)
    with graph_of(lambda: gradients(side(*inputs), inputs, do)) as (run, found):
        run()
        torch.cuda.synchronize()
        same = all(torch.equal(a, b) for a, b in zip(found, expected))
        times = measure([(lambda: run(), [([], do)])], "cuda", repeats, modes=("forward",))
    return times["forward"][0], same


def mom(peer=None, repeats=20, device="cuda", scale=1.0):
    """Prints the table and the checks; returns how many checks fail. Arguments and errors: kernel_benchmark.kernels."""
    require_gpu(device)
    dtype, rows, checks = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32, [], []
    if peer:
        load(THEIRS["MoM"], peer)  # a missing peer is said before anything is measured
    for size in SIZES:
        size = size.scaled(scale) if scale < 1 else size
        sides = [
            Side("ours MoM", Layer(size, MOM, dtype, device)),
            Side("ours plain", Layer(size, None, dtype, device)),
        ]
        sides.append(Side("ours MoM, recompute", Layer(size, MOM, dtype, device, recompute=True)))
        sides += [Side(f"{peer} {kind}", peer_layer(kind, size, dtype, device)) for kind in THEIRS if peer]
        times, saved, draws = measured(sides, size, device, dtype, repeats)
        for i, side in enumerate(sides):
            both, x, do = times["both"][i], *draws[0]
            least = least_time(side.layer, size, x, do) if isinstance(side.layer, Layer) else None
            cells = [f"{times[mode][i]:.3f}" for mode in MODES]
            cells += [f"{least:.3f}", f"{least / both:.0%}"] if least else ["", ""]
            memory = peak(side, side.inputs(x), do)
            rows.append((side.name, str(size), *cells, f"{saved[i]:.0f}", f"{memory:.0f}"))
        rows += projections(size, device, dtype, repeats)
        checks += _checks(sides, size, draws, device, dtype, times["both"], saved, repeats)
    header = ["layer", "B/T/H/D", *(f"{mode} ms" for mode in MODES), "floor ms", "reached", "saved B/token", "peak MiB"]
    print(f"{heading(device)}\n\n{table(header, rows)}\n")
    for good, line in checks:
        print(f"{'ok  ' if good else 'MISS'} {line}")
    return sum(not good for good, _ in checks)


def projections(size, device, dtype, repeats):
    """Rows of the table for the write projections alone: the kernel that gathers rows as it loads them, and torch's
    F.grouped_mm on gathered rows."""
    layer = Layer(size, MOM, dtype, device)
    x = torch.randn(size.B * size.T, size.H * size.D, device=device).to(dtype).requires_grad_()
    routes = make_routes(layer.router(x), MOM, (size.B, size.T), None, 1.0)
    sides = []
    for backend in ("auto", "torch"):

        def run(x, weight, backend=backend):
            return grouped_linear(x, weight, routes.memory_offsets, routes=routes, backend=backend)

        do = torch.randn(len(routes.token), layer.core.rows.weight.shape[1], device=device).to(dtype)
        sides.append((run, [([x, layer.core.rows.weight], do)]))
    times = measure(sides, device, repeats)
    names = ("write projections, rows gathered on load", "write projections, gather and F.grouped_mm")
    return [
        (name, str(size), *(f"{times[mode][i]:.3f}" for mode in MODES), "", "", "", "") for i, name in enumerate(names)
    ]


def measured(sides, size, device, dtype, repeats):
    """({mode: milliseconds of every side}, bytes that every side saves a token, the inputs they took in turns)."""
    shape = (size.B, size.T, size.H * size.D)

    def make():
        x, do = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        return [x.requires_grad_()], do

    draws = [(x, do) for (x,), do in sets(make, device)]
    measured = [(side, [(side.inputs(x), do) for x, do in draws]) for side in sides]
    times = measure(measured, device, repeats)
    return times, [saved_bytes(side, draws[0][0]) / (size.B * size.T) for side in sides], draws


def least_time(layer, size, x, do):
    """Least milliseconds of forward and backward on an H200: see h200.floor."""
    tokens = size.B * size.T
    rows = tokens * ROWS if layer.mom else tokens
    rule = flops.of_modes(RULE.case, size.D)
    work = {mode: rows * size.H * rule[mode] + layer.flops(tokens) * FACTOR[mode] for mode in MODES}
    return floor([x, *layer.parameters()], do, work)["both"]


def _checks(sides, size, draws, device, dtype, both, saved, repeats):
    """(whether it holds, the sentence) of everything that is promised."""
    cuda = torch.device(device).type == "cuda"
    limit = TOLERANCE if cuda else 1e-4
    errors = {side.name: error(side.layer, size, device, dtype) for side in sides[:3]}
    found = [
        (
            e[0] < limit and e[1] < 5 * limit,
            f"{size} {name}: errors {e[0]:.1e} forward (limit {limit}), {e[1]:.1e} worst gradient (limit {5 * limit})",
        )
        for name, e in errors.items()
    ]
    ratio = both[0] / (ROWS * both[1])
    found.append((ratio < 1.15, f"{size} MoM takes {ratio:.2f} x ({ROWS} x the plain layer's time) (goal 1.15)"))
    if cuda:
        host = [waits(side, draws[0][0]) for side in sides]
        found.append((not host[0], f"{size} host waits: " + ", ".join(f"{s.name} {n}" for s, n in zip(sides, host))))
        time, same = replay(sides[0], draws[0][0], repeats)
        found.append((same, f"{size} as a CUDA graph: {time:.3f} ms, the same bits: {same}"))
    if len(sides) > 3:
        speed, memory = both[3] / both[0], saved[0] / saved[3]
        found.append((speed >= 3, f"{size} {speed:.2f} times as fast as {sides[3].name} (goal 3)"))
        found.append(
            (memory <= 0.4, f"{size} keeps {memory:.0%} of what {sides[3].name} keeps for backward (goal 40%)")
        )
        apart = difference(sides[0].layer, sides[3].layer, size, device, dtype)
        found.append((apart < 2 * limit, f"{size} differs from {sides[3].name} by {apart:.1e} with its weights"))
    return found
