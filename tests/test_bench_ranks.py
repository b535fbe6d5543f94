"""Processes that torchrun starts for benchmarks and tests: what they say comes back, and none is left."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bench.shared_gpu import torchrun

FAILS = "import os, torch.distributed as dist; dist.init_process_group('gloo'); assert os.environ['RANK'] == '0', 'bad rank'"
LASTS = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1], str(os.getpid())).touch(); time.sleep(300)"


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


def test_what_the_first_of_two_nodes_prints(tmp_path: Path) -> None:
    says = "import os, sys; print('rank', os.environ['RANK']); print('oh', file=sys.stderr)"
    done = torchrun(1, script(tmp_path, says), nodes=2)
    assert done.stdout == "rank 0\n"
    assert "oh\n" in done.stderr


def test_a_rank_that_fails_is_named_in_the_first_line(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        torchrun(2, script(tmp_path, FAILS))
    first, *others = str(caught.value).splitlines()
    assert first == "1 of 1 torchruns failed: [rank1]: AssertionError: bad rank"
    assert others


def test_ranks_that_take_too_long_are_ended(tmp_path: Path) -> None:
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"no end after \d+ seconds"):
        torchrun(2, script(tmp_path, LASTS), ranks, timeout=20)
    assert time.monotonic() - begin < 100
    pids = [int(path.name) for path in ranks.iterdir()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
