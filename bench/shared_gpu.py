"""Processes that work together, and a GPU whose kernels of several run at the same time; for benchmarks and tests."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from bench.results import ROOT


def torchrun(
    ranks: int,
    *command: object,
    nodes: int = 1,
    env: Mapping[str, str] | None = None,
    shown: bool = False,
    timeout: float = 200,
) -> subprocess.CompletedProcess[str]:
    """`ranks` processes of `python command...` on each of `nodes`, which are torchruns of this machine; what the first of them
    printed. shown: the output is seen as it comes, and not returned. Raises RuntimeError with the ranks' errors and the end of
    what was said where one fails, or all take longer than `timeout` seconds. No rank is left, unless a torchrun was killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = ["--master-addr", "127.0.0.1", "--master-port", str(free.getsockname()[1])]
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc-per-node", str(ranks), *at]
    words = list(map(str, command))
    with ExitStack() as files:
        out, *errors = (files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(1 + nodes))
        started = [
            subprocess.Popen(
                [*start, "--node-rank", str(node), *words],
                cwd=ROOT, env=env, stdout=None if shown else subprocess.DEVNULL if node else out, stderr=errors[node],
            )
            for node in range(nodes)
        ]  # fmt: skip
        try:
            _wait(started, timeout)
            codes = [run.poll() for run in started]
        finally:
            _end(started)
        printed, *said = (_read(file) for file in (out, *errors))
    failed = [text for code, text in zip(codes, said, strict=True) if code]
    if failed or None in codes:
        why = f"{len(failed)} of {nodes} torchruns failed" if failed else f"no end after {timeout:.0f} seconds"
        text = (failed or said)[0].strip()
        errors = [line for line in text.splitlines() if line.startswith("[rank") and "Error" in line]
        raise RuntimeError(f"{why}: {'; '.join(errors)[:500]}\n{text[-3000:]}")
    return subprocess.CompletedProcess(words, 0, printed, said[0])


def _wait(started: list[subprocess.Popen[str]], timeout: float) -> None:
    """Until all have ended, one has failed, or they have taken too long."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        codes = [run.poll() for run in started]
        if None not in codes or any(codes):
            return
        time.sleep(0.1)


def _end(started: list[subprocess.Popen[str]]) -> None:
    """Ends those that still run, and the ranks of all: torchrun ends its own, unless it is killed or they do not listen."""
    ranks = [rank for run in started for rank in descendants(run.pid)]
    for run in started:
        run.terminate()
    for run in started:
        try:
            run.wait(30)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)


def descendants(process: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    try:
        lists = [thread.read_text().split() for thread in Path(f"/proc/{process}/task").glob("*/children")]
    except OSError:  # it has ended
        return []
    return [found for child in map(int, itertools.chain(*lists)) for found in (child, *descendants(child))]


def _read(file: TextIO) -> str:
    file.seek(0)
    return file.read()


@contextmanager
def shared_gpu() -> Iterator[dict[str, str]]:
    """The environment of processes whose kernels are to run on a GPU at the same time: under a daemon of NVIDIA's MPS that
    lives as long as this context. Where there is none they take turns, so that kernels that wait for each other are slow."""
    control = shutil.which("nvidia-cuda-mps-control")
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        if control is None or subprocess.run([control, "-d"], env=env, capture_output=True, timeout=30).returncode != 0:
            yield dict(os.environ)
            return
        hidden = (
            {"CUDA_VISIBLE_DEVICES": _renumbered(env["CUDA_VISIBLE_DEVICES"])} if "CUDA_VISIBLE_DEVICES" in env else {}
        )
        try:
            yield {**env, **hidden}
        finally:
            subprocess.run([control], input="quit\n", text=True, env=env, capture_output=True, timeout=30)


def _renumbered(visible: str) -> str:
    """The devices that a daemon has been shown, as its clients call them: it numbers them from 0."""
    return ",".join(str(i) for i, _ in enumerate(visible.split(",")))
