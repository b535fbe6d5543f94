"""`python -m bench tests`: runs the tests on this GPU and records how many passed, a family, in tests.json."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest

from bench.results import ROOT, Environment, csrc_sha

MAX_WORKERS = 12  # each holds a CUDA context and what its largest test needs
FAMILIES = ("quant", "norm", "gemm", "attention", "moe", "decode", "comm", "loss", "optim")  # the folders of csrc


def family_of(path: str, root: Path = ROOT) -> str:
    """The family that a test file (relative to the root) belongs to: tests/ops/test_<x>.py to the folder of csrc named x,
    or to the one that holds x.cu; those of tests/comm to "comm"; all else to "model"."""
    file = Path(path)
    name = file.stem.removeprefix("test_")
    if file.parent.as_posix() == "tests/comm":
        return "comm"
    if file.parent.as_posix() != "tests/ops":
        return "model"
    if name in FAMILIES:
        return name
    kernels = sorted(root.glob(f"csrc/*/{name}.cu"))
    return kernels[0].parent.name if kernels else "model"


class Tally:
    """pytest plugin: counts outcomes a family. An error outside the test's own call counts as a failure."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.counts: dict[str, Counter[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._count(report.nodeid, report.outcome)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self._count(report.nodeid, report.outcome)

    def _count(self, nodeid: str, outcome: str) -> None:
        family = family_of(nodeid.split("::")[0], self.root)
        self.counts.setdefault(family, Counter())[outcome] += 1


def files_of(families: list[str], root: Path = ROOT) -> list[str]:
    """The test files of families; of all if none is named."""
    files = sorted(path.relative_to(root).as_posix() for path in (root / "tests").rglob("test_*.py"))
    return [path for path in files if not families or family_of(path, root) in families]


def parallel() -> list[str]:
    """Options of pytest-xdist, where it is installed and there are cores for it.

    A file goes to one worker, since its tests share what its fixtures made, and files are taken in the order in which they
    are named. tests/conftest.py divides the cores among the workers.
    """
    workers = min(MAX_WORKERS, (os.cpu_count() or 1) * 3 // 4)
    installed = importlib.util.find_spec("xdist") is not None
    return ["-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"] if installed and workers > 1 else []


def record(path: Path, counts: dict[str, Counter[str]], env: Environment, seconds: float) -> None:
    """Replaces the entries of the families that were run; the others stay as they are. `seconds`: of the whole run."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    for family, count in counts.items():
        known[family] = {
            "commit": env.commit,
            "csrc_sha": csrc_sha(family, copied=env.copied),
            **{outcome: count[outcome] for outcome in ("passed", "failed", "skipped")},
            "seconds": round(seconds, 1),
            "gpu": env.gpu,
            "torch": env.torch,
            "date": env.date,
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


def run_tests(families: list[str], out: Path, env: Environment) -> int:
    """Runs whole families, never a selection of their tests, so that the counts mean something; pytest's exit code. Tests
    that need the GPU for themselves come last, one by one. A run that is interrupted records nothing."""
    files = files_of(families)
    if not files:
        raise ValueError(f"no tests of {', '.join(families)}; families are {', '.join((*FAMILIES, 'model'))}")
    tally, start = Tally(), time.monotonic()
    paths = [
        str(ROOT / file) for file in reversed(files)
    ]  # train and the top folder first: they start processes, which last
    none, codes = pytest.ExitCode.NO_TESTS_COLLECTED, []
    for options in ([*parallel(), "-m", "not alone"], ["-m", "alone"]):
        codes.append(pytest.main([f"--rootdir={ROOT}", *options, *paths], plugins=[tally]))
        if codes[-1] == pytest.ExitCode.INTERRUPTED:
            return int(codes[-1])
    record(out / "tests.json", tally.counts, env, time.monotonic() - start)
    return max((int(code) for code in codes if code != none), default=int(none))
