"""One GPU for several processes, whose kernels run at the same time; for benchmarks and tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


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
