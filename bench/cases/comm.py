"""csrc/comm: dispatch and combine of expert parallelism between processes that share the GPU, all of them together one row.

`bytes` are those that count: dispatch reads x once and writes every row of an expert once, combine reads these rows and writes
the output once, summed over the ranks. That each token also passes a ring to each of its ranks costs time and counts nothing.
No speed of a link can be told from it: the links are the GPU's own memory.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import torch

from bench.cases import Case, Timing
from bench.results import ROOT
from bench.shared_gpu import shared_gpu
from dsv3.reference.quant import TILE

WIRES = ("fp8", "bf16")
KINDS = [("static", wire) for wire in WIRES] + [("exact", "fp8")]


def _sizes(tiny: bool) -> dict[str, int]:
    names = "ranks", "tokens", "hidden", "topk"
    return dict(zip(names, (2, 32, 256, 8) if tiny else (8, 4096, 7168, 8), strict=True))


@functools.cache
def _measured(kind: str, tiny: bool, quick: bool) -> dict[str, dict[str, Any]]:
    """What the ranks found, all cases in one start of them, by mode and wire; and collective's, which goes through the host."""
    transport = "ipc" if kind == "cuda" else "collective"
    asked = [
        {**_sizes(tiny), "transport": transport, "mode": mode, "wire": wire, "quick": quick} for mode, wire in KINDS
    ]
    asked += [
        {**_sizes(tiny), "transport": "collective", "mode": "exact", "wire": wire, "quick": True} for wire in WIRES
    ]
    ranks = str(asked[0]["ranks"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    with shared_gpu() if kind == "cuda" else nullcontext() as env:
        done = subprocess.run(
            [*command, "-m", "bench.comm_worker", json.dumps(asked)],
            cwd=ROOT, env=env, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"the ranks failed: {done.stderr.strip()[-500:]}")
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    names = [f"{mode} {wire}" for mode, wire in KINDS] + [f"collective {wire}" for wire in WIRES]
    return dict(zip(names, found, strict=True))


def _case(op: str, mode: str, wire: str, tiny: bool) -> Case:
    sizes = _sizes(tiny)

    def measure(device: torch.device, quick: bool) -> Timing:
        found = _measured(device.type, tiny, quick)
        time_us = found[f"{mode} {wire}"][op]
        return Timing(time_us, {"all_to_all_single over gloo": found[f"collective {wire}"][op]})

    tokens, hidden = sizes["ranks"] * sizes["tokens"], sizes["hidden"]
    row = hidden + 4 * -(-hidden // TILE) if wire == "fp8" and op == "dispatch" else 2 * hidden
    return Case(
        op=f"comm_{op}",
        case={**sizes, "transport": "ipc", "mode": mode, "wire": wire},
        flops=tokens * hidden * sizes["topk"] if op == "combine" else 0,
        bytes=tokens * (2 * hidden + sizes["topk"] * row),
        measure=measure,
    )


def cases(tiny: bool) -> list[Case]:
    """The way back does not depend on the wire's FP8."""
    dispatches = [_case("dispatch", mode, wire, tiny) for mode, wire in KINDS]
    return [*dispatches, _case("combine", "static", "bf16", tiny)]
