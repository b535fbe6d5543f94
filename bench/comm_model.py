"""Expected times of dispatch and combine from bytes, messages and latencies: the plan on paper that a run is compared with.

    python -m bench.comm_model                                       the tables of csrc/comm/README.md, beside published figures
    python -m bench.comm_model --check bench/results/*/comm.jsonl    expected beside measured
    python -m bench.comm_model --case ranks=16 ib_gbs=25 slots=4     one case: any field of Job and Machine

Routes are drawn by the gate's rule (comm_traffic.py), then every piece of every token moves through the rings as csrc/comm
moves it (comm_rings.py). Between nodes a token goes over InfiniBand to the GPU with its own rank's index there, which forwards
it over NVLink; back, that GPU adds up its node's sums. Low-latency calls are one shot, and a formula. Nothing is random but the
routes, whose seed is fixed, and nothing is fitted to a run.

Not in the model: what a warp computes, its instructions and the cast; contention for issue slots; the host. Where kernels spend
more than bytes and latencies account for, the expectation is too fast, and the ratio says by how much.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.comm_rings import Simulation
from bench.comm_traffic import NUM_SMS, OPS, SPARE_SMS, TILE, Job, Machine, counted_bytes, crossings, draw_routes

LAUNCHES = {"dispatch": 6, "combine": 1}  # permutation (2), exchange, positions, dispatch, order of the scales
H100_SMS = 132


@dataclass(frozen=True)
class Result:
    """time_us: launches, exchange and the rings. floor_us: the busiest pipe alone. `link` and `ib`: bytes (flags and meta
    included) and messages that leave the busiest rank. figure_gbs: as DeepEP's tests count it (see `counted_bytes`)."""

    op: str
    time_us: float
    floor_us: float
    limit: str
    busy: dict[str, float]
    link_bytes: int
    link_messages: int
    ib_bytes: int
    ib_messages: int
    figure_gbs: float


def predict(op: str, job: Job, machine: Machine, routes: np.ndarray | None = None, sample: int | None = None) -> Result:
    """A dispatch or combine through the rings.

    routes: of draw_routes(job), where they are there already; sample: channels to simulate, None: all for 8 ranks, and fewer
    for more. Of a few channels the busiest rank has more than its part, by chance: the time is scaled by that.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    routes = draw_routes(job) if routes is None else routes
    channels = machine.channels or machine.num_sms
    sample = max(1, min(channels, 160 // job.ranks)) if sample is None else sample
    if not 1 <= sample <= channels:
        raise ValueError(f"sample must be in 1..{channels}, got {sample}")
    simulation = Simulation(job, machine, channels, sample)
    time = simulation.run(op, routes)
    seen = np.arange(job.tokens) % channels < sample
    whole, part = (_busiest(*crossings(job, some, op)) for some in (routes, routes[:, seen]))
    scale = whole / job.tokens * int(seen.sum()) / part if part else 1.0
    time = float(time * scale)
    busy = {name: max(pipe.busy for pipe in pipes) * scale for name, pipes in simulation.pipes.items()}
    floor, limit = _limit(busy, time)
    total = time + _around(op, job, machine, routes)
    size, pieces = sum(job.slot_bytes(op)), len(job.slot_bytes(op))
    link, ib = (int(matrix.sum(1).max()) for matrix in crossings(job, routes, op))
    figure = counted_bytes(job, routes, op) / total / 1e3
    return Result(op, total, floor, limit, busy, link * size, link * pieces, ib * size, ib * pieces, figure)


def _limit(busy: dict[str, float], time: float) -> tuple[float, str]:
    """The us of the busiest pipe, and whether it is that or warps that wait for each other."""
    name = max(busy, key=lambda key: busy[key])
    waits = busy[name] <= 0.85 * time
    return busy[name], f"waits ({name} {busy[name] / time:.0%})" if waits else name


def _busiest(link: np.ndarray, ib: np.ndarray) -> int:
    """The most tokens that leave or reach a rank on the medium that is the scarce one."""
    matrix = ib if ib.any() else link
    return int(max(matrix.sum(0).max(), matrix.sum(1).max()))


def _around(op: str, job: Job, machine: Machine, routes: np.ndarray) -> float:
    """Launches; before dispatch the notices and their flags; behind it the scales put in order, read and written once."""
    time = LAUNCHES[op] * machine.launch_us
    if op == "dispatch" and job.ranks > 1:
        time += machine.ib_us if job.nodes > 1 else 3 * machine.link_us
    if op == "dispatch" and job.wire == "fp8":
        rows = routes.sum((0, 1), dtype=np.int64)
        scales = 2 * 4 * math.ceil(job.hidden / TILE) * float(rows.sum() if machine.shared else rows.max())
        time += scales / machine.memory_gbs / 1e3
    return time


def predict_low_latency(op: str, job: Job, machine: Machine, routes: np.ndarray | None = None) -> Result:
    """One shot, a message a (token, expert) straight to its place, as DeepEP's low-latency kernels send them: over NVLink
    within a node, otherwise over InfiniBand from rank to rank. All multiprocessors send, so only wires and memory count.

    Dispatch reads x and writes what arrives; combine reads the experts' rows, writes what arrives and reads it to add it up.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    routes = draw_routes(job) if routes is None else routes
    pairs = routes.sum(1, dtype=np.int64)  # [source, target]
    pairs = pairs.T if op == "combine" else pairs
    size = job.row_bytes(op) + (16 if op == "dispatch" else 0)  # 16: which token it is
    node = np.arange(job.ranks) // job.ranks_per_node
    near = node[:, None] == node[None, :]
    link, ib = pairs * (near & ~np.eye(job.ranks, dtype=bool)), pairs * ~near
    sent, came = int(pairs.sum(1).max()), int(pairs.sum(0).max())
    own = 2 * job.tokens * job.hidden
    memory = own + came * size if op == "dispatch" else sent * size + 2 * came * size + own
    busy = {"memory": memory / machine.memory_gbs / 1e3}
    for name, matrix, gbs in (("link", link, machine.link_gbs), ("ib", ib, machine.ib_gbs)):
        busy |= {f"{name} out": int(matrix.sum(1).max()) * size / gbs / 1e3}
        busy |= {f"{name} in": int(matrix.sum(0).max()) * size / gbs / 1e3}
    wire = 0.0 if job.ranks == 1 else machine.ib_us if job.nodes > 1 else 3 * machine.link_us
    time = machine.launch_us + 2 * machine.memory_us + wire + max(busy.values())
    floor, limit = _limit(busy, time)
    counted = job.tokens * job.topk * size
    out = [int(matrix.sum(1).max()) for matrix in (link, ib)]
    return Result(op, time, floor, limit, busy, out[0] * size, out[0], out[1] * size, out[1], counted / time / 1e3)


