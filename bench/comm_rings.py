"""The rings of csrc/comm as a discrete-event simulation: for comm_model.py.

Pieces of tokens go from warp to warp through slots that have to be free, behind flags that take their time, and through pipes
(links, memory, a multiprocessor's loads and stores) that serve one after the other. Processes are generators that yield a time
or an Event, and go on when it has come; those of one time go on in the order in which they asked.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from bench.comm_traffic import (
    CASTERS,
    HOPS,
    OWNERS,
    PIECE_BYTES,
    RECEIVERS,
    RELAYS,
    REST_BYTES,
    WARP_BYTES,
    WARPS,
    Job,
    Machine,
)


class Event:
    __slots__ = ("payload", "time", "waiting")

    def __init__(self) -> None:
        self.time: float | None = None
        self.waiting: list[Process] = []
        self.payload: Any = None


Process = Generator[float | Event, None, None]


class Clock:
    """Runs processes in the order of time, those of one time in the order in which they asked."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Process]] = []
        self._count = itertools.count()

    def go(self, process: Process) -> None:
        """Until it has to wait."""
        for wanted in process:
            time = wanted.time if isinstance(wanted, Event) else wanted
            if time is None:
                wanted.waiting.append(process)
                return
            if time > self.now:
                heapq.heappush(self._heap, (time, next(self._count), process))
                return

    def set(self, event: Event, time: float) -> None:
        event.time = time
        for process in event.waiting:
            heapq.heappush(self._heap, (max(time, self.now), next(self._count), process))

    def run(self) -> None:
        while self._heap:
            self.now, _, process = heapq.heappop(self._heap)
            self.go(process)


class Pipe:
    """Serves bytes one after the other."""

    __slots__ = ("busy", "free", "rate")

    def __init__(self, gbs: float) -> None:
        self.rate, self.free, self.busy = gbs * 1e3, 0.0, 0.0

    def take(self, now: float, size: float) -> float:
        """When they are through."""
        self.busy += size / self.rate
        self.free = max(self.free, now) + size / self.rate
        return self.free


class Item:
    """What goes through a slot: it is `ready` for the receiver, and `taken` as the sender sees it."""

    __slots__ = ("ready", "room", "rows", "source", "taken", "target")

    def __init__(self, source: int, target: int, rows: int, room: Event | None) -> None:
        self.source, self.target, self.rows, self.room = source, target, rows, room
        self.ready, self.taken = Event(), Event()


class Queue:
    """What has arrived, for the warps that take it."""

    def __init__(self) -> None:
        self.items: deque[Any] = deque()
        self.idle: deque[Event] = deque()

    def put(self, clock: Clock, item: Any) -> None:
        if not self.idle:
            return self.items.append(item)
        event = self.idle.popleft()
        event.payload = item
        clock.set(event, clock.now)

    def ask(self) -> Event:
        event = Event()
        if self.items:
            event.time, event.payload = 0.0, self.items.popleft()
        else:
            self.idle.append(event)
        return event


