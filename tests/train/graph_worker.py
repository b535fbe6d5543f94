"""What the test of CUDA graphs between processes starts under torchrun: runs without and with them, in FP8, in each of two.
Arguments: tokens, out."""

from __future__ import annotations

import sys
from pathlib import Path

from dsv3 import train
from dsv3.graphs import Graphs
from dsv3.parallel.data import DataParallel
from tests.train.common import Recorder, with_and_without_graphs


def main() -> None:
    parallel = DataParallel.start("cuda")
    captured, capture = [], Graphs._capture
    Graphs._capture = lambda *args: captured.append(args) or capture(*args)
    curves = []
    folders = Path(sys.argv[1]), Path(sys.argv[2])
    for config in with_and_without_graphs(*folders, precision="fp8", batch_start=4):
        recorder = Recorder()
        assert train.run(config, callbacks=[recorder]) == 0
        curves.append(recorder.curve)
        assert bool(captured) == (config.cuda_graphs is None)
    assert curves[0] == curves[1]
    assert len(curves[0]) == (16 if parallel.is_first else 0)
    parallel.stop()


if __name__ == "__main__":
    main()
