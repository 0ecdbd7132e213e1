"""Our torch rules beside what else runs on this machine, or beside the loop over tokens where nothing else does: same
inputs, forward and backward, in one process.

Runs are interleaved, so that a machine that slows down slows both; times are medians.
"""

import inspect
from functools import partial

import torch
from torch.nn.functional import logsigmoid, normalize, scaled_dot_product_attention

from linear_moe.ops import api, reference

from .compare import relative_error
from .timing import measure

# What a rule takes beside q, k and v, of heads = (B, T, H) and 64 channels; k is normalised.
LOOPS = {
    "dplr": lambda heads, k: (-k, k * torch.rand(*heads, 1), logsigmoid(torch.randn(*heads, 64))),
    "rwkv6": lambda heads, k: (logsigmoid(torch.randn(*heads, 64)), torch.randn(heads[-1], 64)),
    "gsa": lambda heads, k: (torch.rand(*heads, 64), logsigmoid(torch.randn(*heads, 64))),
    "ttt_linear": lambda heads, k: (0.2 * torch.rand(heads), torch.rand(heads), torch.ones(4, 64), torch.zeros(4, 64)),
    "titans_linear": lambda heads, k: (
        0.02 * torch.rand(heads),
        *(logsigmoid(torch.randn(heads) + 3) for _ in range(2)),
    ),
}


def run(repeats=7, scale=1.0, threads=None):
    """Prints one line a comparison: seconds of ours, of theirs, and their ratio (above 1: ours is faster).

    `scale` shortens the sequences; `threads` sets torch's CPU threads. Raises ImportError naming the extra when
    transformers is missing, AssertionError when results disagree.
    """
    if threads:
        torch.set_num_threads(threads)
    cases = [(case, repeats) for case in (_delta_rule, _linear_attention)]
    cases += [(partial(_loop, rule), 1) for rule in LOOPS]  # seconds each
    for case, turns in cases:
        name, *functions, inputs = case(scale)
        sides = [(f, [(inputs, torch.ones_like(f(*inputs)))]) for f in functions]
        mine, other = (1e-3 * t for t in measure(sides, "cpu", turns, modes=("both",))["both"])
        print(f"{name:<88} {mine:8.4f} s {other:8.4f} s  x{other / mine:.2f}")


def _delta_rule(scale):
    theirs = _transformers_rule()
    T = int(4096 * scale)
    q, k, v = _heads(T, 3)
    k, beta, g = normalize(k, dim=-1), torch.rand(1, T, 4), logsigmoid(torch.randn(1, T, 4))
    inputs = [x.requires_grad_() for x in (q, k, v, beta, g)]

    def other(q, k, v, beta, g):
        return theirs(q, k, v, g, beta)[0]

    def ours(*inputs):
        return api.delta_rule(*inputs)[0]

    results = []
    for function in (ours, other):
        o = function(*inputs)
        results.append((o, *torch.autograd.grad(o, inputs, torch.ones_like(o))))
    for mine, their in zip(*results):
        _agree(mine, their)
    return f"delta_rule T={T} H=4 K=V=64, transformers' torch_chunk_gated_delta_rule", ours, other, inputs


def _linear_attention(scale):
    T = int(8192 * scale)
    inputs = [x.requires_grad_() for x in _heads(T, 3)]

    def ours(*inputs):
        return api.linear_attention(*inputs)[0]

    def other(*inputs):
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs), is_causal=True)

    with torch.no_grad():
        _agree(ours(*inputs), reference.linear_attention(*inputs)[0])
    return f"linear_attention T={T} H=4 K=V=64, torch's causal scaled_dot_product_attention", ours, other, inputs


def _loop(rule, scale):
    T = int(4096 * scale)
    q, k, v = _heads(T, 3)
    k = normalize(k, dim=-1)
    inputs = [x.requires_grad_() for x in (q, k, v, *LOOPS[rule]((1, T, 4), k))]

    def ours(*inputs):
        return getattr(api, rule)(*inputs, backend="torch")[0]

    def other(*inputs):
        return getattr(reference, rule)(*inputs)[0]

    with torch.no_grad():
        _agree(ours(*inputs), other(*inputs))
    return f"{rule} T={T} H=4 K=V=64, the loop over tokens", ours, other, inputs


def _transformers_rule():
    try:
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
    except ImportError as error:
        raise ImportError("this comparison needs transformers: pip install 'linear-moe[hf]'") from error
    return inspect.unwrap(torch_chunk_gated_delta_rule)  # with flash-linear-attention installed it stands for kernels


def _heads(T, count):
    return [torch.randn(1, T, 4, 64) for _ in range(count)]


def _agree(ours, theirs):
    error = relative_error(ours, theirs)
    assert error < 1e-4, f"results disagree: relative error {error:.1e}"
