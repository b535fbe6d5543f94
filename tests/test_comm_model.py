"""The model of dispatch and combine: what it counts is what the routes say, and where the answer is known it gives that."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import comm_model, comm_rings, comm_traffic
from bench.comm_model import compared, main, predict, predict_low_latency
from bench.comm_rings import Simulation
from bench.comm_traffic import OPS, Job, Machine, counted_bytes, crossings, draw_routes
from bench.plot import _on_paper

ROOT = Path(__file__).parent.parent
INF = float("inf")
WIDE = {f"{name}_gbs": INF for name in ("link", "ib", "memory", "sm_read", "sm_write")}
PROMPT = {f"{name}_us": 0.0 for name in ("link", "ib", "memory", "launch")}
JOBS = [
    Job(ranks=4, ranks_per_node=4, tokens=40),
    Job(ranks=8, ranks_per_node=4, tokens=24, wire="bf16"),
    Job(ranks=8, ranks_per_node=1, tokens=9),
    Job(ranks=2, ranks_per_node=2, tokens=30, hidden=384, groups=1, kept=1),
]


def brute_force(job: Job, routes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens over NVLink and InfiniBand on the way there, one at a time."""
    link, ib = np.zeros((job.ranks, job.ranks), int), np.zeros((job.ranks, job.ranks), int)
    width = job.ranks_per_node
    for source in range(job.ranks):
        for token in range(job.tokens):
            entered = set()
            for target in range(job.ranks):
                if routes[source, token, target] == 0:
                    continue
                at = source
                if target // width != source // width:
                    at = target // width * width + source % width
                    entered.add(at)
                link[at, target] += at != target
            for at in entered:
                ib[source, at] += 1
    return link, ib


def test_the_gate_keeps_groups() -> None:
    job = Job(ranks=64, ranks_per_node=8, tokens=200)
    routes = draw_routes(job)
    assert (routes.sum(-1) == job.topk).all()
    groups = (routes.reshape(64, 200, 8, 8).sum(-1) > 0).sum(-1)  # a node of 8 ranks is a group of 32 experts
    assert groups.max() == job.kept
    one = Job(tokens=500)
    scores = np.random.default_rng([one.seed, 3]).random((500, 8, 32), np.float32)  # as rank 3 draws them
    for token in range(0, 500, 50):
        best = [sorted(group)[-1] + sorted(group)[-2] for group in scores[token]]
        kept = sorted(range(8), key=lambda group: -best[group])[:4]
        ranked = sorted(((scores[token, g, e], g) for g in kept for e in range(32)), reverse=True)[:8]
        assert draw_routes(one)[3, token].tolist() == [sum(g == rank for _, g in ranked) for rank in range(8)]


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_crossings_are_those_of_the_routes(job: Job) -> None:
    routes = draw_routes(job)
    link, ib = brute_force(job, routes)
    for op in OPS:
        found = crossings(job, routes, op)
        for matrix, expected in zip(found, (link, ib), strict=True):
            assert (matrix == (expected.T if op == "combine" else expected)).all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("job", JOBS, ids=str)
def test_every_token_crosses_once(job: Job, op: str) -> None:
    """What the simulation has moved, ring by ring and byte by byte."""
    routes, machine = draw_routes(job), Machine(channels=3, num_sms=3, slots=2)
    simulation = Simulation(job, machine, 3, 3)
    simulation.run(op, routes)
    sizes, width = job.slot_bytes(op), job.ranks_per_node
    link, ib = (np.zeros((job.ranks, job.ranks), int) for _ in range(2))
    rows = 0
    for (source, target, *_), items in simulation.rings.items():
        rows += sum(item.rows for item in items)
        matrix = link if source // width == target // width else ib
        matrix[source, target] += len(items) if source != target else 0
    expected = crossings(job, routes, op)
    assert (link == expected[0] * len(sizes)).all()
    assert (ib == expected[1] * len(sizes)).all()
    assert rows == job.ranks * job.tokens * job.topk * len(sizes)
    for name, matrix, gbs in (("link", link, machine.link_gbs), ("ib", ib, machine.ib_gbs)):
        size = sum(sizes) / len(sizes)
        for side, axis in (("out", 1), ("in", 0)):
            moved = [pipe.busy * gbs * 1e3 for pipe in simulation.pipes[f"{name} {side}"]]
            assert moved == pytest.approx(matrix.sum(axis) * size)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("ranks", "width", "name"), [(8, 8, "link"), (8, 2, "ib")])
