"""Decoding behind contexts of many lengths: time a token and bytes kept, linear layers and memories beside softmax.

The paper's Figure 2 (arXiv 2502.13685) at any size. Only a little of a context is read: the rest is skipped, its places
in softmax layers' caches being zeros, for no time here depends on what a state or a cache holds.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

from linear_moe import build_model
from linear_moe.inference import Session

from .tables import table

SIZE = {"num_layers": 8, "hidden_size": 256, "num_attention_heads": 4, "ffn_hidden_size": 768, "vocab_size": 512}
LARGE = {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 8, "ffn_hidden_size": 3072, "vocab_size": 32000}
SHAPE = {"swiglu": True, "normalization": "RMSNorm", "disable_bias_linear": True, "position_embedding_type": "rope"}
FORMS = {
    "softmax": {"layer_pattern": "N"},
    "gated_deltanet": {"mixer": "gated_deltanet", "layer_pattern": "L", "mom_memories": 0},
    "gated_deltanet MoM": {"mixer": "gated_deltanet", "layer_pattern": "L", "mom_memories": 4},
    "hybrid MoM, 1 softmax of 4": {"mixer": "gated_deltanet", "layer_pattern": "LLLN", "mom_memories": 4},
}
CONTEXTS, LONG = [1024 * 2**i for i in range(0, 8)], [4096 * 2**i for i in range(0, 8)]
Figures = dict[str, list[tuple[float, int]]]
READ, ROUNDS = 64, 5  # tokens read of each context; the median of so many rounds counts


def decoding(tokens: int, contexts: list[int] | None = None, picture: str | Path | None = None) -> Figures:
    """Prints a table of one sequence's decoding, and draws it where ``picture`` names a PNG file.

    On a GPU at the paper's 340M in bfloat16, under a CUDA graph, behind 4k to 512k tokens; on a CPU at a tiny size in
    float32, behind 1k to 128k.

    Args:
        tokens: generated in each round. contexts: their lengths.

    Returns:
        Name of the layers -> (seconds a token, bytes kept) for each context.
    """
    cuda = torch.cuda.is_available()
    size = SHAPE | (LARGE | {"bf16": True} if cuda else SIZE)
    contexts = contexts or (LONG if cuda else CONTEXTS)
    size |= {"seq_length": max(contexts), "max_position_embeddings": 2 * max(contexts) + tokens}
    found = {}
    for form, options in FORMS.items():
        model = build_model(size | options).eval()
        found[form] = [measure(model, context, tokens) for context in contexts]
    rows = []
    for form, figures in found.items():
        rows.append((form, "ms a token", *(f"{1e3 * seconds:.2f}" for seconds, _ in figures)))
        rows.append(("", "MiB kept", *(f"{kept / 2**20:.2f}" for _, kept in figures)))
    header = ("layers", "", *(f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in contexts))
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}: decoding one sequence behind a context of so many tokens\n\n{table(header, rows)}")
    if picture is not None:
        draw(found, contexts, device, picture)
    return found


@torch.no_grad()
def measure(model: torch.nn.Module, context: int, tokens: int) -> tuple[float, int]:
    """Seconds a token behind so long a context, and bytes of states and caches then."""
    session = Session(model, 1, context + (ROUNDS + 1) * (tokens + 1))
    prompt = torch.randint(SIZE["vocab_size"], (READ,)).tolist()
    session.reply([prompt], 1)
    session.context.seen.fill_(context)
    session.context.counts = [context]
    session.reply([prompt[:1]], tokens)  # warms up, and captures the CUDA graph where there is one
    times = []
    for _ in range(ROUNDS):
        before = session.decode_seconds
        session.reply([prompt[:1]], tokens)
        times.append((session.decode_seconds - before) / (tokens - 1))
    return statistics.median(times), used_bytes(session, context)


def used_bytes(session, context: int) -> int:
    """Of a sequence of that length; a softmax layer's cache is as long as its session may become."""
    held, room = session.nbytes, session.context.max_sequence_length
    return held["states"] + held["kv"] * context // room


def draw(found: Figures, contexts: list[int], device: str, picture: str | Path) -> None:
    """Both figures over the context's length, as a PNG file."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), dpi=120, layout="constrained")
    for form, figures in found.items():
        seconds, sizes = zip(*figures)
        axes[0].plot(contexts, [1e3 * s for s in seconds], marker="o", markersize=4, label=form)
        axes[1].plot(contexts, [size / 2**20 for size in sizes], marker="o", markersize=4, label=form)
    for ax, name in zip(axes, ("milliseconds a token", "MiB of states and caches")):
        ax.set(yscale="log", xlabel="tokens of context", ylabel=name)
        ax.set_xscale("log", base=2)
        ax.set_xticks(contexts, [f"{n // 1024}k" for n in contexts])
        ax.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.suptitle(f"Decoding one sequence ({device})")
    figure.savefig(picture)
    plt.close(figure)
