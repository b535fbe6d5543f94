"""Transports "ipc" and "nvshmem": the ranks of a node write into each other's memory, which each maps (CUDA IPC), and over
nvshmem a rank sends to those that have its place in other nodes, in low-latency mode to all; csrc/comm has the kernels.

Rings of slots lead from every rank to every rank. Their size does not depend on the tokens, and what they count lies on the
device: nothing is allocated after the start, and calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.comm import counts, nvshmem
from dsv3.comm.alive import lost_ranks, naming_lost_ranks
from dsv3.comm.low_latency import Masked, empty_masked
from dsv3.comm.reach import Unreachable, machine, raise_first
from dsv3.ops import registry
from dsv3.ops.fp8_linear import GRADIENT_FLOOR
from dsv3.ops.grad import Function
from dsv3.ops.quant import empty_per_token

DTYPES = (torch.bfloat16, torch.float32)
MAX_RANKS, MAX_TOPK, MAX_EXPERTS = 16, 16, 1024  # ranks of a node
MAX_NODES, MAX_GROUP = 8, 64  # ranks of all nodes
MAX_WINDOW_TOKENS = 1024  # kMaxWindowTokens (csrc/comm/peers.cuh)
WINDOW_WORDS = 22975  # of 32 experts' bits for a token, that a block has (receive_bytes in csrc/comm/low_latency.cuh)
VECTOR_BYTES = 16  # rows are whole vectors
NUM_SMS = 20  # the most that are taken unasked
SPARE_SMS = 4  # of a GPU, left to kernels that do not wait
SLOTS = 16  # of a ring
PIECE_BYTES = 8192  # kPieceBytes (csrc/comm/peers.cuh)
FLOOR = 1e-4  # smallest amax of a cast tile, as of per_token_cast

log = logging.getLogger("dsv3")


class Way(NamedTuple):
    """How the tokens of a dispatch went, for all that goes the same way or back."""

    topk_idx: Tensor  # int64 [T, k], of this rank's tokens
    pairs: Tensor  # int64 [T, k]: each pair's place in this rank's own order by expert
    shift: Tensor  # int32 [E]: from there to its row, at the rank of the expert
    arrivals: Tensor  # int32 [ranks, channels]: tokens that come; between nodes `nodes` rows more: those to pass on
    relay: Tensor | None = None  # between nodes int32 [nodes, max_tokens]: a bit for each rank here that needs a token

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in self if tensor is not None)


class Told(NamedTuple):
    """What the ranks told each other before a dispatch."""

    offsets: Tensor  # int32 [G+1]: of this rank's experts' rows, however many
    way: Way
    num_rows: int  # R
    max_tokens: int  # of any rank


class Link:
    """The rings among the ranks of a group. All make it together, and use it in the same order.

    Args:
        across: the layout's nodes are apart, and reach each other over NVSHMEM; otherwise all ranks are on one machine.
        num_sms: multiprocessors of a call; None for NUM_SMS, or fewer where ranks share a GPU.
        window: most tokens of a rank, and bytes of a row on its widest way, in low-latency mode; None for none.
        timeout: seconds that a kernel waits for another rank.

    Raises:
        Unreachable: on all ranks.
        ValueError: on all ranks, where those that share a GPU would take more multiprocessors than it can spare, or a window
            has more tokens than kernels take.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        layout: counts.Layout,
        device: torch.device,
        *,
        across: bool = False,
        num_sms: int | None = None,
        window: tuple[int, int] | None = None,
        timeout: float,
    ) -> None:
        self.group, self.layout, self.device, self.timeout = group, layout, device, timeout
        self.across, self._part = across, None
        found = self._ask((_objection(layout, device, across), machine(), _gpu(device)))
        self._alone = len({there for _, there, _ in found}) == 1
        for first in range(0, layout.ranks, self._width):
            last = first + self._width - 1
            if len({there for _, there, _ in found[first : last + 1]}) > 1:
                hint = "" if across else "; transport nvshmem joins machines"
                raise Unreachable(f"ranks {first} to {last} are not on one machine{hint}")
        raise_first([reason for reason, *_ in found])
        sharing = max(Counter(gpu for *_, gpu in found).values())
        spare = registry.sm_count(device) - SPARE_SMS
        self.num_sms = min(NUM_SMS, spare // sharing) if num_sms is None else num_sms
        if not 1 <= self.num_sms <= spare // sharing:
            raise ValueError(f"num_sms must be in 1..{spare // sharing} for {sharing} ranks a GPU, got {self.num_sms}")
        tokens, row = (0, 0) if window is None else window
        if tokens > (most := most_window_tokens(layout)):
            experts = f"{layout.ranks} ranks of {layout.num_local_experts} experts"
            raise ValueError(f"low_latency must be at most {most} for {experts}, got {tokens}")
        self.window = tokens, -(-row // PIECE_BYTES)
        self._peers: Any = None
        self._native = nvshmem.native() if across else registry.native()
        try:
            self._connect()
        except Unreachable:
            self._release()
            raise
        self._stream = torch.cuda.current_stream(device)
        stopped = threading.Event()
        ranks = dist.get_process_group_ranks(group)
        threading.Thread(target=_watch, args=(self._peers, ranks, stopped), daemon=True).start()
        self._stop = weakref.finalize(self, stopped.set)
        symmetric = self._symmetric_bytes if across else 0
        log.info(
            "%s: %.3g MB of device memory for what %d ranks send, %d multiprocessors",
            "nvshmem" if across else "ipc", (self._peers.bytes + symmetric) / 1e6, layout.ranks, self.num_sms,
        )  # fmt: skip

    @property
    def _width(self) -> int:
        """Ranks that map each other's memory."""
        return self.layout.ranks_per_node if self.across else self.layout.ranks

    @property
    def _symmetric_bytes(self) -> int:
        return self._native.Network.symmetric_bytes(self._width, self.layout.nodes, self.num_sms, SLOTS, *self.window)

    def _connect(self) -> None:
        handle, reason = b"", None
        layout, width, nodes = self.layout, self._width, self.layout.ranks // self._width
        node, place = divmod(layout.rank, width)
        sizes = self.device.index, place, width, node, nodes, self.num_sms, SLOTS, *self.window, float(self.timeout)
        if self.across:
            ranks = dist.get_process_group_ranks(self.group)
            self._part = nvshmem.memory.take(
                ranks, layout.rank, self._symmetric_bytes, self._ask, self.device.index, alone=self._alone
            )
        try:
            if self.across:
                self._peers = self._native.Network(*sizes, nvshmem.DIRECT, *self._part)
            else:
                self._peers = self._native.Peers(*sizes)
            handle = self._peers.handle
        except RuntimeError as error:
            reason = str(error)
        found = self._ask((reason, handle))
        raise_first([reason for reason, _ in found])
        try:
            self._peers.connect([handle for _, handle in found[node * width : (node + 1) * width]])
        except RuntimeError as error:
            reason = str(error)
        raise_first(self._ask(reason))

    def _ask(self, mine: Any) -> list[Any]:
        everyone: list[Any] = [None] * self.layout.ranks
        with naming_lost_ranks(self.group):
            dist.all_gather_object(everyone, mine, group=self.group)
        return everyone

    def _release(self) -> None:
        given_up = self._peers is not None and self._peers.lost >= 0
        if self._peers is not None:
            self._peers.disconnect()
        self._ask(None)  # nobody writes here any more; also of a rank that has nothing
        if self._peers is not None:
            self._peers.release()
            self._peers = None
        if self._part is not None:
            if not given_up:  # else what a rank still sends may arrive there
                nvshmem.memory.give_back(self._part)
            self._part = None

    def close(self) -> None:
        """Frees the memory and the mappings; all ranks call it together. A process that ends frees them too."""
        if self._peers is not None:
            self._stop()
            torch.cuda.synchronize(self.device)
            self._release()

    def raise_lost(self) -> None:
        """Raises, without waiting for the device, where a kernel has waited too long: RankLost where that rank is gone,
        otherwise RuntimeError."""
        if self._peers is None:
            raise RuntimeError("this buffer has been closed")
        lost = self._peers.lost
        if lost < 0:
            return
        rank = dist.get_process_group_ranks(self.group)[lost]
        with naming_lost_ranks(self.group):
            raise RuntimeError(
                f"waited {self.timeout:g} seconds for rank {rank} in vain; this buffer is of no use any more"
            )

    def problem(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> str | None:
        """What the kernels cannot take; the shapes fit."""
        if {t.device for t in (x, topk_idx, topk_weights)} != {self.device}:
            return (
                f"over ipc tensors must be on {self.device}, got {x.device}, {topk_idx.device}, {topk_weights.device}"
            )
        row_bytes = x.shape[1] * x.element_size()
        fits = row_bytes > 0 and row_bytes % VECTOR_BYTES == 0 and topk_idx.shape[1] <= MAX_TOPK
        if x.dtype not in DTYPES or topk_weights.dtype != torch.float32 or not fits:
            found = f"{x.shape[1]} {x.dtype}, {topk_idx.shape[1]} and {topk_weights.dtype}".replace("torch.", "")
            return (
                f"over ipc x must be bfloat16 or float32 in rows of whole {VECTOR_BYTES} bytes, topk at most {MAX_TOPK} "
                f"and the weights float32, got {found}"
            )
        return None

    def agree(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, found: str | None) -> Told:
        """Tells all ranks what this one dispatches; the host waits for the device here. Raises as counts.exchange does."""
        if found is not None:
            topk_idx = torch.empty(0, 1, dtype=torch.int64, device=self.device)
        head = counts.head_of(x, topk_idx, topk_weights, found)
        said, offsets, way = self._exchange(topk_idx, [*head, topk_idx.shape[0], 0, 0])
        *numbers, num_rows = said.tolist()
        self.raise_lost()
        rows = [numbers[8 * i : 8 * i + 8] for i in range(self.layout.ranks)]
        counts.compare([row[:5] for row in rows], found, self.layout)
        return self._told(offsets, way, num_rows, max(row[5] for row in rows))

    def tell(self, topk_idx: Tensor, num_rows: int, max_tokens: int) -> Told:
        """The same without a word to the host."""
        _, offsets, way = self._exchange(topk_idx, [0] * 8)
        return self._told(offsets, way, num_rows, max_tokens)

    def _told(self, offsets: Tensor, way: Way, num_rows: int, max_tokens: int) -> Told:
        if self.across:
            way = way._replace(relay=offsets.new_zeros(self.layout.nodes, max_tokens))
        return Told(offsets, way, num_rows, max_tokens)

    def _exchange(self, topk_idx: Tensor, head: list[int]) -> tuple[Tensor, Tensor, Way]:
        """The heads of all ranks with the offsets behind them, the offsets alone, and the way."""
        layout, new = self.layout, topk_idx.new_empty
        topk_idx = topk_idx.contiguous()
        near = topk_idx.clamp(0, layout.num_experts - 1)  # what does not exist is said, and must do no harm until then
        self._keep_order()
        own_offsets, _, pairs = torch.ops.dsv3.moe_permutation(near, layout.num_experts)
        sources = layout.ranks + layout.nodes * self.across
        sizes = (8 * layout.ranks + layout.num_local_experts + 1,), (layout.num_experts,), (sources, self.num_sms)
        said, shift, arrivals = (new(size, dtype=torch.int32) for size in sizes)
        heads, offsets = said[: 8 * layout.ranks].view(-1, 8), said[8 * layout.ranks :]
        self._native.comm_exchange(
            heads, offsets, shift, arrivals, topk_idx, own_offsets, head, layout.ranks_per_node, self._peers
        )
        return said, offsets, Way(near, pairs, shift, arrivals)

    def _keep_order(self) -> None:
        """Kernels of two calls must not run at once, as both would count the same rings: another stream than the last call's
        waits for that one. While one is captured only whoever replays it can see to that."""
        stream = torch.cuda.current_stream(self.device)
        if stream != self._stream and not torch.cuda.is_current_stream_capturing():
            stream.wait_stream(self._stream)
            self._stream = stream

    def spread(self, x: Tensor, weights: Tensor, told: Told, cast: bool) -> tuple[Tensor, ...]:
        """Tokens and their weights to the experts -> data [R, H], weights [R], position, and the scales where cast."""
        rows, way = told.num_rows, told.way
        x, weights = _aligned(x), _aligned(weights)
        self._keep_order()
        data, *sf = empty_per_token(x, rows, x.shape[1]) if cast else (x.new_empty(rows, x.shape[1]),)
        row_weights = weights.new_empty(rows)
        position = way.topk_idx.new_full((self.layout.ranks * told.max_tokens, way.topk_idx.shape[1]), rows)
        *told_way, relay = way
        self._native.comm_dispatch(
            data, *((sf[0], weights.new_empty(rows, -(-sf[0].shape[1] // 4) * 4)) if cast else (None, None)),
            row_weights, position, relay, x, weights, *told_way, told.offsets, told.max_tokens, cast, FLOOR, self._peers,
        )  # fmt: skip
        return data, row_weights, position, *sf

    def resend(self, x: Tensor, way: Way, offsets: Tensor, num_rows: int, cast: bool) -> Tensor:
        """Other rows of the same tokens -> [R, H] of x's dtype; cast: they travel as FP8."""
        rows, x = x.new_empty(num_rows, x.shape[1]), _aligned(x)
        self._keep_order()
        *there, _ = way
        self._native.comm_dispatch(
            rows, None, None, None, None, None, x, None, *there, offsets, 0, cast, GRADIENT_FLOOR, self._peers
        )
        return rows

    def send(self, x: Tensor, topk_idx: Tensor, weights: Tensor, cast: bool) -> None:
        """The first half of a dispatch in low-latency mode."""
        x, weights = _aligned(x), _aligned(weights)
        self._keep_order()
        self._native.comm_send(x, weights, topk_idx, self.layout.num_experts, cast, FLOOR, self._peers)

    def receive(self, x: Tensor, topk_idx: Tensor, cast: bool) -> Masked:
        """The second half; x and topk_idx are what was sent."""
        layout, (tokens, _) = self.layout, self.window
        experts, room = layout.num_local_experts, layout.ranks * tokens
        rows, sf = empty_masked(x, experts, room, cast=cast)
        weights = torch.empty(experts, room, device=self.device)
        sizes = (experts,), (layout.ranks,), (layout.ranks, tokens), (layout.ranks, tokens, topk_idx.shape[1])
        counts, *way = (topk_idx.new_empty(size, dtype=torch.int32) for size in sizes)
        self._keep_order()
        self._native.comm_receive(rows, sf, weights, counts, *way, self._peers)
        return Masked(rows, sf, weights, counts, x.dtype, (topk_idx, *way))

    def send_sums(self, y: Tensor, masked: Masked, fp32: bool) -> None:
        """The first half of a combine."""
        y = _aligned(y)
        self._keep_order()
        self._native.comm_send_sums(y, *masked.way[1:], fp32, self._peers)

    def receive_sums(self, y: Tensor, masked: Masked, fp32: bool) -> Tensor:
        """The second half: [T, H]."""
        topk_idx, layout = masked.way[0], self.layout
        out = y.new_empty(topk_idx.shape[0], y.shape[2])
        self._keep_order()
        self._native.comm_receive_sums(out, topk_idx, layout.num_experts, layout.ranks_per_node, fp32, self._peers)
        return out

    def sum(
        self, y: Tensor, row_weights: Tensor | None, way: Way, position: Tensor, fp32: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Rows [R, H] home, summed -> [T, H]; and what row_weights [R] hold for each pair -> [T, k]."""
        out = y.new_empty(way.topk_idx.shape[0], y.shape[1])
        weights = None if row_weights is None else row_weights.new_empty(way.topk_idx.shape)
        y, row_weights = _aligned(y), None if row_weights is None else _aligned(row_weights)
        self._keep_order()
        self._native.comm_combine(
            out, weights, y, row_weights, way.topk_idx, position, way.relay, self.layout.num_experts,
            self.layout.ranks_per_node, fp32, self._peers,
        )  # fmt: skip
        return out, weights


class _Spread(Function):
    """rows, weights, position; over FP8 rows stand for the data and the scales that follow (see fp8.spread_cast)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, link: Link, told: Told, wire: torch.dtype | None
    ) -> tuple[Tensor, ...]:
        cast = wire == torch.float8_e4m3fn
        data, row_weights, position, *sf = link.spread(x, weights, told, cast)
        ctx.save_for_backward(*told.way, position)
        ctx.link, ctx.fp32 = link, wire == torch.float32
        ctx.shape, ctx.dtype = data.shape, x.dtype
        ctx.set_materialize_grads(False)
        if not cast:
            ctx.mark_non_differentiable(position)
            return data, row_weights, position
        ctx.mark_non_differentiable(position, data, *sf)
        return x.new_full((), float("nan")).expand(data.shape), row_weights, position, data, *sf

    @staticmethod
    def backward(ctx: Any, drows: Tensor | None, dweights: Tensor | None, *none: None) -> tuple[Tensor | None, ...]:
        *way, position = ctx.saved_tensors
        if drows is None:
            drows = torch.zeros(ctx.shape, dtype=ctx.dtype, device=position.device)
        if dweights is None:  # other ranks may have them
            dweights = torch.zeros(ctx.shape[0], device=position.device)
        grads = ctx.link.sum(drows, dweights, Way(*way), position, ctx.fp32)
        return *grads, None, None, None


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, link: Link, way: Way, position: Tensor, offsets: Tensor, wire: Any) -> Tensor:
        ctx.save_for_backward(*way, offsets)
        ctx.link, ctx.num_rows, ctx.cast = link, y.shape[0], wire == torch.float8_e4m3fn
        return link.sum(y, None, way, position, wire == torch.float32)[0]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *way, offsets = ctx.saved_tensors
        drows = ctx.link.resend(dout, Way(*way), offsets, ctx.num_rows, ctx.cast)
        return drows, None, None, None, None, None


def spread(x: Tensor, weights: Tensor, link: Link, told: Told, wire: torch.dtype | None) -> tuple[Tensor, ...]:
    """x [T, H] and weights [T, k] -> rows, their weights [R], position and, over FP8, data and scales; differentiable
    through rows and their weights."""
    return _Spread.apply(x, weights, link, told, wire)


def add_up(y: Tensor, link: Link, way: Way, position: Tensor, offsets: Tensor, wire: torch.dtype | None) -> Tensor:
    """The sum of every token's rows, differentiable in y."""
    return _Sum.apply(y, link, way, position, offsets, wire)


def most_window_tokens(layout: counts.Layout) -> int:
    """The most tokens of a rank that low-latency mode takes."""
    return min(MAX_WINDOW_TOKENS, WINDOW_WORDS // (layout.ranks * -(-layout.num_local_experts // 32)))


def _aligned(x: Tensor) -> Tensor:
    """x contiguous and where the kernels' vectors can begin, or a copy."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _watch(peers: Any, ranks: list[int], stopped: threading.Event) -> None:
    """Ends the waiting of kernels for a rank that is gone: the host may itself be waiting for them. Looks at no one's beat
    before a kernel has waited for a second."""
    store = dist.group.WORLD.get_group_store().clone()
    while not stopped.wait(0.5):
        if not peers.take_long_wait():
            continue
        try:
            lost = lost_ranks(ranks, store)
        except RuntimeError:  # the store is gone, and so is the rank that holds it
            lost = [0]
        if lost:
            peers.give_up(next((place for place, rank in enumerate(ranks) if rank in lost), 0))
            return


def _objection(layout: counts.Layout, device: torch.device, across: bool) -> str | None:
    if registry.NATIVE_ERROR:
        return registry.NATIVE_ERROR
    if device.type != "cuda" or not torch.cuda.is_available() or not registry.is_hopper(device):
        return f"{device} is not a Hopper GPU"
    most_nodes, most = (MAX_NODES, MAX_GROUP) if across else (layout.nodes, MAX_RANKS)
    if layout.ranks > most or layout.nodes > most_nodes or (across and layout.ranks_per_node > MAX_RANKS):
        nodes = f" on {layout.nodes} nodes" if across else ""
        limits = f"{MAX_RANKS} on each of {MAX_NODES} and {MAX_GROUP} in all" if across else f"{MAX_RANKS}"
        return f"{layout.ranks} ranks{nodes} are more than {limits}"
    if layout.num_experts > MAX_EXPERTS:
        return f"{layout.num_experts} experts are more than {MAX_EXPERTS}"
    return nvshmem.objection() if across else None


def _gpu(device: torch.device) -> str:
    there = device.type == "cuda" and torch.cuda.is_available()
    return str(torch.cuda.get_device_properties(device).uuid) if there else "none"
