"""What a training run reports: one StepReport a step, callbacks, metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dsv3.files import write_whole

if TYPE_CHECKING:
    from dsv3.train.trainer import Trainer


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, known on the host a step after it was issued. Losses are mean nats a token."""

    step: int  # 1 for the first; counts skipped steps
    loss: float  # total: ce + mtp_weight * mtp + balance
    ce: float
    mtp: float
    balance: float
    bits_per_byte: float  # of ce, on the training text
    tokens: int  # since the start of the run, this step included
    seconds: float  # since the start of the run, earlier parts of a resumed run included
    tokens_per_s: float
    progress: float  # fraction of the run behind this step, 0 to 1
    lr: float
    mtp_weight: float
    gamma: float
    batch: int  # sequences
    grad_norm: float  # before clipping
    skipped: bool  # not finite: nothing was updated
    skipped_total: int
    skipped_in_row: int
    expert_load: Tensor  # int64 [MoE layers incl. MTP's, experts], tokens of this step

    @property
    def load_imbalance(self) -> float:
        """Largest expert load over the mean one, in the worst layer; 1 is perfect balance, 0 no experts."""
        load = self.expert_load.double()
        return float((load.amax(-1) / load.mean(-1).clamp(min=1)).max()) if load.numel() else 0.0


@dataclass(frozen=True)
class EvalReport:
    """Validation after `step` steps. nats: mean cross-entropy a target token; `full` if all of the text was scored."""

    step: int
    nats: float
    bits_per_byte: float
    targets: int
    full: bool


class Callback:
    """Follows a run; every method may be left out. Called on the first rank only."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, after a checkpoint was loaded."""

    def on_step(self, report: StepReport) -> None:
        """A step late."""

    def on_eval(self, report: EvalReport) -> None:
        """After each evaluation."""

    def on_save(self, checkpoint: Path) -> None:
        """After a checkpoint is complete."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, however the run ended."""


class MetricsFile(Callback):
    """Appends one JSON line a step (and one an evaluation) to `path`.

    A resumed run first drops the lines of steps that it will do again, and a line cut short by a kill.
    """

    def __init__(self, path: Path, *, resume_after: int = 0, load_every: int = 50) -> None:
        self.load_every = load_every
        kept = _lines_until(path, resume_after) if resume_after else []
        write_whole(path, "".join(kept))
        self._file = path.open("a", buffering=1)

    def on_step(self, report: StepReport) -> None:
        values = {f.name: getattr(report, f.name) for f in dataclasses.fields(report)}
        load = values.pop("expert_load")
        values["load_imbalance"] = report.load_imbalance
        if load.numel() and (report.step == 1 or report.step % self.load_every == 0):
            values["expert_load"] = load.tolist()
        self._write(values)

    def on_eval(self, report: EvalReport) -> None:
        self._write({"step": report.step, "validation": dataclasses.asdict(report)})

    def on_end(self, trainer: Trainer) -> None:
        with contextlib.suppress(OSError):  # every line was flushed when it was written, and _write said if that failed
            self._file.close()

    def _write(self, values: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(_finite(values), allow_nan=False) + "\n")
        except OSError as error:
            raise OSError(f"could not write {self._file.name}: {error.strerror}; checkpoints are intact") from error


class TensorBoard(Callback):
    """TensorBoard events in `folder`; needs the tensorboard package (ImportError without it)."""

    SCALARS = ("loss", "ce", "mtp", "balance", "bits_per_byte", "tokens_per_s", "lr", "grad_norm", "load_imbalance")

    def __init__(self, folder: Path, *, resume_after: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=resume_after + 1 if resume_after else None)

    def on_step(self, report: StepReport) -> None:
        for name in self.SCALARS:
            self._writer.add_scalar(f"train/{name}", getattr(report, name), report.step)

    def on_eval(self, report: EvalReport) -> None:
        self._writer.add_scalar("validation/bits_per_byte", report.bits_per_byte, report.step)

    def on_end(self, trainer: Trainer) -> None:
        self._writer.close()


def _finite(value: Any) -> Any:
    """value, with None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines_until(path: Path, step: int) -> list[str]:
    """The whole lines of `path` about steps up to `step`."""
    kept = []
    if path.is_file():
        for line in path.read_text().splitlines(keepends=True):
            try:
                if not line.endswith("\n") or json.loads(line)["step"] > step:
                    break
            except ValueError:  # cut short
                break
            kept.append(line)
    return kept
