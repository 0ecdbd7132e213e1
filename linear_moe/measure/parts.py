"""What Mixture-of-Memories is made of beside rules: routes, projections of rows, convolution, combination and norm."""

from dataclasses import replace
from functools import partial

import torch

from linear_moe.ops import api

from .compare import compare, verdict

MEMORIES, TOPK, TAPS, EPS = 4, 2, 4, 1e-5


def choices(tokens):
    """What a router says: (indices [1, T, k], weights [1, T, k])."""
    indices = torch.rand(1, tokens, MEMORIES).argsort(-1)[..., :TOPK]
    return indices, torch.rand(1, tokens, TOPK)


def routes_of(indices, weights, lengths, device, backend):
    cu = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    options = {"num_memories": MEMORIES, "shared": True, "cu_seqlens": cu, "backend": backend}
    return api.route(indices.to(device), weights.to(device), **options)


def check_routing(device, lengths, seed):
    """Every index, exactly."""
    torch.manual_seed(seed)
    given = choices(sum(lengths))
    ours, loop = (routes_of(*given, lengths, where, how) for where, how in ((device, "triton"), ("cpu", "reference")))
    names = ("token", "row", "cu_seqlens", "memory_offsets", "weights")
    found, expected = ({n: getattr(r, n).double().cpu() for n in names} for r in (ours, loop))
    return verdict(found, expected, (1e-12, 1e-12))


def check_grouped(width, dtype, device, lengths, seed):
    """Projections of routed rows, gathered as they are loaded, and of given rows of which one group has none."""
    torch.manual_seed(seed)
    T, D = sum(lengths), 2 * width
    given, ends = choices(T), torch.tensor(lengths).cumsum(0).int()
    x = {"x": torch.randn(T, D), "weight": torch.randn(MEMORIES + 1, 3 * width, D) * D**-0.5}
    x["groups"] = torch.randn(len(lengths), 3 * width, D) * D**-0.5

    def run(x, device, kernels="triton", routing="triton"):
        routes = routes_of(*given, lengths, device, routing)
        options = {"routes": routes, "backend": kernels}
        routed = api.grouped_linear(x["x"], x["weight"], routes.memory_offsets, **options)
        return {"routed": routed, "plain": api.grouped_linear(x["x"], x["groups"], ends.to(device), backend=kernels)}

    return compare(run, partial(run, kernels="torch", routing="reference"), x, dtype, device)


def check_conv(width, dtype, device, lengths, seed):
    """Packed with states, packed with heads normalised, and along the buckets of routes."""
    torch.manual_seed(seed)
    T, D, N = sum(lengths), 2 * width, len(lengths)
    given, cu = choices(T), torch.tensor([0, *lengths]).cumsum(0).int()
    x = {"x": torch.randn(1, T, D), "weight": torch.randn(D, TAPS), "initial_state": torch.randn(N, D, TAPS - 1)}

    def run(x, device, kernels="triton", routing="triton"):
        conv = partial(api.short_conv, x["x"], x["weight"], backend=kernels)
        y, state = conv(initial_state=x["initial_state"], return_state=True, cu_seqlens=cu.to(device))
        normalized, _ = conv(normalize=width, cu_seqlens=cu.to(device))
        routed, _ = conv(normalize=width, routes=routes_of(*given, lengths, device, routing))
        return {"y": y, "state": state, "normalized": normalized, "routed": routed}

    return compare(run, partial(run, kernels="reference", routing="reference"), x, dtype, device)


def check_norm(width, dtype, device, lengths, seed):
    """Combination of a token's rows, then norm and gate; the norm and gate alone; the combination alone."""
    torch.manual_seed(seed)
    tokens, H = sum(lengths), 2
    indices, weights = choices(tokens)
    x = {"rows": torch.randn(tokens * (TOPK + 1), H, width), "o": torch.randn(tokens, H, width)}
    x |= {"weight": torch.randn(width), "gate": torch.randn(tokens, H, width), "shares": weights}

    def run(x, device, kernels="triton", routing="triton"):
        routes = routes_of(indices, weights, lengths, device, routing)
        shares = x["shares"].flatten(0, 1)
        routes = replace(routes, weights=torch.cat([shares, shares.new_ones(tokens, 1)], 1))
        norm = partial(api.gated_norm, weight=x["weight"], gate=x["gate"], eps=EPS, backend=kernels)
        found = {"combined": norm(x["rows"], routes=routes), "plain": norm(x["o"], activation="sigmoid")}
        return found | {"sum": api.combine(x["rows"], routes, backend=kernels)}

    return compare(run, partial(run, kernels="torch", routing="reference"), x, dtype, device, wide=("shares",))
