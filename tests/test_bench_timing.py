"""How the benchmark times: input sets, graphs, turns."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch

from bench import timing
from bench.cases import Baseline, Case


@pytest.mark.parametrize(("num_bytes", "input_bytes"), [(117e6, 59e6), (134e6, 208e6), (1e6, 5e5), (2e9, 1e9)])
def test_input_sets_exceed_the_cache(num_bytes, input_bytes):
    case = Case(op="x", case={}, flops=1, bytes=num_bytes)
    count = timing.set_count(case, input_bytes, calls=10**6)
    assert count * min(input_bytes, num_bytes) > timing.COLD_BYTES
    assert timing.set_count(dataclasses.replace(case, restore=(0,)), input_bytes, calls=12) == 12


def test_graphs_are_long_enough():
    assert [timing.call_count(us, timing.FULL) for us in (4000.0, 200.0, 40.0)] == [10, 10, 50]


class Clocked:
    """Takes as long as it is told, or fails; notes when it ran."""

    def __init__(self, name: str, times: list[float | Exception], ran: list[str]) -> None:
        self.name, self.times, self.ran = name, iter(times), ran

    def replay(self) -> float:
        self.ran.append(self.name)
        time = next(self.times)
        if isinstance(time, Exception):
            raise time
        return time


def test_what_is_compared_runs_in_turn() -> None:
    """Forwards and backwards, and one that fails leaves the others alone. Of each the median without its first time."""
    ran: list[str] = []
    broken = RuntimeError("third time")
    peers = {"op": [99.0, 1.0, 30.0, 2.0], "broken": [9.0, 9.0, broken], "peer": [99.0, 6.0, 4.0, 50.0]}
    times, failed = timing.in_turn_us({name: Clocked(name, spans, ran) for name, spans in peers.items()}, replays=3)
    assert times == {"op": 2.0, "peer": 6.0}
    assert failed == {"broken": broken}
    assert " ".join(ran) == "peer broken op op broken peer peer broken op op peer"


@pytest.mark.parametrize("alone_fits", [True, False])
def test_a_case_is_timed_with_its_peers(monkeypatch, alone_fits):
    """All in turn; one that does not fit in memory beside the others alone, when these are gone; what fails is an error."""
    events: list[str] = []
    alive: weakref.WeakSet[Clocked] = weakref.WeakSet()
    held: list[str] = []  # whose memory is in use, as it should be
    spans = {"op": 2.0, "first": 3.0, "large": 7.0, "second": 5.0}

    def capture(bind, sets, *, calls, reset):
        name = bind(*sets[0])()
        assert calls == timing.QUICK.calls
        for restore in (lambda: None, reset):  # what the one before has spoiled is whole again, and by `reset` always
            restore()
            assert [float(s[0][0]) for s in sets] == [1.0] * calls
            for s in sets:
                s[0].zero_()
        if retry := f"capture {name}" in events:
            held.clear()
        assert sorted(one.name for one in alive) == sorted(held), "of one that failed, or of the others"
        events.append(f"capture {name}")
        made = Clocked(name, [99.0, *[spans.get(name, 0.0)] * 8], events)
        alive.add(made)
        if name == "broken":
            raise ValueError(name)
        if name == "large" and not (retry and alone_fits):
            raise torch.OutOfMemoryError(name)
        held.append(name)
        return made

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "device", lambda *_: "cpu")
    monkeypatch.setattr(timing, "Captured", capture)
    peers = {name: Baseline(lambda x, name=name: name) for name in ("first", "large", "broken", "second")}
    case = Case(
        op="x",
        case={},
        flops=1,
        bytes=1,
        inputs=lambda _: (torch.ones(3),),
        run=lambda _: "op",
        baselines=peers,
        restore=(0,),
    )
    timed = timing.measure_case(case, timing.Ceilings(1.0, 1.0, 1.0, 1.0), timing.QUICK)
    assert timed.time_us == 2.0
    assert timed.baselines == {"first": 3.0, "second": 5.0} | ({"large": 7.0} if alone_fits else {})
    assert [line.split(":")[0] for line in timed.errors] == (["broken"] if alone_fits else ["broken", "large"])
    there = ["second", "first", "op"]
    turns = [*there, *reversed(there), *there]  # one more than the two that count
    captured = [f"capture {name}" for name in ("op", "first", "large", "broken", "second")]
    assert events == [*captured, *turns, "capture large", *(["large"] * 3 if alone_fits else [])]


@pytest.mark.cuda
def test_spoiled_inputs_are_restored():
    x = torch.zeros(1024, device="cuda")
    seen = []

    def reset():
        seen.append(float(x[0]))
        x.zero_()

    timing.graph_us(timing.binder(lambda x: x.add_(1)), [(x,)], calls=3, replays=2, reset=reset)
    assert seen[1:] == [3.0, 3.0]
