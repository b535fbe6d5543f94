"""What people see: a progress bar on a terminal, plain lines elsewhere, and what they can type next."""

from __future__ import annotations

import math
import shutil
import sys
import sysconfig
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from dsv3.train.metrics import Callback, EvalReport, StepReport
from dsv3.train.trainer import Trainer

PLAIN_SECONDS = 10.0  # between lines where there is no terminal
SMOOTHING = 0.95  # share of the earlier steps in what is shown


def clock(seconds: float) -> str:
    """1:05 for 65 seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


def printable(text: str) -> str:
    """`text` without what could steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def command(name: str = "dsv3", module: str = "dsv3") -> str:
    """What starts this dsv3, or torch's torchrun for it, in the shell of whoever reads it: `name` where that is on the PATH,
    otherwise its script (in a .venv that is not activated) or, where dsv3 or the script is not installed at all, python with
    the package's folder and the module."""
    scripts, found = Path(sysconfig.get_path("scripts")), shutil.which(name)
    script = scripts / name
    if script.exists() and (scripts / "dsv3").exists():
        return name if found and script.samefile(found) else str(_from_here(script))
    python = shutil.which("python3")
    interpreter = "python3" if python and Path(sys.executable).samefile(python) else sys.executable
    return f"PYTHONPATH={_from_here(Path(__file__).resolve().parents[1])} {interpreter} -m {module}"


def _from_here(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


class ShowProgress(Callback):
    """Shows loss, bits per byte, MTP loss, tokens a second and time left, smoothed over some twenty steps."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.last: StepReport | None = None
        self._smooth: dict[str, float] = {}
        self._shown = time.monotonic()
        self._bar: Progress | None = None
        self._seconds_before = self._progress_before = 0.0

    def on_start(self, trainer: Trainer) -> None:
        self._progress_before = trainer.progress
        if self.console.is_terminal:
            columns = BarColumn(bar_width=20), TextColumn("{task.percentage:3.0f}%  {task.fields[text]}")
            self._bar = Progress(*columns, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task("", total=1.0, text="first step", completed=self._progress_before)

    def on_step(self, report: StepReport) -> None:
        self.last = report
        if not self._smooth:
            self._seconds_before, self._progress_before = report.seconds, report.progress
        for name in ("ce", "mtp", "bits_per_byte", "tokens_per_s"):
            value, before = getattr(report, name), self._smooth.get(name, math.nan)
            if not math.isfinite(before) or not before:  # the first, or MTP has just joined
                self._smooth[name] = value
            elif math.isfinite(value):  # a skipped step's is not
                self._smooth[name] = value + SMOOTHING * (before - value)
        if self._bar is not None:
            self._bar.update(self._task, completed=report.progress, text=self._text(report))
        elif time.monotonic() - self._shown > PLAIN_SECONDS:
            self._shown = time.monotonic()
            self.console.print(f"{report.progress:4.0%}  {self._text(report)}", soft_wrap=True)

    def on_eval(self, report: EvalReport) -> None:
        self.console.print(f"step {report.step}: validation {report.bits_per_byte:.3f} bits/byte", soft_wrap=True)

    def on_end(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.progress)
            self._bar.stop()

    def _text(self, report: StepReport) -> str:
        s = self._smooth
        done, spent = report.progress - self._progress_before, report.seconds - self._seconds_before
        left = clock(spent / done * max(1 - report.progress, 0)) if done > 0 else "-:--"
        mtp = f"MTP {s['mtp']:.3f}  " if s["mtp"] else ""
        skipped = f"  {report.skipped_total} steps skipped" if report.skipped_total else ""
        loss = f"loss {s['ce']:.3f}  bits/byte {s['bits_per_byte']:.3f}  {mtp}"
        return f"{loss}{s['tokens_per_s']:,.0f} tok/s  {left} left{skipped}"
