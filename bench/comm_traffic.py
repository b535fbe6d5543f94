"""What dispatch and combine move between ranks, and what a machine moves it with: for comm_model.py."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import numpy as np

# Fixed by csrc/comm (peers.cuh, dispatch.cuh, combine.cuh) and python/dsv3/comm/ipc.py; tests/test_comm_model.py compares.
CASTERS, RECEIVERS = (10, 7), (16, 8)  # warps a channel: of one node, of several
WARPS, OWNERS = (24, 20), (6, 5)  # of combine; the rest are producers
RELAYS = 0, 4  # or one for each of more other nodes
HOPS = 11  # slots that are passed on at once, shared by the other nodes
PIECE_BYTES = 8192  # of a row in a slot
REST_BYTES = 512  # scales and meta, which dispatch writes with every piece
WARP_BYTES = 8 * 1024  # of rows on their way to a warp of combine
NUM_SMS, SPARE_SMS, SLOTS = 20, 4, 16
MAX_NODES = 8
TILE = 128

FLAG_BYTES = 32  # what a flag takes of a link; every slot has one there and one back
OPS = ("dispatch", "combine")


@dataclass(frozen=True)
class Job:
    """What is asked of the ranks. tokens: of each rank; wire: of dispatch, fp8 or bf16 (combine is bf16); kept: of `groups`
    groups of experts a token may use; groups 1: all."""

    ranks: int = 8
    ranks_per_node: int = 8
    tokens: int = 4096
    hidden: int = 7168
    topk: int = 8
    wire: str = "fp8"
    experts: int = 256
    groups: int = 8
    kept: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("ranks", "ranks_per_node", "tokens", "hidden", "topk", "experts", "groups", "kept"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if self.nodes > MAX_NODES:
            raise ValueError(f"the kernels know {MAX_NODES} nodes at most, got {self.nodes}")
        if self.ranks % self.ranks_per_node or self.experts % self.ranks or self.experts % self.groups:
            raise ValueError(f"ranks_per_node must divide ranks, ranks and groups must divide experts, got {self}")
        if self.kept > self.groups or self.topk > self.kept * (self.experts // self.groups):
            raise ValueError(f"{self.kept} of {self.groups} groups have no {self.topk} experts")
        if self.wire not in ("fp8", "bf16"):
            raise ValueError(f"wire must be fp8 or bf16, got {self.wire!r}")

    @property
    def nodes(self) -> int:
        return self.ranks // self.ranks_per_node

    def row_bytes(self, op: str) -> int:
        """A token's values and scales on the wire, and an expert's row in memory."""
        fp8 = op == "dispatch" and self.wire == "fp8"
        return self.hidden + 4 * math.ceil(self.hidden / TILE) if fp8 else 2 * self.hidden

    def slot_bytes(self, op: str) -> list[int]:
        """What each slot of a token takes of a link, flags there and back included."""
        size = 1 if op == "dispatch" and self.wire == "fp8" else 2
        pieces = math.ceil(self.hidden * size / PIECE_BYTES)
        columns = self.hidden if pieces == 1 else math.ceil(self.hidden / pieces / TILE) * TILE
        data = [min(columns, self.hidden - begin) * size for begin in range(0, self.hidden, columns)]
        return [d + (REST_BYTES if op == "dispatch" else 0) + 2 * FLAG_BYTES for d in data]


@dataclass(frozen=True)
class Machine:
    """GB/s are 1e9 bytes a second and of one direction for links, us one way.

    Where the defaults come from: NVLink 450 and 160 GB/s of an H100 and an H800 and InfiniBand 50 GB/s are nominal; memory
    3000 is what a copy reaches on an H100, bytes read plus written; a multiprocessor's 122 GB/s of loads and 58 of stores are
    what each of 20 reached on an H200 in kernels that do nothing else (DeepEP V2 plans with 200 and 50). Latencies are assumed:
    half a load's round trip of 1.5 to 2 us over NVLink, 3 us for a signalled write over InfiniBand, 0.8 us for a load from
    memory under load, 2.5 us a kernel of a CUDA graph.

    slots: of a ring. shared: all ranks on one GPU, whose memory is then their link, unless the rings fit its cache.
    """

    link_gbs: float = 450.0
    ib_gbs: float = 50.0
    memory_gbs: float = 3000.0
    num_sms: int = NUM_SMS
    channels: int | None = None  # None: as many as multiprocessors
    slots: int = SLOTS
    sm_read_gbs: float = 122.0
    sm_write_gbs: float = 58.0
    link_us: float = 0.9
    ib_us: float = 3.0
    memory_us: float = 0.8
    launch_us: float = 2.5
    cache_mb: float = 50.0
    shared: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, low = getattr(self, field.name), 0 if field.name.endswith("_us") else 1e-9
            if field.name in ("shared", "channels"):
                continue
            if not isinstance(value, (int, float)) or math.isnan(value) or value < low:
                raise ValueError(f"{field.name} must be a number of at least {low:g}, got {value!r}")
        counts = {"num_sms": self.num_sms, "slots": self.slots, "channels": self.channels}
        for name, value in counts.items():
            if not (name == "channels" and value is None) and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")


def draw_routes(job: Job) -> np.ndarray:
    """[ranks, tokens, ranks] int: how many of a token's experts each rank has. The gate's rule: of equal groups the `kept` with
    the largest sums of their two best scores stay, of their experts the top k."""
    routes = np.zeros((job.ranks, job.tokens, job.ranks), dtype=np.uint8)
    rows = np.arange(job.tokens)[:, None]
    for rank in range(job.ranks):
        scores = np.random.default_rng([job.seed, rank]).random(
            (job.tokens, job.groups, job.experts // job.groups), np.float32
        )
        best = np.partition(scores, -2, -1)[..., -2:].sum(-1) if scores.shape[-1] > 1 else scores[..., 0]
        lost = np.argsort(best, -1, kind="stable")[:, : job.groups - job.kept]
        scores[rows, lost] = -1.0
        chosen = np.argpartition(scores.reshape(job.tokens, -1), -job.topk, -1)[:, -job.topk :]
        np.add.at(routes[rank], (rows, chosen // (job.experts // job.ranks)), 1)
    return routes


def crossings(job: Job, routes: np.ndarray, op: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that cross NVLink and InfiniBand from rank to rank, [ranks, ranks] each: a token once to every node that needs it,
    and there once to every rank. Combine goes the same ways back."""
    link, ib = (np.zeros((job.ranks, job.ranks), dtype=np.int64) for _ in range(2))
    width = job.ranks_per_node
    for source, node in itertools.product(range(job.ranks), range(job.nodes)):
        inside = slice(node * width, (node + 1) * width)
        needs = routes[source, :, inside] > 0
        entry = source if source // width == node else node * width + source % width
        if entry != source:
            ib[source, entry] += needs.any(-1).sum()
        link[entry, inside] += needs.sum(0)
    np.fill_diagonal(link, 0)
    return (link.T, ib.T) if op == "combine" else (link, ib)


def counted_bytes(job: Job, routes: np.ndarray, op: str) -> float:
    """What DeepEP's tests divide by the time, mean over the ranks: on one node the tokens that a rank receives (sends, in
    combine), its own included; on several, those for every node, its own included, which no InfiniBand carries."""
    nodes = routes.reshape(job.ranks, job.tokens, job.nodes, -1).any(-1)
    return float((nodes if job.nodes > 1 else routes > 0).sum() / job.ranks * job.row_bytes(op))