# DeepEP's README: GB/s at 4096 tokens, us of the low-latency kernels at 128; H800, where NVLink has 160 GB/s.
PUBLISHED_GBS = {("EP8", "dispatch"): 153, ("EP8", "combine"): 158, ("EP64", "dispatch"): 51, ("EP64", "combine"): 50}
PUBLISHED_US = {("EP8", "dispatch"): 77, ("EP8", "combine"): 114, ("EP64", "dispatch"): 173, ("EP64", "combine"): 314}
SETUPS = [("EP8", 8, 450.0), ("EP8", 8, 160.0), ("EP64", 64, 160.0)]


def plan() -> list[list[str]]:
    """The rows of csrc/comm/README.md's tables, the names of their columns first."""
    head = ["", "NVLink, IB GB/s", "slots on NVLink, IB", "MB", "floor us", "expected us", "limit", "GB/s", "DeepEP's"]
    rows = [head]
    for low in (False, True):
        for name, ranks, gbs in SETUPS:
            job = Job(ranks=ranks, tokens=128 if low else 4096)
            machine, routes = Machine(link_gbs=gbs), draw_routes(job)
            for op in OPS:
                found = predict_low_latency(op, job, machine, routes) if low else predict(op, job, machine, routes)
                published = f"{PUBLISHED_US[name, op]} us" if low else f"{PUBLISHED_GBS[name, op]} GB/s"
                several = job.nodes > 1
                rows.append(
                    [
                        f"{name} {'low-latency ' if low else ''}{op}, {'FP8' if op == 'dispatch' else 'bf16'}",
                        f"{gbs:.0f}, {machine.ib_gbs:.0f}" if several else f"{gbs:.0f}",
                        f"{found.link_messages}, {found.ib_messages}" if several else f"{found.link_messages}",
                        f"{found.link_bytes / 1e6:.1f}" + (f", {found.ib_bytes / 1e6:.1f}" if several else ""),
                        f"{found.floor_us:.0f}",
                        f"{found.time_us:.0f}",
                        found.limit,
                        f"{found.figure_gbs:.0f}",
                        "" if gbs == 450 else published,
                    ]
                )
    return rows


