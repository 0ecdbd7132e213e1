"""Pictures of a training run, from the TensorBoard event files that it wrote."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

# Megatron's tags; both have the iteration as x.
TRAIN_LOSS, VALIDATION_LOSS = "lm loss", "lm loss validation"
MEMORY_SHARE = re.compile(r"mom/layer_(\d+)/memory_(\d+)_share")
# Told apart by people with any colour vision (Okabe and Ito).
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#8C564B")
INK, MUTED = "#222222", "#6B6B6B"

Series = dict[str, tuple[np.ndarray, np.ndarray]]


def read_scalars(tensorboard_dir: str | Path) -> Series:
    """tag -> (steps int64, values float64), sorted by step, of every event file in `tensorboard_dir`.

    A run that was resumed wrote several files. From the first step of a later file on, only the later file counts,
    also where the earlier one had gone further before it was interrupted. Raises ValueError if there is no event
    file.
    """
    accumulator = _tensorboard()
    files = [str(f) for f in Path(tensorboard_dir).rglob("*tfevents*") if f.is_file()]
    runs = []
    for file in files:
        events = accumulator.EventAccumulator(file, size_guidance={accumulator.SCALARS: 0})
        events.Reload()
        # "... vs samples" has another unit on its x axis.
        tags = [t for t in events.Tags()[accumulator.SCALARS] if not t.endswith(" vs samples")]
        scalars = {t: [(e.step, e.value) for e in events.Scalars(t)] for t in tags}
        if scalars:
            runs.append((events.FirstEventTimestamp(), file, scalars))
    if not runs:
        raise ValueError(f"no TensorBoard scalars in {tensorboard_dir}: train with --tensorboard-dir {tensorboard_dir}")
    merged: dict[str, dict[int, float]] = {}
    for _, _, scalars in sorted(runs, key=lambda run: run[:2]):
        start = min(points[0][0] for points in scalars.values())
        for tag, points in merged.items():
            merged[tag] = {step: value for step, value in points.items() if step < start}
        for tag, points in scalars.items():
            merged.setdefault(tag, {}).update(points)
    return {
        tag: (np.array(sorted(p), dtype=np.int64), np.array([p[s] for s in sorted(p)]))
        for tag, p in merged.items()
        if p
    }


def plot_loss(tensorboard_dir: str | Path, png: str | Path, baseline: float | None = None) -> None:
    """Loss in nats a token over iterations: training (each logged value, and smoothed) and validation.

    baseline: nats a token of the bigram, drawn as a horizontal line. Raises ValueError if the run logged no "lm loss".
    """
    scalars = read_scalars(tensorboard_dir)
    _require(scalars, [TRAIN_LOSS], tensorboard_dir)
    steps, losses = scalars[TRAIN_LOSS]
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, color=COLORS[0], alpha=0.3, linewidth=0.8)
    axes.plot(steps, _smooth(losses), color=COLORS[0], linewidth=1.8, label="train")
    shown = [*losses]
    if VALIDATION_LOSS in scalars:
        at, values = scalars[VALIDATION_LOSS]
        label = f"validation, last {values[-1]:.3f}"
        axes.plot(at, values, color=COLORS[5], linewidth=1.8, marker="o", markersize=4, label=label)
        shown += [*values]
    if baseline is not None:
        axes.axhline(baseline, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), label=f"smoothed bigram {baseline:.3f}")
        shown.append(baseline)
    finite = np.array([v for v in shown if math.isfinite(v)])
    if finite.size and np.ptp(finite):
        margin = 0.05 * np.ptp(finite)
        axes.set_ylim(finite.min() - margin, finite.max() + margin)
    axes.set_xlim(0, max(int(steps[-1]), 1))
    _label(axes, "iteration", "loss (nats per token)")
    axes.legend(frameon=False, loc="upper right")
    axes.set_title("Language-model loss", loc="left", color=INK)
    _save(figure, png)


def plot_memories(tensorboard_dir: str | Path, png: str | Path) -> None:
    """Share of routed rows that each memory of each MoM layer received over iterations, one panel a layer.

    Reads `mom/layer_{i}/memory_{m}_share` (i from 1, m from 0; a layer's shares sum to 1). A band's height is the
    memory's share; where all are balanced, the bands meet on the dashed lines. Raises ValueError if no layer logged.
    """
    scalars = read_scalars(tensorboard_dir)
    layers: dict[int, dict[int, str]] = {}
    for tag in scalars:
        if match := MEMORY_SHARE.fullmatch(tag):
            layers.setdefault(int(match[1]), {})[int(match[2])] = tag
    _require(scalars, [] if layers else ["mom/layer_1/memory_0_share"], tensorboard_dir)
    plt = _pyplot()
    columns = min(len(layers), 3 if len(layers) <= 9 else 6)
    rows = math.ceil(len(layers) / columns)
    # Room for title and legend above, for the shared x label below.
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(2 + 2.7 * columns, 1.4 + 2.1 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    largest = max(len(memories) for memories in layers.values())
    colors = COLORS if largest <= len(COLORS) else plt.get_cmap("turbo")(np.linspace(0.05, 0.95, largest))
    for axes, (layer, memories) in zip(grid.flat, sorted(layers.items()), strict=False):
        series = [scalars[memories[m]] for m in sorted(memories)]
        # A run killed while writing may have logged only some of a layer's memories at its last step.
        steps = sorted(set.intersection(*(set(s.tolist()) for s, _ in series)))
        shares = [v[np.isin(s, steps)] for s, v in series]
        bands = axes.stackplot(steps, shares, colors=colors[: len(shares)], edgecolor="white", linewidth=0.4)
        borders = np.arange(1, len(shares)) / len(shares)
        dashes = axes.hlines(borders, steps[0], steps[-1], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set(ylim=(0, 1), title=f"layer {layer}")
        axes.margins(x=0)
        if len(shares) == largest:
            handles = [*bands, dashes]
    for axes in grid.flat[len(layers) :]:
        axes.set_visible(False)
    for axes in grid.flat[: len(layers)]:
        _label(axes, "", "")
        axes.title.set(color=INK, fontsize=10)
        axes.grid(False)
    # One legend for all panels, in the order of the bands; of many memories it names eight.
    named = range(0, largest, math.ceil(largest / 8))
    entries = [(handles[m], f"memory {m}") for m in reversed(named)] + [(handles[-1], f"balanced: 1/{largest} each")]
    figure.legend(*zip(*entries, strict=True), loc="outside right upper", frameon=False)
    figure.suptitle("Rows each memory received", x=0.01, ha="left", color=INK)
    figure.supxlabel("iteration", fontsize=10, color=MUTED)
    figure.supylabel("share of routed rows", fontsize=10, color=MUTED)
    _save(figure, png)


def _smooth(values: np.ndarray) -> np.ndarray:
    # Centred mean over about 2 % of the run, narrower towards both ends: a trailing one would lag where loss falls.
    last = len(values) - 1
    half = [min(len(values) // 100, i, last - i) for i in range(len(values))]
    return np.array([values[i - h : i + h + 1].mean() for i, h in enumerate(half)])


def _require(scalars: Series, tags: Iterable[str], tensorboard_dir: str | Path) -> None:
    missing = [tag for tag in tags if tag not in scalars]
    if missing:
        raise ValueError(f"{tensorboard_dir} has no tag {', '.join(missing)}; it has: {', '.join(sorted(scalars))}")


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, color=MUTED)
    axes.set_ylabel(y, color=MUTED)
    axes.tick_params(colors=MUTED, labelsize=9)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#BBBBBB")


def _save(figure: Any, png: str | Path) -> None:
    Path(png).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, format="png", dpi=150)
    _pyplot().close(figure)


def _tensorboard() -> Any:
    try:
        from tensorboard.backend.event_processing import event_accumulator
    except ImportError as error:
        raise ImportError(f"reading a run's logs needs tensorboard ({error}): pip install linear-moe[look]") from error
    return event_accumulator


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"pictures need matplotlib ({error}): pip install linear-moe[look]") from error
    # No window system is needed, nor looked for.
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
