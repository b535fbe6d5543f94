"""The files under bench/results/<gpu>/: one JSON line a case, and what identifies a measurement."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case, Timing
from bench.timing import Ceilings
from dsv3.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
APART = ("train_parity",)  # ops whose rows a command of their own writes, into the file of a family
KEYS = (
    "op", "case", "time_us", "flops", "bytes", "tflops", "gbs", "floor_us", "copy_fraction", "baselines",
    "gpu", "driver", "torch", "cuda", "commit", "csrc_sha", "date",
)  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """Where and when a run took place."""

    gpu: str
    driver: str
    torch: str
    cuda: str
    commit: str
    date: str
    copied: bool = False  # the tree came without its history: what git says of it, if anything, may be of older files


def _output(*command: str, cwd: Path = ROOT) -> str | None:
    try:
        return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def head_commit() -> str:
    """The commit that is checked out; empty where the tree is no git checkout."""
    return (_output("git", "rev-parse", "HEAD") or "").strip()


def environment(commit: str | None = None) -> Environment:
    """Describes this machine and tree. `commit` names the tree where it is no git checkout; ValueError without either."""
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    named, commit = commit, commit or head_commit()
    if not commit:
        raise ValueError(f"{ROOT} is no git checkout with a commit: name the sources with --commit")
    return Environment(
        gpu=torch.cuda.get_device_name(),
        driver=driver.splitlines()[0].strip() if driver else "unknown",
        torch=torch.__version__,
        cuda=torch.version.cuda or "none",
        commit=commit,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        copied=named is not None,
    )


def gpu_folder(gpu: str, count: int = 1) -> str:
    """h100 for "NVIDIA H100 80GB HBM3", h100-x8 for eight of them."""
    found = re.search(r"\b[A-Z]+\d+[A-Z]*\b", gpu)
    name = found[0].lower() if found else re.sub(r"\W+", "-", gpu).lower()
    return name if count == 1 else f"{name}-x{count}"


def _files(root: Path, folders: list[str], copied: bool) -> list[str]:
    """Tracked files as paths from the root; in a copied tree, or where git knows none, all files but build products."""
    tracked = None if copied else _output("git", "ls-files", "-z", "--", *folders, cwd=root)
    if tracked:
        return [path for path in tracked.split("\0") if path and (root / path).is_file()]
    found = [path for folder in folders for path in (root / folder).rglob("*") if path.is_file()]
    return [path.relative_to(root).as_posix() for path in found if path.suffix not in {".pyc", ".so"}]


def csrc_sha(family: str, root: Path = ROOT, *, copied: bool = False) -> str:
    """Names the sources that a measurement of a family depends on.

    sha256 over the tracked files under csrc/common, csrc/hopper and csrc/<family> (family model: csrc and python/dsv3),
    but *.md, sorted as strings by path, each as path, NUL, content, NUL; the first 16 hex digits.
    """
    folders = ["csrc", "python/dsv3"] if family == "model" else [f"csrc/{x}" for x in ("common", "hopper", family)]
    digest = hashlib.sha256()
    for path in sorted(set(_files(root, folders, copied))):
        if not path.endswith(".md"):
            digest.update(path.encode() + b"\0" + (root / path).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def make_row(case: Case, timing: Timing, *, ceilings: Ceilings, env: Environment, sha: str) -> dict[str, Any]:
    """One row: times in microseconds, tflops and gbs from the case's own flops and bytes."""
    time_us = timing.time_us
    gbs = case.bytes / time_us / 1e3
    values = {
        "op": case.op,
        "case": {**case.case, **timing.facts},
        "time_us": round(time_us, 3),
        "flops": int(case.flops),
        "bytes": int(case.bytes),
        "tflops": round(case.flops / time_us / 1e6, 3),
        "gbs": round(gbs, 1),
        "floor_us": round(ceilings.floor_us(case), 3),
        "copy_fraction": round(gbs / ceilings.copy_gbs, 4),
        "baselines": {name: round(time, 3) for name, time in timing.baselines.items()},
        "csrc_sha": sha,
        **asdict(env),
    }
    return {key: values[key] for key in KEYS}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rewrites a family's file, in which rows of APART stay."""
    apart = [row for row in read_rows(path) if row["op"] in APART] if path.is_file() else []
    _write(path, [*rows, *apart])


def write_apart(path: Path, row: dict[str, Any]) -> None:
    """Puts a row of APART in the place of the one before, and leaves the family's others alone."""
    others = [other for other in read_rows(path) if other["op"] != row["op"]] if path.is_file() else []
    _write(path, [*others, row])


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a family's file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
