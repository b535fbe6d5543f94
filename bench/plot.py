"""`python -m bench plot`: one picture a family, every case's time and its peers' as multiples of the floor; and the loss
curves of the parity run."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from bench.comm_model import copy_bandwidth, expectation
from bench.results import read_rows
from bench.table import describe

OURS = "#0b5cad"
PEERS = ("#c44e52", "#dd8452", "#55a868", "#8172b3", "#937860", "#64b5cd")
MARKERS = ("o", "s", "^", "D", "v", "P")
RUNS = {"bf16": ("#222222", "bf16"), "fp8": (OURS, "FP8"), "control": (PEERS[0], "bf16, perturbed start")}
TICKS = {
    2.5: (1, 1.2, 1.5, 2),
    8: (1, 1.5, 2, 3, 5),
    40: (1, 2, 5, 10, 20),
    1e9: (1, 10, 100, 1000),
}  # up to what ratio


def plot_all(results: Path) -> list[Path]:
    """Draws every results file below a folder; returns the pictures, each beside its file."""
    pictures = []
    for file in sorted(results.rglob("*.jsonl")):
        found = read_rows(file)
        # Ceilings have no peers, they are the floor; what moves some bytes alone has none that three digits could show.
        rows = [row for row in found if row["baselines"] and row["floor_us"]]
        if rows:
            copy_gbs = copy_bandwidth(found) if file.stem == "comm" else None
            expected = [] if copy_gbs is None else _on_paper(rows, copy_gbs)
            pictures.append(plot_family(rows, file.with_suffix(".png"), expected))
    return pictures + [plot_parity(file) for file in sorted(results.rglob("train_parity.json"))]


def _on_paper(rows: list[dict[str, Any]], copy_gbs: float) -> list[float | None]:
    """The microseconds that the model of comm_model.py gives each row."""
    expected = [expectation(row, copy_gbs) for row in rows]
    return [None if found is None else found[0].time_us for found in expected]


def plot_family(rows: list[dict[str, Any]], path: Path, expected: Sequence[float | None] = ()) -> Path:
    """One line a case: the floor at 1, dsv3 filled, the peers hollow, what was `expected` a cross, on a logarithmic axis."""
    names = list(dict.fromkeys(name for row in rows for name in row["baselines"]))
    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.42 * len(rows)), layout="constrained")
    for y, row in enumerate(rows):
        floor, ours = row["floor_us"], row["time_us"]
        ratios = [time / floor for time in (ours, *row["baselines"].values())]
        axes.plot([1, max(ratios)], [y, y], color="#dddddd", linewidth=1, zorder=1)
        for name, time in row["baselines"].items():
            style = names.index(name) % len(PEERS)
            options = {"edgecolors": PEERS[style], "marker": MARKERS[style], "facecolors": "none"}
            axes.scatter(time / floor, y, s=40, zorder=2, **options)
        axes.scatter(ours / floor, y, s=60, color=OURS, zorder=3)
        if expected and expected[y] is not None:
            axes.scatter(expected[y] / floor, y, s=50, color="black", marker="x", zorder=4)
        axes.annotate(
            f"{ours:.4g} us", (1.01, y), xycoords=("axes fraction", "data"), va="center", color=OURS, fontsize=9
        )
    _finish(axes, rows, names, on_paper=any(time is not None for time in expected))
    several = f"{rows[0]['case']['ranks']} x " if path.stem == "comm" and "link_gbs" in rows[0]["case"] else ""
    figure.suptitle(f"{path.stem} on {several}{rows[0]['gpu']}, {rows[0]['date'][:10]}", x=0.01, ha="left")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _finish(axes: Any, rows: list[dict[str, Any]], names: list[str], *, on_paper: bool) -> None:
    """Axis, labels and a legend with every peer, also those that the first case lacks."""
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    ticks = next(ticks for largest, ticks in TICKS.items() if axes.get_xlim()[1] <= largest)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    labels = [textwrap.fill(f"{row['op']}  {describe(row['case'])}", 64) for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("time / floor (black line: the floor of the same run)")
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=OURS, label="dsv3")]
    for i, name in enumerate(names):
        style = {"marker": MARKERS[i % len(MARKERS)], "markeredgecolor": PEERS[i % len(PEERS)]}
        handles.append(plt.Line2D([], [], linestyle="", markerfacecolor="none", label=name, **style))
    if on_paper:
        handles.append(plt.Line2D([], [], marker="x", linestyle="", color="black", label="on paper (bench.comm_model)"))
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def _percent(values: list[float], of: list[float]) -> list[float]:
    return [100 * (x / y - 1) for x, y in zip(values, of, strict=True)]


def plot_parity(file: Path) -> Path:
    """What bench.parity wrote: the mean losses of its three runs, and below how far they are from bf16's, each start thinly and
    their mean, which is judged; a PNG beside it."""
    record = json.loads(file.read_text())
    starts, window, bound = record["means"], record["window"], 100 * record["bound"]
    means = {name: [statistics.fmean(window) for window in zip(*runs, strict=True)] for name, runs in starts.items()}
    steps = [window * (i + 1) for i in range(len(means["bf16"]))]
    figure, (top, below) = plt.subplots(2, 1, sharex=True, figsize=(9, 7), height_ratios=(3, 2), layout="constrained")
    for name, (color, label) in RUNS.items():
        style = {"color": color, "label": label, "marker": ".", "linestyle": "--" if name == "control" else "-"}
        top.plot(steps, means[name], **style)
        if name != "bf16":
            for mine, bf16 in zip(starts[name], starts["bf16"], strict=True):
                below.plot(
                    steps, _percent(mine, bf16), color=color, linewidth=0.7, alpha=0.5, linestyle=style["linestyle"]
                )
            below.plot(steps, _percent(means[name], means["bf16"]), **style)
    below.axhline(0, color=RUNS["bf16"][0], linewidth=1)
    for limit in (-bound, bound):
        below.axhline(limit, color="#8a8a8a", linewidth=1, linestyle=(0, (4, 3)))
    below.annotate(f"bound {bound:.3g}%", (steps[-1], bound), xytext=(0, 3), textcoords="offset points", ha="right")
    for axes in (top, below):
        axes.axvspan(0, record["warmup_steps"], color="#f0f0f0", zorder=0)  # not judged
        axes.spines[["top", "right"]].set_visible(False)
    top.set_ylabel(f"training loss, nats a token: means of {window} steps")
    top.legend(frameon=False)
    below.set(xlabel="step (grey: the learning rate warms up; thin lines: single starts)", xlim=(0, None))
    below.set_ylabel("difference from bf16, %")
    figure.suptitle(f"{record['title']} on {record['gpu']}, {record['date'][:10]}", x=0.01, ha="left")
    figure.savefig(file.with_suffix(".png"), dpi=120)
    plt.close(figure)
    return file.with_suffix(".png")