def expectation(row: dict[str, Any], copy_gbs: float) -> tuple[Result, str] | None:
    """What a row of comm was expected to be, whose memory copies so fast, and on how many multiprocessors; None for
    what is not modelled: of few tokens the formula sends pairs, the kernels tokens; nodes of one machine have no network."""
    case, op = row["case"], row["op"].removeprefix("comm_")
    if case["mode"] == "low_latency" or case.get("nodes", 1) > 1:
        return None
    job = Job(**{key: case[key] for key in ("ranks", "tokens", "hidden", "topk", "wire")}, ranks_per_node=case["ranks"])
    shared = "link_gbs" not in case
    spare = min(NUM_SMS, (H100_SMS - SPARE_SMS) // job.ranks) if shared else NUM_SMS
    # On one GPU: a sixth of the 3.6 us that a signalled round trip took there.
    machine = Machine(
        memory_gbs=copy_gbs, num_sms=case.get("num_sms", spare), shared=shared, link_us=0.6 if shared else 0.9
    )
    return predict(op, job, machine), f"{'one GPU, ' if shared else ''}{machine.num_sms} SMs"


def copy_bandwidth(rows: list[dict[str, Any]]) -> float | None:
    """GB/s of the copy among the rows of a file."""
    return next((row["gbs"] for row in rows if row["op"] == "copy"), None)


def compared(path: Path) -> list[list[str]]:
    """Expected beside measured for the rows of a results file; its own copy gives the memory's GB/s."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        copy = copy_bandwidth(rows)
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} is no results file: expected a row in JSON on every line") from None
    if copy is None:
        raise ValueError(f"{path} has no copy bandwidth")
    head = ["op", "case", "floor us", "expected us", "limit", "measured us", "measured / expected"]
    found = [[*head, "GB/s to others", "of the link", "GB/s as DeepEP counts"]]
    for row in rows:
        if not row["op"].startswith("comm_"):
            continue
        case, expected, us = row["case"], expectation(row, copy), row["time_us"]
        result, where = expected if expected is not None else (None, f"{case['transport']}, not modelled")
        plan = [f"{result.floor_us:.0f}", f"{result.time_us:.0f}", result.limit] if result else [""] * 3
        ratio = f"{us / result.time_us:.2f}" if result else ""
        link = case.get("link_gbs")
        share = "" if link is None else f"{link / Machine.link_gbs:.0%}"
        counted = f"{result.figure_gbs * result.time_us / us:.0f}" if result and link else ""
        name = ", ".join([f"{case['ranks']} ranks", where, case["wire"], case["mode"]])
        op = row["op"].removeprefix("comm_")
        found.append([op, name, *plan, f"{us:.0f}", ratio, "" if link is None else f"{link:.0f}", share, counted])
    if len(found) == 1:
        raise ValueError(f"{path} has no rows of comm")
    return found


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _number(key: str, text: str, *, integer: bool) -> float | int:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (integer and not value.is_integer()):
        raise ValueError(f"{key} must be {'an integer' if integer else 'a number'}, got {text!r}")
    return int(value) if integer else value


def one(case: list[str]) -> list[list[str]]:
    """Both ways of a case given as key=value; what is not given is the default."""
    fields = {field.name: field.default for kind in (Job, Machine) for field in dataclasses.fields(kind)}
    given = {}
    for key, _, value in (word.partition("=") for word in case):
        if key not in fields:
            raise ValueError(f"expected fields among {', '.join(fields)}, got {key!r}")
        given[key] = value if key == "wire" else _number(key, value, integer=not isinstance(fields[key], float))
    if "ranks" in given:
        given.setdefault("ranks_per_node", min(8, given["ranks"]))
    chosen = [{f.name: given[f.name] for f in dataclasses.fields(kind) if f.name in given} for kind in (Job, Machine)]
    job, machine = Job(**chosen[0]), Machine(**chosen[1])
    rows = [["op", "floor us", "expected us", "limit", "GB/s", "us of each pipe"]]
    for op in OPS:
        found = predict(op, job, machine)
        pipes = ", ".join(f"{name} {us:.0f}" for name, us in found.busy.items() if us)
        rows.append(
            [op, f"{found.floor_us:.0f}", f"{found.time_us:.0f}", found.limit, f"{found.figure_gbs:.0f}", pipes]
        )
    return rows


def report(check: list[Path], case: list[str] | None) -> None:
    """Prints what was asked for."""
    if not check:
        print(markdown(one(case) if case else plan()))
    for path in check:
        print(
            f"{path}: what a warp computes and the host are not in the expectation, nor are calls of few tokens (the formula "
            "sends pairs, the kernels tokens) and nodes of one machine; the link: NVLink's "
            f"{Machine.link_gbs:.0f} GB/s a direction, as its maker says; DeepEP counts what a rank receives with its own "
            f"tokens, of 2 ranks half of it, which no link carries\n\n{markdown(compared(path))}\n"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.comm_model", description="Expected times of csrc/comm.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", nargs="+", type=Path, metavar="FILE", help="comm.jsonl files to compare with")
    defaults = {field.name: field.default for kind in (Job, Machine) for field in dataclasses.fields(kind)}
    fields = ", ".join(f"{name}={value}" for name, value in defaults.items())
    what.add_argument("--case", nargs="+", metavar="KEY=VALUE", help=f"some of: {fields}")
    args = parser.parse_args(argv)
    try:
        report(args.check or [], args.case)
    except (OSError, ValueError) as error:
        print(f"comm_model: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