def test_a_bound_by_bandwidth_is_bytes_over_bandwidth(op: str, ranks: int, width: int, name: str) -> None:
    job = Job(ranks=ranks, ranks_per_node=width, tokens=1024)
    machine = Machine(**{**WIDE, **PROMPT, f"{name}_gbs": 10.0}, slots=64, num_sms=4)
    routes = draw_routes(job)
    link, ib = crossings(job, routes, op)
    matrix = link if name == "link" else ib
    tokens = max(matrix.sum(0).max(), matrix.sum(1).max())
    expected = tokens * sum(job.slot_bytes(op)) / 10e3
    found = predict(op, job, machine, routes)
    assert found.floor_us == pytest.approx(expected, rel=1e-6)
    assert found.time_us == pytest.approx(expected, rel=0.02)
    assert found.limit.startswith(name)


@pytest.mark.parametrize("near", [True, False])
def test_one_token_takes_the_chain_of_latencies(near: bool) -> None:
    """In bf16, so in two pieces. A sender loads the second when the first is acknowledged; two warps produce a piece each, and
    their owner takes one after the other. Far, the entry of a node has a ring to itself."""
    link, ib, memory, launch = 7.0, 110.0, 1300.0, 17000.0
    machine = Machine(**WIDE, link_us=link, ib_us=ib, memory_us=memory, launch_us=launch)
    job = Job(2, 2 if near else 1, tokens=1, wire="bf16", topk=1, experts=2, groups=1, kept=1)
    routes = np.array([[[0, 1]], [[1, 0]]], dtype=np.uint8)
    slot, notice = (3 * link, 3 * link) if near else (ib + memory + 3 * memory / 2, ib)
    sent = 2 * memory + (2 * link if near else 0) + slot + memory
    assert predict("dispatch", job, machine, routes).time_us == pytest.approx(6 * launch + notice + sent + memory)
    summed = memory + slot + 2 * memory
    assert predict("combine", job, machine, routes).time_us == pytest.approx(launch + summed + memory)


def test_one_shot_takes_its_latencies() -> None:
    machine = Machine(**WIDE, link_us=7.0, ib_us=110.0, memory_us=1300.0, launch_us=17000.0)
    for width, wire in ((8, 21.0), (4, 110.0)):
        for op in OPS:
            found = predict_low_latency(op, Job(ranks_per_node=width, tokens=1), machine)
            assert found.time_us == pytest.approx(17000 + 2 * 1300 + wire)


