"""What the data-parallel test starts under torchrun: three runs in each of two processes. Arguments: tokens, out,
device."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from dsv3 import train
from dsv3.parallel.data import DataParallel
from dsv3.train import launch
from dsv3.train.metrics import StepReport
from dsv3.train.trainer import Trainer
from tests.train.common import micro, same_losses


class InterruptSecondRank(Trainer):
    """Ctrl-C reaches the second process only, after its 20th report; both must stop at the same step."""

    def _report(self, issued: object) -> StepReport:
        report = super()._report(issued)
        if report.step == 20 and self.parallel.rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return report


def main() -> None:
    torch.set_num_threads(1)
    tokens, out, on = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    parallel = DataParallel.start(on)  # once: gloo cannot meet twice at the same torchrun store
    assert (parallel.rank, parallel.world) == (int(os.environ["RANK"]), 2)
    config = same_losses(tokens, out / "two", device=on)
    launch.Trainer = InterruptSecondRank
    codes = [train.run(config)]
    launch.Trainer = Trainer
    codes.append(train.run(config, resume=True))
    codes.append(train.run(micro(tokens, out / "timed", device=on, max_steps=10**6, max_seconds=1.0)))
    (out / "file").touch()
    try:
        train.run(micro(tokens, out / "file" / "run", device=on))
    except OSError as error:  # of the first rank alone, which writes
        codes.append(type(error).__name__)
    (out / f"codes-{parallel.rank}").write_text(str(codes))
    parallel.stop()


if __name__ == "__main__":
    main()