class Simulation:
    """Some channels of one call. Channels are alike: of `sample` of them each pipe that all share has its part."""

    def __init__(self, job: Job, machine: Machine, channels: int, sample: int) -> None:
        self.job, self.machine, self.channels, self.sample = job, machine, channels, sample
        self.several = job.nodes > 1  # which has warps of its own numbers
        self.clock = Clock()
        self.width, part = job.ranks_per_node, sample / channels
        self.spills = (
            machine.shared
            and job.ranks**2 * channels * machine.slots * (PIECE_BYTES + REST_BYTES) > machine.cache_mb * 1e6
        )

        def pipes(gbs: float) -> list[Pipe]:
            return [Pipe(gbs) for _ in range(job.ranks)]

        memory = [Pipe(machine.memory_gbs * part)] * job.ranks if machine.shared else pipes(machine.memory_gbs * part)
        self.pipes = {"memory": memory}
        for name, gbs in (("link", machine.link_gbs), ("ib", machine.ib_gbs)):
            self.pipes |= {f"{name} out": pipes(gbs * part), f"{name} in": pipes(gbs * part)}
        sms = machine.num_sms / channels  # of a channel
        self.loads = [pipes(machine.sm_read_gbs * sms) for _ in range(sample)]
        self.stores = [pipes(machine.sm_write_gbs * sms) for _ in range(sample)]
        self.pipes |= {"SM loads": [*itertools.chain(*self.loads)], "SM stores": [*itertools.chain(*self.stores)]}
        self.rings: dict[tuple[int, ...], list[Item]] = {}

    def add(self, source: int, target: int, rows: int, *key: int) -> Item:
        """The next item of a ring, which `key` tells from others between the two ranks."""
        ring = self.rings.setdefault((source, target, *key), [])
        room = ring[-self.machine.slots].taken if len(ring) >= self.machine.slots else None
        ring.append(Item(source, target, rows, room))
        return ring[-1]

    def latency(self, item: Item) -> float:
        if item.source == item.target:
            return self.machine.memory_us / 2
        near = item.source // self.width == item.target // self.width
        return self.machine.link_us if near else self.machine.ib_us

    def read(self, channel: int, rank: int, size: float, memory: bool, ahead: int) -> float:
        """When a warp, which has `ahead` bytes on their way at once, has loaded them: from memory or from the cache."""
        now = self.clock.now
        end = self.loads[channel][rank].take(now, size)
        if memory:
            end = max(end, self.pipes["memory"][rank].take(now, size))
        return max(end + self.machine.memory_us, now + math.ceil(size / ahead) * self.machine.memory_us)

    def write(self, channel: int, rank: int, size: float) -> float:
        """When a warp has stored so much to memory."""
        return max(
            self.stores[channel][rank].take(self.clock.now, size), self.pipes["memory"][rank].take(self.clock.now, size)
        )

    def carry(self, channel: int, item: Item, size: float, acknowledged: Event, queue: Queue | None) -> Process:
        """A slot on its way. A release waits until its stores are acknowledged, then its flag takes a third latency; over
        InfiniBand the network keeps the order of data and flag, and the warp waits for nothing."""
        clock, latency, near = self.clock, self.latency(item), item.source // self.width == item.target // self.width
        yield self.stores[channel][item.source].take(clock.now, size)
        end = clock.now
        if self.spills:
            end = self.pipes["memory"][item.source].take(clock.now, size)
        if item.source != item.target and not self.machine.shared:
            name = "link" if near else "ib"
            yield self.pipes[f"{name} out"][item.source].take(clock.now, size)
            end = self.pipes[f"{name} in"][item.target].take(clock.now, size)
        clock.set(acknowledged, end + 2 * latency if near else clock.now)
        clock.set(item.ready, end + (3 if near else 1) * latency)
        if queue is not None:
            yield item.ready
            queue.put(clock, item)

    def send(self, channel: int, items: list[Item], size: float, queues: dict[Any, Queue] | None = None) -> Process:
        """Waits for room, writes all slots, waits for the release."""
        for item in items:
            if item.room is not None:
                yield item.room
        waits = []
        for item in items:
            waits.append(Event())
            queue = None if queues is None else queues[channel, item.target, item.source]
            self.clock.go(self.carry(channel, item, size, waits[-1], queue))
        yield from waits

    def take(self, channel: int, items: list[Item], size: float, ahead: int) -> Process:
        """Loads slots, then tells their senders."""
        yield self.read(channel, items[0].target, size * len(items), False, ahead)
        for item in items:
            self.clock.set(item.taken, self.clock.now + self.latency(item))

    def tokens(self) -> Iterator[tuple[int, int]]:
        """(channel, token) of the channels that are simulated, in the order of the tokens."""
        for token in range(self.job.tokens):
            if token % self.channels < self.sample:
                yield token % self.channels, token

    def ways(self, routes: np.ndarray, source: int, token: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """(rank where it enters a node, [(rank that needs it, its rows)]) for each node that needs the token."""
        counts = routes[source, token]
        for node in range(self.job.nodes):
            needs = [(int(d), int(counts[d])) for d in range(node * self.width, (node + 1) * self.width) if counts[d]]
            if needs:
                yield (source if source // self.width == node else node * self.width + source % self.width), needs

    def dispatch(self, routes: np.ndarray) -> None:
        """Casters read a token and have it written to its ranks here and its entries elsewhere; forwarders serve a node each,
        receivers a ring or some, and take what has arrived."""
        job, sizes = self.job, self.job.slot_bytes("dispatch")
        size, pieces, row = sum(sizes) / len(sizes), len(sizes), job.row_bytes("dispatch") / len(sizes)
        plans: dict[tuple[int, int, int], list[list[Item]]] = {}
        onward: dict[Item, list[Item]] = {}
        queues: dict[Any, Queue] = {}
        served: dict[Any, tuple[Queue, int]] = {}  # and by how many
        receivers, hops = RECEIVERS[self.several], HOPS // max(job.nodes - 1, 1)
        for channel, source in itertools.product(range(self.sample), range(job.ranks)):
            for target in range(job.ranks):
                near = source // self.width == target // self.width
                key = channel, target, near, source % receivers if near else source
                found, _ = served.setdefault(key, (Queue(), max(1, receivers // job.ranks) if near else hops))
                queues[channel, target, source] = found
        for source in range(job.ranks):
            for place, (channel, token) in enumerate(self.tokens()):
                plan = plans.setdefault((channel, source, place // self.sample % CASTERS[self.several]), [])
                for _ in range(pieces):
                    items = []
                    for entry, needs in self.ways(routes, source, token):
                        if entry == source:
                            items += [self.add(source, d, rows, channel, source // self.width) for d, rows in needs]
                            continue
                        items.append(self.add(source, entry, 0, channel))
                        onward[items[-1]] = [
                            self.add(entry, d, rows, channel, source // self.width) for d, rows in needs
                        ]
                    plan.append(items)

        def caster(channel: int, rank: int, plan: list[list[Item]]) -> Process:
            for items in plan:
                yield self.read(channel, rank, 2 * job.hidden / pieces, True, PIECE_BYTES)
                yield from self.send(channel, items, size, queues)

        def receiver(channel: int, queue: Queue) -> Process:
            while True:
                arrived = queue.ask()
                yield arrived
                item = arrived.payload
                yield from self.take(channel, [item], size, PIECE_BYTES)
                if item in onward:
                    yield from self.send(channel, onward[item], size, queues)
                else:
                    yield self.write(channel, item.target, item.rows * row)

        for (channel, *_), (queue, warps) in served.items():
            for _ in range(warps):
                self.clock.go(receiver(channel, queue))
        for (channel, rank, _), plan in plans.items():
            self.clock.go(caster(channel, rank, plan))

    def combine(self, routes: np.ndarray) -> None:
        """Producers sum a token's rows and send the sum to its rank here, or to the GPU of its rank's index here, which adds up
        the node's and sends that; owners add up what comes."""
        job, sizes = self.job, self.job.slot_bytes("combine")
        size, pieces, row = sum(sizes) / len(sizes), len(sizes), job.row_bytes("combine") / len(sizes)
        made: dict[tuple[int, int, bool], list[tuple[int, int, int, Item]]] = {}
        summed: dict[tuple[int, int, int], list[tuple[Item, list[Item]]]] = {}
        owned: dict[tuple[int, int], list[list[Item]]] = {}
        for (channel, token), piece, source in itertools.product(self.tokens(), range(pieces), range(job.ranks)):
            parts = []
            for entry, needs in self.ways(routes, source, token):
                here = [self.add(d, entry, rows, channel, source // self.width) for d, rows in needs]
                for item in here:  # not all producers begin with the same rank; those for the own node are apart
                    turn, near = (token, piece, (source - item.source) % job.ranks), entry == source
                    made.setdefault((channel, item.source, near), []).append((*turn, item))
                if entry == source:
                    parts += here
                    continue
                parts.append(self.add(entry, source, 0, channel))
                summed.setdefault((channel, entry, source), []).append((parts[-1], here))
            owned.setdefault((channel, source), []).append(parts)

        def producer(channel: int, rank: int, items: list[Item]) -> Process:
            for item in items:
                if item.room is not None:
                    yield item.room
                yield self.read(channel, rank, item.rows * row, True, WARP_BYTES)
                yield from self.send(channel, [item], size)

        def forwarder(channel: int, sums: list[tuple[Item, list[Item]]]) -> Process:
            for total, parts in sums:
                for part in parts:
                    yield part.ready
                yield from self.take(channel, parts, size, WARP_BYTES)
                yield from self.send(channel, [total], size)

        def owner(channel: int, rank: int, tokens: list[list[Item]]) -> Process:
            for parts in tokens:
                for part in parts:
                    yield part.ready
                yield from self.take(channel, parts, size, WARP_BYTES)
                yield self.write(channel, rank, row)

        owners, relays = OWNERS[self.several], max(RELAYS[self.several], job.nodes - 1)
        producers = WARPS[self.several] - owners - relays
        relays //= max(job.nodes - 1, 1)  # of each other node
        for_near = max(producers // job.nodes, 1)
        for (channel, rank, near), turns in made.items():
            items = [item for *_, item in sorted(turns, key=lambda turn: turn[:3])]
            warps = for_near if near else producers - for_near
            for warp in range(warps):
                self.clock.go(producer(channel, rank, items[warp::warps]))
        for (channel, *_), sums in summed.items():
            for warp in range(relays):
                self.clock.go(forwarder(channel, sums[warp::relays]))
        for (channel, rank), tokens in owned.items():
            for warp in range(owners):
                mine = [parts for i, parts in enumerate(tokens) if i // pieces % owners == warp]
                self.clock.go(owner(channel, rank, mine))

    def run(self, op: str, routes: np.ndarray) -> float:
        """us until all is stored."""
        getattr(self, op)(routes)
        self.clock.run()
        left = sum(item.taken.time is None for ring in self.rings.values() for item in ring)
        assert left == 0, f"{left} items were never taken"
        return self.clock.now + self.machine.memory_us
