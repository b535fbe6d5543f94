"""Rows for a reader in a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def best_baseline(row: dict[str, Any]) -> tuple[str, float] | None:
    """Name and time of the fastest baseline that was measured."""
    measured = [(name, time) for name, time in row["baselines"].items() if not name.startswith("published")]
    return min(measured, key=lambda item: item[1], default=None)


def describe(case: dict[str, Any]) -> str:
    """A case on one line: `4096 x 7168` for tokens and hidden, then what else there is; flags only where set."""
    sizes = " x ".join(str(case[key]) for key in ("tokens", "hidden") if key in case)
    others = [(key, value) for key, value in case.items() if key not in ("tokens", "hidden") and value is not False]
    rest = [key if value is True else f"{key} {value}" for key, value in others]
    return ", ".join([sizes, *rest] if sizes else rest)


def print_table(console: Console, family: str, rows: list[dict[str, Any]]) -> None:
    """One line a row: time, floor, rates, the share of the copy bandwidth, and how many times slower the best peer is."""
    gpu = rows[0]["gpu"]
    table = Table(title=f"{family} on {gpu}", title_justify="left", caption_justify="left")
    table.add_column("op")
    table.add_column("case")
    for name in ("us", "floor us", "GB/s", "of copy", "TFLOP/s", "vs torch.compile", "vs best peer"):
        table.add_column(name, justify="right")
    table.add_column("best peer")
    for row in rows:
        best = best_baseline(row)
        compiled = row["baselines"].get("torch.compile")
        table.add_row(
            row["op"],
            describe(row["case"]),
            f"{row['time_us']:.1f}",
            f"{row['floor_us']:.1f}",
            f"{row['gbs']:.0f}",
            f"{row['copy_fraction']:.1%}",
            f"{row['tflops']:.1f}",
            f"{compiled / row['time_us']:.2f}x" if compiled else "",
            f"{best[1] / row['time_us']:.2f}x" if best else "",
            f"{best[0]} {best[1]:.1f}" if best else "",
        )
    console.print(table)
