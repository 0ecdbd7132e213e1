"""Forward, then forward and backward, captured in a CUDA graph; where that fails, on which stream everything ran.

Autograd runs a node on the stream on which it was made. One that was made before the capture, on the legacy stream,
breaks it: a leaf's, if an earlier run still holds it, or that of an input which is no leaf, as a copy to the device.
So does an op that leaves the current stream. A layer of torch alone says whether the fault is in this check.
"""

import gc
from functools import partial

import torch
from torch import nn
from torch.nn.functional import normalize

from linear_moe.mom import MoMConfig, make_routes
from linear_moe.ops import api

from .layers import MEMORIES, TOPK, make_layer
from .parts import choices, routes_of

WIDTH, TOKENS = 64, 300
WARM_UP = 3


def _plain(device):
    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)).to(device)
    return [*layer.parameters()], layer


def _rule(device):
    q, k = (normalize(torch.randn(1, TOKENS, 2, WIDTH, device=device), dim=-1) for _ in range(2))
    beta, g = torch.rand(1, TOKENS, 2, device=device), -torch.rand(1, TOKENS, 2, device=device)
    operands = [x.requires_grad_() for x in (q, k, beta, g)]

    def run(x):
        v = x[None, :, None].expand(-1, -1, 2, -1).contiguous()
        return api.delta_rule(q, k, v, beta, g)[0]

    return operands, run


def _conv(device):
    weight = torch.randn(WIDTH, 4, device=device, requires_grad=True)
    return [weight], lambda x: api.short_conv(x[None], weight, normalize=WIDTH)[0]


def _projections(device):
    weight = torch.randn(MEMORIES + 1, 2 * WIDTH, WIDTH, device=device, requires_grad=True)
    routes = routes_of(*choices(TOKENS), [TOKENS], device, "auto")
    return [weight], lambda x: api.grouped_linear(x, weight, routes.memory_offsets, routes=routes)


def _norm(device):
    weight = torch.randn(WIDTH, device=device, requires_grad=True)
    return [weight], lambda x: api.gated_norm(x[:, None], weight, x[:, None], eps=1e-5)


def _routing(device):
    _, router = make_layer("gated_deltanet", WIDTH // 2)
    router = router.to(device)
    return [router.weight], lambda x: _routes(router, x).weights


def _routes(router, x):
    mom = MoMConfig(memories=MEMORIES, topk=TOPK)  # with its balance loss
    return make_routes(router(x), mom, (1, len(x)), None, 1.0)


def _layer(name, device):
    core, router = make_layer(name, WIDTH // 2)
    core, router = core.to(device), router.to(device)
    return [*core.parameters(), router.weight], lambda x: core(x[None], routes=_routes(router, x))


SUBJECTS = {  # name -> function of a device: (leaves, function of x [TOKENS, WIDTH])
    "torch alone": _plain,
    "rule": _rule,
    "convolution": _conv,
    "projections of rows": _projections,
    "norm and gate": _norm,
    "routing": _routing,
    "MoM over gated_deltanet": partial(_layer, "gated_deltanet"),
    "MoM over gla": partial(_layer, "gla"),
}


def check_capture(subject, device, seed):
    """A result of a check. Replayed with another input and then with the first: the bits of a plain run."""
    torch.manual_seed(seed)
    leaves, function = SUBJECTS[subject](device)
    x = torch.randn(TOKENS, WIDTH, device=device, requires_grad=True)
    leaves = [x, *leaves]
    towards = torch.randn_like(function(x))

    def forward(watch):
        with torch.no_grad():
            return [function(x)]

    def both(watch):
        y = function(x)
        watch(y)
        return [y.detach(), *torch.autograd.grad(y, leaves, towards)]

    stages = {"forward": forward, "forward and backward": both}
    expected = {name: run(_nothing) for name, run in stages.items()}
    _warm_up(partial(both, _nothing))
    stale = stale_leaves(leaves)
    for name, run in stages.items():
        seen = []
        try:
            same = _replays(partial(run, partial(watch_streams, seen, leaves)), x, expected[name])
        except RuntimeError as error:
            first = error
            while first.__context__ is not None:  # the end of the capture fails too, with a message that says less
                first = first.__context__
            text = f"{name}: {str(first).splitlines()[0]}; leaves with a node older than the capture: {stale or 'none'}"
            return {"ok": False, "text": text, "streams": seen}
        if not same:
            return {"ok": False, "text": f"{name}: a replay gives other bits", "streams": seen}
    return {"ok": True}


def _nothing(y):
    pass


def _warm_up(run):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()


def _replays(run, x, expected):
    graph, first = torch.cuda.CUDAGraph(), x.detach().clone()
    with torch.cuda.graph(graph):
        captured = run()
    for values in (torch.randn_like(first), first):
        with torch.no_grad():
            x.copy_(values)
        graph.replay()
    torch.cuda.synchronize()
    return all(torch.equal(a, b) for a, b in zip(captured, expected))


def stale_leaves(leaves):
    """Indices of leaves whose node something keeps alive, or that are none: a node that a capture should make anew."""

    def node(leaf):
        return leaf.view_as(leaf).grad_fn.next_functions[0][0]

    for leaf in leaves:
        node(leaf).metadata["seen"] = True
    gc.collect()
    return [i for i, leaf in enumerate(leaves) if "seen" in node(leaf).metadata]


def watch_streams(seen, leaves, y):
    """Appends "stream node" to `seen` for every node below y, and every leaf, when autograd comes to it."""

    def note(name):
        def hook(*_):
            stream = torch.cuda.current_stream()
            place = "legacy" if stream.cuda_stream == 0 else hex(stream.cuda_stream)
            capturing = "" if torch.cuda.is_current_stream_capturing() else ", NOT capturing"
            seen.append(f"{place}{capturing} {name}")

        return hook

    seen.append(f"{hex(torch.cuda.current_stream().cuda_stream)} forward")
    for i, leaf in enumerate(leaves):
        leaf.register_hook(note(f"leaf {i} {[*leaf.shape]}"))
    waiting, known = [y.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in known:
            continue
        known.add(node)
        node.register_prehook(note(node.name()))
        waiting += [below for below, _ in node.next_functions]
