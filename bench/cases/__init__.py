"""What a benchmark case is. One module a family beside this one; each has `cases(tiny) -> list[Case]`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Baseline:
    """A peer of an op.

    function: called with an input set; returns a tensor or a sequence of tensors, compared with the op's first results.
    compiled: goes through torch.compile, static shapes, default mode.
    binds: `function(*inputs)` prepares state (an optimizer, a forward pass) and returns the call to time.
    split: `split(*inputs)` gives the arguments of several calls which together make up one; their results are chained.
    tolerance: largest relative L2 difference from the op's results; None where it computes something else.
    """

    function: Callable[..., Any]
    compiled: bool = False
    binds: bool = False
    split: Callable[..., Iterable[tuple[Any, ...]]] | None = None
    tolerance: float | None = 5e-3


@dataclass(frozen=True)
class Timing:
    """What was measured: microseconds a call of the op and of every baseline; facts that a case found out while it
    measured itself, which join its `case`; one line for every baseline that failed."""

    time_us: float
    baselines: dict[str, float]
    facts: dict[str, float] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """One row of a results file.

    op: name of the primitive, torch.ops.dsv3.<op>.
    case: what distinguishes the row from others of the op; keys as in the README.
    flops, bytes: the work, and the fewest bytes that any implementation moves through device memory.
    inputs: draws one input set (a tuple, lists of tensors allowed) on a device.
    run: the op on an input set; returns every tensor to compare, mutated inputs among them.
    published: microseconds that others have published, under names that begin with "published": they stand among the
        baselines, but nobody measured them here.
    restore: positions of inputs that a call spoils for the next one; they are refilled before every replay.
    fp8: the flops are those of FP8 products, whose rate sets the floor; otherwise that of bf16 products does.
    measure: for what no CUDA graph can hold: measure(device, quick) times op and baselines itself.
    """

    op: str
    case: Mapping[str, int | float | str | bool]
    flops: float
    bytes: float
    inputs: Callable[[torch.device], tuple[Any, ...]] = lambda device: ()
    run: Callable[..., Any] = lambda: ()
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)
    restore: tuple[int, ...] = ()
    fp8: bool = False
    measure: Callable[[torch.device, bool], Timing] | None = None

    @property
    def title(self) -> str:
        """op and case on one line."""
        return f"{self.op} {' '.join(f'{key}={value}' for key, value in self.case.items())}"


def peers(function: Callable[..., Any], **others: Baseline) -> dict[str, Baseline]:
    """The baselines that every op has: its reference eagerly and through torch.compile; then the others."""
    return {"torch": Baseline(function), "torch.compile": Baseline(function, compiled=True), **others}


def families() -> list[str]:
    """Names of the modules beside this one."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")


def load(family: str, *, tiny: bool) -> list[Case]:
    """The cases of a family, at full or at tiny sizes: the same list, entry by entry."""
    return importlib.import_module(f"bench.cases.{family}").cases(tiny)
