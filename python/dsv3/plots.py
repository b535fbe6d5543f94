"""The demo's two pictures: the loss curve beside the baselines, and how evenly the experts are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

INK, MUTED, TRAIN, VALID = "#222222", "#8a8a8a", "#2f6fb0", "#c8442c"


def loss_curve(
    path: Path,
    train: Sequence[tuple[float, float]],
    valid: Sequence[tuple[float, float]],
    baselines: Mapping[str, float],
    *,
    title: str,
) -> None:
    """Bits per byte against training tokens as a PNG; baselines are horizontal lines.

    train, valid: (tokens, bits per byte). Needs matplotlib (ImportError without it).
    """
    from matplotlib.figure import Figure

    tokens, bits = (np.array(column) for column in zip(*train, strict=True))
    scale, unit = (1e6, "million") if tokens[-1] >= 1e6 else (1e3, "thousand")
    smooth = _smooth(bits, max(len(bits) // 100, 1))
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(tokens / scale, bits, color=TRAIN, alpha=0.2, linewidth=0.7)
    axes.plot(tokens / scale, smooth, color=TRAIN, linewidth=1.8, label="training text")
    if valid:
        at, found = (np.array(column) for column in zip(*valid, strict=True))
        axes.plot(
            at / scale,
            found,
            "o-",
            color=VALID,
            markersize=5,
            clip_on=False,
            zorder=3,
            label=f"validation text: {found[-1]:.2f} at the end",
        )
    for name, value in baselines.items():
        axes.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{name} {value:.2f}",
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 2),
            textcoords="offset points",
            ha="right",
            color=INK,
            fontsize=8,
        )
    low = min([*baselines.values(), *(value for _, value in valid), float(smooth.min())])
    high = max([*baselines.values(), float(np.quantile(smooth, 0.8))])
    axes.set_ylim(low - 0.1 * (high - low), high + 0.4 * (high - low))
    axes.set_xlim(0, tokens[-1] / scale)
    axes.set(title=title, xlabel=f"training tokens, {unit}", ylabel="bits per byte")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(path, format="png")


def expert_load(path: Path, load: np.ndarray, rows: Sequence[str], *, title: str) -> None:
    """A heat map as a PNG: each expert's share of its layer's tokens, 1 being an even share.

    load: [layers, experts] tokens; rows: the layers' names. Needs matplotlib (ImportError without it).
    """
    from matplotlib.figure import Figure

    layers, experts = load.shape
    share = load / np.maximum(load.mean(1, keepdims=True), 1e-9)
    figure = Figure(figsize=(max(6.0, min(0.7 * experts, 12.0)), 1.6 + 0.5 * layers), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    axes.set_yticks(range(layers), rows)
    axes.set(title=title, xlabel="expert")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if experts <= 16:
        axes.set_xticks(range(experts))
        for row, column in np.ndindex(layers, experts):
            value = share[row, column]
            color = "white" if abs(value - 1) > 0.6 else INK
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, ax=axes, label="tokens, 1 = an even share", extend="max" if share.max() > 2 else "neither")
    figure.savefig(path, format="png")


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (sums[end] - sums[start]) / (end - start)
