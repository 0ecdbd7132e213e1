"""Routes of tokens to memories: packed rows, bucket by bucket, and back. Nothing is read back to the host.

A bucket is one memory in one sequence; buckets are memory-major (m * N + n), and inside a bucket rows keep the order
of their tokens, so every bucket is a causal sequence of its own (MoM, arXiv 2502.13685).
"""

from dataclasses import dataclass

import torch

from .check import made_here
from .sequences import sequence_of
from .take import take


@dataclass(frozen=True)
class Routes:
    """R = B*T*(k + shared) rows, G = M + shared memories, N sequences."""

    token: torch.Tensor  # [R] row -> flat token
    row: torch.Tensor  # [B*T, k + shared] token -> its rows, the shared memory's last
    weights: torch.Tensor  # [B*T, k + shared] differentiable; the shared memory's is 1
    cu_seqlens: torch.Tensor  # [G*N + 1] int32, rows of every bucket
    memory_offsets: torch.Tensor  # [G] int32, END of every memory's rows (`offs` of torch.nn.functional.grouped_mm)
    num_memories: int  # G


def topk_router(logits, k):
    """Chooses k of M memories for every token.

    logits [..., M] -> (weights [..., k] that sum to 1, indices [..., k] int64, probabilities [..., M]), in float32
    (float64 for float64 logits). Of equal logits the lower index wins, on every device.
    Raises ValueError unless 1 <= k <= M.
    """
    M = logits.shape[-1]
    if not 1 <= k <= M:
        raise ValueError(f"topk_router: k ({k}) must be between 1 and the number of memories ({M})")
    probs = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).softmax(-1)
    top, indices = probs.sort(dim=-1, descending=True, stable=True)
    top = top[..., :k]
    return top / top.sum(-1, keepdim=True), indices[..., :k], probs


def route(indices, weights, *, num_memories, shared, cu_seqlens=None):
    """Sorts tokens into buckets, stably.

    indices int [B, T, k], distinct for a token and below num_memories; weights [B, T, k] float; `shared` adds one more
    memory, the last, that holds every token with weight 1; cu_seqlens int32 [N+1] (then B is 1), else N = B.
    Nothing is checked here: see api.route.
    """
    B, T, k = indices.shape
    device, ends = indices.device, _sequence_ends(B, T, cu_seqlens, indices.device)
    N, M, R = len(ends), num_memories, B * T * k
    if cu_seqlens is None:
        sequence = torch.arange(B, device=device).repeat_interleave(T)
    else:
        sequence = sequence_of(T, cu_seqlens)
    bucket, order = (indices.reshape(B * T, k) * N + sequence[:, None]).flatten().sort(stable=True)
    token, cu = order // k, torch.searchsorted(bucket, torch.arange(M * N + 1, device=device))
    row = torch.empty_like(order).index_copy(0, order, torch.arange(R, device=device)).view(B * T, k)
    weights = weights.reshape(B * T, k)
    if shared:
        tokens = torch.arange(B * T, device=device)
        token, row = torch.cat([token, tokens]), torch.cat([row, R + tokens[:, None]], 1)
        weights, cu = torch.cat([weights, weights.new_ones(B * T, 1)], 1), torch.cat([cu, R + ends])
    groups = M + bool(shared)
    offsets = cu[torch.arange(1, groups + 1, device=device) * N]
    cu, offsets = cu.int(), offsets.int()
    made_here(cu, offsets)
    return Routes(token, row, weights, cu, offsets, groups)


def _sequence_ends(B, T, cu_seqlens, device):
    return torch.arange(1, B + 1, device=device) * T if cu_seqlens is None else cu_seqlens[1:].long()


def route_reference(indices, weights, *, num_memories, shared, cu_seqlens=None):
    """The specification of `route`: bucket by bucket, token by token."""
    B, T, k = indices.shape
    ends = _sequence_ends(B, T, cu_seqlens, "cpu").tolist()
    chosen = [[*row, num_memories] if shared else row for row in indices.reshape(B * T, k).tolist()]
    groups = num_memories + bool(shared)
    token, row, cu, offsets = [], [[0] * len(c) for c in chosen], [0], []
    for memory in range(groups):
        for start, end in zip([0, *ends], ends):
            for t in range(start, end):
                if memory in chosen[t]:
                    row[t][chosen[t].index(memory)] = len(token)
                    token.append(t)
            cu.append(len(token))
        offsets.append(len(token))
    weights = torch.cat([weights.reshape(B * T, k), weights.new_ones(B * T, int(shared))], 1)
    row = torch.tensor(row, dtype=torch.int64).view(weights.shape)
    cu, offsets = torch.tensor(cu, dtype=torch.int32), torch.tensor(offsets, dtype=torch.int32)
    return Routes(torch.tensor(token, dtype=torch.int64), row, weights, cu, offsets, groups)


class _Gather(torch.autograd.Function):
    """x[token], whose backward sums each token's rows in a fixed order."""

    @staticmethod
    def forward(x, token, row):
        return x.index_select(0, token)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, grad):
        (row,) = ctx.saved_tensors
        return grad.index_select(0, row.flatten()).view(*row.shape, *grad.shape[1:]).sum(1), None, None


def gather(x, routes):
    """Every row's token: x [B*T, ...] -> [R, ...]."""
    return _Gather.apply(x, routes.token, routes.row)


def combine(rows, routes):
    """The weighted sum of every token's rows: [R, ...] -> [B*T, ...], in the rows' dtype.

    Sums in the wider of the dtypes of rows and weights.
    """
    per_token = take(rows, routes.row.flatten()).view(*routes.row.shape, *rows.shape[1:])
    weights = routes.weights.view(*routes.row.shape, *[1] * (rows.ndim - 1))
    return (weights * per_token).sum(1).to(rows.dtype)