@pytest.mark.parametrize("low_latency", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_more_bandwidth_is_never_slower(op: str, low_latency: bool) -> None:
    """But for who comes first in a queue, which another rate may change: two percent of calls as short as these, where
    a receiver has rings of several ranks."""
    for job in (Job(tokens=128), Job(ranks_per_node=2, tokens=64)):
        routes, call = draw_routes(job), predict_low_latency if low_latency else predict
        for name in ("link_gbs", "ib_gbs", "memory_gbs", "sm_read_gbs", "sm_write_gbs"):
            slow = Machine(num_sms=8, **{name: 10.0})
            found = [call(op, job, replace(slow, **{name: gbs}), routes) for gbs in (10.0, 25.0, 100.0, 400.0)]
            times, slack = [result.time_us for result in found], 1.0 if low_latency else 1.02
            assert all(after <= before * slack for before, after in pairwise(times)), (job, name, times)
            assert all(after.floor_us <= before.floor_us * (1 + 1e-9) for before, after in pairwise(found))


@pytest.mark.parametrize("op", OPS)
def test_latencies_slots_and_multiprocessors(op: str) -> None:
    job = Job(tokens=256)
    routes, machine = draw_routes(job), Machine(num_sms=8)

    def time(**changes: Any) -> float:
        return predict(op, job, replace(machine, **changes), routes).time_us

    assert time(link_us=0.0) < time() < time(link_us=5.0)
    assert time(slots=1) > time(slots=2) > time(slots=16)
    assert time(num_sms=4) > time() > time(num_sms=16)


def test_few_channels_stand_for_all() -> None:
    job = Job(tokens=1024)
    routes = draw_routes(job)
    for op in OPS:
        every, some = (predict(op, job, Machine(), routes, sample=sample) for sample in (None, 5))
        assert some.time_us == pytest.approx(every.time_us, rel=0.05)
        assert some.link_bytes == every.link_bytes
        alone = replace(job, tokens=1)  # most channels have nothing
        every, some = (predict(op, alone, Machine(**WIDE), sample=sample) for sample in (None, 1))
        assert some.time_us == pytest.approx(every.time_us)


def test_twice_the_same() -> None:
    job = Job(ranks=8, ranks_per_node=4, tokens=64)
    for op in OPS:
        assert predict(op, job, Machine()) == predict(op, job, Machine())
        assert predict(op, job, Machine()) != predict(op, replace(job, seed=1), Machine())


def test_figures_as_deepep_counts_them() -> None:
    """Own tokens count: on one node those a rank keeps, on several those that stay in the node."""
    for job, ways in ((Job(tokens=300), 8), (Job(ranks=64, tokens=300), 8)):
        routes = draw_routes(job)
        needs = (routes.reshape(job.ranks, 300, ways, -1) > 0).any(-1).sum()
        assert counted_bytes(job, routes, "dispatch") == pytest.approx(needs / job.ranks * 7392)
        assert counted_bytes(job, routes, "combine") == pytest.approx(needs / job.ranks * 14336)
    low = predict_low_latency("dispatch", Job(tokens=128), Machine())
    assert low.figure_gbs * low.time_us * 1e3 == pytest.approx(128 * 8 * 7408)


def test_low_latency_counts_pairs() -> None:
    job = Job(ranks=16, ranks_per_node=8, tokens=128)
    routes = draw_routes(job)
    found = predict_low_latency("combine", job, Machine(), routes)
    pairs = routes.sum(1, dtype=int).T
    near = [sum(pairs[a, b] for b in range(16) if a != b and a // 8 == b // 8) for a in range(16)]
    far = [sum(pairs[a, b] for b in range(16) if a // 8 != b // 8) for a in range(16)]
    assert (found.link_messages, found.ib_messages) == (max(near), max(far))
    assert found.ib_bytes == max(far) * 14336


def test_numbers_of_the_kernels() -> None:
    """Those that the model takes from csrc/comm and dsv3/comm."""
    files = ("peers.cuh", "sums.cuh", "dispatch.cuh", "combine.cuh")
    text = "".join((ROOT / "csrc/comm" / name).read_text() for name in files)
    for name in ("Warps", "Casters", "Receivers", "Owners", "Relays"):
        several, one = re.search(rf"k{name} = kNodes \? (\d+) : (\d+);", text).groups()
        assert (int(one), int(several)) == getattr(comm_traffic, name.upper())
    assert int(re.search(r"kHops = kNodes \? (\d+) : 0;", text)[1]) == comm_traffic.HOPS
    assert int(re.search(r"kPieceBytes = (\d+)", text)[1]) == comm_traffic.PIECE_BYTES
    assert int(re.search(r"kWarpBytes = (\d+) \* 1024", text)[1]) * 1024 == comm_traffic.WARP_BYTES
    tiles, topk = comm_traffic.PIECE_BYTES // 128, int(re.search(r"kMaxTopk = (\d+)", text)[1])
    slot = -(-(comm_traffic.PIECE_BYTES + 4 * tiles + 4 + 9 * topk) // 128) * 128
    assert slot - comm_traffic.PIECE_BYTES == comm_traffic.REST_BYTES
    assert int(re.search(r"kMaxNodes = (\d+)", (ROOT / "csrc/comm/peers.h").read_text())[1]) == comm_traffic.MAX_NODES
    python = (ROOT / "python/dsv3/comm/ipc.py").read_text()
    for name in ("NUM_SMS", "SPARE_SMS", "SLOTS"):
        assert int(re.search(rf"^{name} = (\d+)", python, re.M)[1]) == getattr(comm_traffic, name)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ranks": 0}, {"ranks": 3}, {"ranks": 8, "ranks_per_node": 3}, {"tokens": -1}, {"hidden": 1.5}, {"topk": 129},
        {"kept": 9}, {"groups": 7}, {"wire": "fp4"}, {"experts": True}, {"ranks": 128},
    ],
    ids=str,
)  # fmt: skip
def test_jobs_that_there_are_not(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must|have no|at most"):
        Job(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"link_gbs": 0}, {"ib_gbs": -1.0}, {"memory_us": -1}, {"slots": 0}, {"num_sms": 2.5}, {"channels": 0}, {"link_us": "1"},
     {"memory_gbs": float("nan")}],
    ids=str,
)  # fmt: skip
def test_machines_that_there_are_not(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Machine(**wrong)


def test_other_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(tokens=4)
    for call in (predict, predict_low_latency):
        with pytest.raises(ValueError, match="op must be"):
            call("reduce", job, Machine())
    with pytest.raises(ValueError, match="sample"):
        predict("dispatch", job, Machine(), sample=21)
    assert main(["--case", "rank=8"]) == 2
    assert "got 'rank'" in capsys.readouterr().err
    assert main(["--check", "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err


def test_one_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--case", "tokens=16", "ranks=4", "ranks_per_node=2", "ib_gbs=25", "wire=bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| dispatch", "| combine"]


def test_expected_beside_measured(tmp_path: Path) -> None:
    """A row of ranks that share a GPU, and one between GPUs: every time comes from the file or from the model."""
    sizes = {"ranks": 2, "tokens": 64, "hidden": 7168, "topk": 8, "transport": "ipc", "mode": "static"}
    rows = [
        {"op": "copy", "case": {}, "gbs": 2000.0, "time_us": 1.0},
        {"op": "comm_dispatch", "case": {**sizes, "wire": "fp8"}, "time_us": 123.0},
        {"op": "comm_combine", "case": {**sizes, "wire": "bf16", "num_sms": 8, "link_gbs": 9.0}, "time_us": 456.0},
    ]
    path = tmp_path / "comm.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, shared, apart = compared(path)
    assert (shared[0], shared[5], apart[0], apart[5]) == ("dispatch", "123", "combine", "456")
    assert shared[7:] == ["", "", ""], "no link can be told from ranks that share a GPU"
    assert apart[7:9] == ["9", "2%"], "of 450 GB/s"
    assert "one GPU" in shared[1]
    assert "8 SMs" in apart[1]
    job = Job(ranks=2, ranks_per_node=2, tokens=64, wire="bf16")
    found = predict("combine", job, Machine(memory_gbs=2000.0, num_sms=8))
    expected = found.time_us
    assert apart[6] == f"{456 / expected:.2f}"
    assert apart[9] == f"{found.figure_gbs * expected / 456:.0f}"
    few = {**rows[2], "case": {**rows[2]["case"], "mode": "low_latency"}}
    path.write_text("".join(json.dumps(row) + "\n" for row in (rows[0], few)))
    assert compared(path)[1][1:5] == ["2 ranks, ipc, not modelled, bf16, low_latency", "", "", ""]
    assert _on_paper([rows[2], few], 2000.0) == [expected, None], "the picture's crosses"
    path.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(ValueError, match="copy"):
        compared(path)
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match="no rows of comm"):
        compared(path)
    for text in ("# a README", "[1]", "{}"):
        path.write_text(text + "\n")
        with pytest.raises(ValueError, match=r"\.jsonl is no results file: expected a row in JSON on every line"):
            compared(path)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("ranks=abc", "ranks must be an integer, got 'abc'"),
        ("ib_gbs=nan", "ib_gbs must be a number"),
        ("ranks", "got ''"),
    ],
)
def test_cases_that_are_no_numbers(case: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--case", case]) == 2
    assert said in capsys.readouterr().err


def test_few_ranks_are_one_node(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--case", "ranks=2", "tokens=64"]) == 0
    assert "dispatch" in capsys.readouterr().out


def test_ranks_that_share_a_gpu_share_its_memory() -> None:
    """The floor is what all ranks move; rings that fit the cache cost it nothing."""
    job = Job(ranks=4, ranks_per_node=4, tokens=256)
    routes, slots = draw_routes(job), comm_model.NUM_SMS
    machine = Machine(shared=True, num_sms=8, slots=slots, cache_mb=1e9)
    fits, spills = (predict("dispatch", job, replace(machine, cache_mb=mb), routes) for mb in (1e9, 0.01))
    x, rows = 4 * 256 * 2 * 7168, 4 * 256 * 8 * 7392
    assert fits.busy["memory"] == pytest.approx((x + rows) / 3e6, rel=1e-3)
    slots_written = int((routes > 0).sum()) * job.slot_bytes("dispatch")[0]
    assert spills.busy["memory"] == pytest.approx((x + rows + slots_written) / 3e6, rel=1e-3)
    assert not any(us for name, us in spills.busy.items() if name.startswith("link"))


def test_a_clock_takes_things_in_order() -> None:
    clock, seen = comm_rings.Clock(), []

    def process(name: str, *times: float) -> comm_rings.Process:
        for time in times:
            yield time
            seen.append((clock.now, name))

    event = comm_rings.Event()

    def late() -> comm_rings.Process:
        yield event
        seen.append((clock.now, "late"))

    clock.go(late())
    clock.go(process("a", 2.0, 3.0))
    clock.go(process("b", 2.0, 2.0))
    clock.set(event, 2.5)
    clock.run()
    assert seen == [(2.0, "a"), (2.0, "b"), (2.0, "b"), (2.5, "late"), (3.0, "a")]
