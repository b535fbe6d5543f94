"""Processes that work together, and a GPU whose kernels of several run at the same time; for benchmarks and tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from bench.results import ROOT


def run_on_nodes(
    nodes: int,
    ranks: int,
    command: list[str],
    *,
    env: dict[str, str] | None = None,
    shown: bool = False,
    timeout: float = 120,
) -> str:
    """A torchrun a node, as on so many machines, each with `ranks` processes of `python command...`; returns what the first
    said as errors. shown: what they print is seen as it comes. Raises RuntimeError with the end of what was said where one
    fails, or all take longer than `timeout` seconds; then none is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc-per-node", str(ranks)]
    at = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    out = None if shown else subprocess.DEVNULL
    with ExitStack() as files:
        errors = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(nodes)]
        started = [
            subprocess.Popen(
                [*torchrun, "--node-rank", str(node), *at, *command], cwd=ROOT, env=env, stdout=out, stderr=errors[node]
            )
            for node in range(nodes)
        ]
        try:
            late = not _wait(started, timeout)
        finally:
            for run in started:
                run.terminate()  # torchrun ends its processes then
            for run in started:
                try:
                    run.wait(30)
                except subprocess.TimeoutExpired:
                    run.kill()
        for file in errors:
            file.seek(0)
        said = [file.read() for file in errors]
    failed = [text for run, text in zip(started, said, strict=True) if run.returncode > 0]
    if late or failed:
        why = f"no end after {timeout:.0f} seconds" if late else f"{len(failed)} of {nodes} torchruns failed"
        raise RuntimeError(f"{why}: {(failed or said)[0].strip()[-3000:]}")
    return said[0]


def _wait(started: list[subprocess.Popen[str]], timeout: float) -> bool:
    """Until all have ended or one has failed; False where they take longer."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        codes = [run.poll() for run in started]
        if None not in codes or any(codes):
            return True
        time.sleep(0.1)
    return False


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
