"""What a recall sweep found: a table and a picture, recall against the numbers that a layer keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from linear_moe.evaluation.mqar_task import Task
from linear_moe.evaluation.plots import COLORS, INK, MUTED, _label, _pyplot, _save

LINES, MARKERS = ("-", (0, (4, 2)), (0, (1, 1.2))), ("o", "s", "^")
Result = dict[str, Any]


def require_matplotlib() -> None:
    """Raises ImportError, with the extra to install, where there is none."""
    _pyplot()


def best(results: Iterable[Result]) -> dict[str, list[Result]]:
    """label -> its runs, one a seed, at the learning rate that has the best mean recall on the validation set."""
    by_rate: dict[str, dict[float, list[Result]]] = {}
    for result in results:
        by_rate.setdefault(result["label"], {}).setdefault(result["lr"], []).append(result)
    return {
        label: max(rates.values(), key=lambda runs: mean(r["validation"]["recall"] for r in runs))
        for label, rates in by_rate.items()
    }


def spread(runs: Sequence[Result], pairs: int) -> tuple[float, float]:
    """Mean and sample standard deviation over the seeds of the recall of that many pairs, on the test set."""
    recalls = [run["test"]["recall_of"][str(pairs)] for run in runs]
    return mean(recalls), stdev(recalls) if len(recalls) > 1 else 0.0


def table(results: Sequence[Result]) -> str:
    """Markdown: for each model its sizes, its learning rate, and its recall by the number of pairs."""
    pairs = results[0]["task"]["pairs"]
    head = ["model", "state", "tails", "parameters", "lr", "seeds", *(f"{n} pairs" for n in pairs)]
    rows = [head, ["---"] * len(head)]
    for runs in best(results).values():
        first = runs[0]
        numbers = [f"{first['state']:,.0f}", f"{first['tail']:,.0f}", f"{first['parameters']:,}"]
        cells = [f"{100 * m:.1f} ± {100 * s:.1f}" for m, s in (spread(runs, n) for n in pairs)]
        rows.append([first["model"], *numbers, f"{first['lr']:g}", str(len(runs)), *cells])
    parameters = [result["parameters"] for result in results]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(
        [
            "Recall on the test set in percent, mean ± standard deviation over the seeds. state, tails: numbers that a "
            "layer keeps of a sequence, of its memory and of its convolutions. Largest and smallest model differ by "
            f"{max(parameters) / min(parameters) - 1:.1%} in parameters.\n",
            *lines,
            "",
        ]
    )


def plot(results: Sequence[Result], png: str | Path) -> None:
    """Recall against state size, one panel for each number of pairs; models of one mixer share a colour.

    Error bars: the standard deviation over seeds. Softmax, whose KV cache grows with the sequence, is a line with its
    size in the legend. Dots at the bottom: chance.
    """
    task = Task(**{**results[0]["task"], "pairs": tuple(results[0]["task"]["pairs"])})
    chosen, series = best(results), {}
    for runs in chosen.values():
        series.setdefault(runs[0]["model"], []).append(runs)
    styles = _styles(series)
    plt = _pyplot()
    width = 2.2 + 2.9 * len(task.pairs)
    figure, panels = plt.subplots(
        1, len(task.pairs), figsize=(width, 3.9), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, pairs in zip(panels[0], task.pairs):
        for name, points in series.items():
            means, deviations = zip(*(spread(runs, pairs) for runs in points))
            color, line, marker = styles[name]
            if _softmax(points[0][0]):
                size = f"{name} (KV cache: {points[0][0]['state']:,.0f})"
                axes.axhline(means[0], color=INK, linewidth=1.2, label=size)
                axes.axhspan(means[0] - deviations[0], means[0] + deviations[0], color=INK, alpha=0.1, linewidth=0)
                continue
            axes.errorbar(
                [runs[0]["state"] for runs in points],
                means,
                deviations,
                color=color,
                linestyle=line,
                marker=marker,
                markersize=5,
                capsize=3,
                label=name,
            )
        axes.axhline(task.chance, color=MUTED, linewidth=1, linestyle=(0, (1, 2)), label="chance")
        states = sorted({runs[0]["state"] for points in series.values() for runs in points if not _softmax(runs[0])})
        axes.set_xscale("log", base=2)
        axes.set_xticks(states, [f"{state:,.0f}" for state in states])
        axes.set_ylim(-0.02, 1.03)
        axes.set_title(f"{pairs} pairs", fontsize=10, color=INK)
        _label(axes, "", "")
    figure.supxlabel("state: numbers that a layer keeps of a sequence", fontsize=10, color=MUTED)
    figure.supylabel("recall on held-out examples", fontsize=10, color=MUTED)
    figure.suptitle(f"Multi-query associative recall, {task.seq_length} tokens", x=0.01, ha="left", color=INK)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    _save(figure, png)


def _softmax(result: Result) -> bool:
    return set(result["config"].get("layer-pattern", "L")) == {"N"}


def _styles(series: dict[str, list[list[Result]]]) -> dict[str, tuple]:
    """Model -> colour of its mixer, line and marker by its place among that mixer's models."""
    mixers: dict[str, list[str]] = {}
    for name, points in series.items():
        mixers.setdefault(str(points[0][0]["config"].get("mixer", "gated_deltanet")), []).append(name)
    return {
        name: (COLORS[i % len(COLORS)], LINES[j % len(LINES)], MARKERS[j % len(MARKERS)])
        for i, names in enumerate(mixers.values())
        for j, name in enumerate(names)
    }
