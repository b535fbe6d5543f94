"""`dsv3 doctor`: what is installed, which GPU there is, and which ops run natively or why not."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch
from rich.console import Console

import dsv3.ops
from dsv3.comm import nvshmem
from dsv3.ops import registry

REQUIRED = ("numpy", "safetensors", "tokenizers", "rich", "typer")
OPTIONAL = {
    "matplotlib": "pictures of the demo",
    "pyarrow": ".parquet text",
    "tensorboard": "TensorBoard events",
    "transformers": "tests against its DeepseekV3",
}


def report(console: Console | None = None) -> None:
    """Print it all."""
    console = console or Console(highlight=False)
    rows = [
        ("dsv3", dsv3.__version__),
        ("python", f"{platform.python_version()} {platform.machine()} {sys.platform}"),
        ("torch", torch.__version__),  # which says what it was built for
        *((name, _version(name) or "missing") for name in REQUIRED),
        *((name, _version(name) or f"not installed ({use})") for name, use in OPTIONAL.items()),
        ("CPU threads", str(torch.get_num_threads())),
        ("GPU", gpu()),
        ("native module", native_module()),
        ("nvshmem module", nvshmem.objection() or str(nvshmem.native().__file__)),
    ]
    _print(console, rows)
    reason = why_no_native_ops()
    found = [
        (op.name, "native" if op.native and not reason else f"reference: {_why(op, reason)}")
        for op in sorted(registry.OPS.values(), key=lambda op: op.name)
    ]
    console.print("ops")
    _print(console, found)


def gpu() -> str:
    """The first GPU and how many there are, or that there is none."""
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return f"none found ({built})"
    properties = torch.cuda.get_device_properties(0)
    count = torch.cuda.device_count()
    capability = f"compute capability {properties.major}.{properties.minor}"
    return f"{count} x {properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def native_module() -> str:
    """Where the native module lies, or why it is not there."""
    return registry.NATIVE_ERROR or str(registry.native().__file__)


def why_no_native_ops() -> str:
    """Why no op at all can run natively on this machine; empty where ops can."""
    if registry.NATIVE_ERROR:
        return registry.NATIVE_ERROR
    if not torch.cuda.is_available():
        return "no GPU"
    if not registry.is_hopper(torch.device("cuda", 0)):
        return f"{torch.cuda.get_device_name(0)} is not a Hopper GPU"
    return ""


def _why(op: registry.Op, reason: str) -> str:
    return reason if op.native else "no kernel yet"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print(console: Console, rows: list[tuple[str, str]]) -> None:
    """Two columns, a line each: however narrow the terminal is, a path or a reason is neither cut nor wrapped by us."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(f" {name:<{width}}  {value}", markup=False, soft_wrap=True)
