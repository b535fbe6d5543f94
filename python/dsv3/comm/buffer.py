"""The expert-parallel seam: tokens go to the ranks that hold their experts, and the results come back.

A dispatch is a chain of steps: exchanges between ranks, across nodes and within one, then the copies into expert order
within the rank. Combine, and the backward of dispatch, walk the chain from its end and add up what a token got at every
step. So the tree of sums is fixed: experts within a rank, ranks within a node, nodes.

In exact mode the host reads how many rows come, and tensors have their number. In static mode (`max_recv`) shapes are fixed
and the host reads nothing; rows that are nobody's are neither read nor written.
"""

from __future__ import annotations

import logging
from operator import itemgetter

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.comm import counts, ipc, low_latency, reach
from dsv3.comm.alive import Heartbeat, naming_lost_ranks
from dsv3.comm.aside import Aside
from dsv3.comm.fp8 import add_up_cast, spread_cast
from dsv3.comm.low_latency import Masked, Pending
from dsv3.comm.room import Room
from dsv3.comm.steps import (
    Copies,
    Exchange,
    FixedCopies,
    Step,
    add_up,
    blocks_to,
    copies_to,
    distinct,
    fixed_copies_to,
    spread,
)
from dsv3.reference.moe import check_experts

TRANSPORTS = ("auto", "local", "collective", "ipc", "nvshmem")
WIRES = (None, torch.float32, torch.float8_e4m3fn)
FP8 = torch.float8_e4m3fn

log = logging.getLogger("dsv3")


class Dispatched(tuple[Tensor, ...]):
    """What a dispatch gives the G local experts: a flat tuple of tensors, R rows sorted by local expert.

    Behind the first five come the two of `cast`, where the wire is FP8, and from every exchange between ranks its source,
    position and splits (see comm/steps.py), or over ipc what makes the `way`. T is the number of tokens that reached this
    rank. In static mode R is max_recv, T counts tokens that could have come, and rows from offsets[G] on hold anything.
    Over ipc T is ranks times the most tokens of a rank, position also has numbers beyond R for none, and source is empty.
    """

    def __new__(cls, *tensors: Tensor) -> Dispatched:
        return super().__new__(cls, tensors)

    rows = property(
        itemgetter(0), doc="[R, H] of the dispatched dtype, for autograd; over FP8 NaN that takes no memory"
    )
    topk_weights = property(itemgetter(1), doc="fp32 [R]: the routing weight of each row, applied by the expert")
    offsets = property(itemgetter(2), doc="int32 [G+1]: where each local expert's rows begin")
    source = property(itemgetter(3), doc="int64 [R]: the (token, slot) pair of a row; in static mode T*k for none")
    position = property(
        itemgetter(4),
        doc="int64 [T, k]: the rows of a token, ascending; R where a slot has none here, R + 1 if for want of room",
    )

    @property
    def cast(self) -> tuple[Tensor, ...]:
        """Over FP8 what arrived, e4m3 [R, H] and fp32 [R, ceil(H/128)], as per_token_cast lays it out; otherwise empty."""
        return self[5:7] if len(self) > 5 and self[5].dtype == FP8 else ()

    @property
    def x(self) -> Tensor:
        """[R, H]: what arrived, e4m3 or rows."""
        return self.cast[0] if self.cast else self.rows

    @property
    def x_sf(self) -> Tensor | None:
        """fp32 [R, ceil(H/128)]: the scales of x, where it is FP8."""
        return self.cast[1] if self.cast else None

    @property
    def num_recv(self) -> int:
        """R, known without asking the device."""
        return self.rows.shape[0]

    @property
    def way(self) -> ipc.Way:
        """How the rows came over ipc."""
        return ipc.Way(*self[5 + len(self.cast) :])

    def steps(self, group: dist.ProcessGroup | None, *, fixed: bool = False) -> list[Step]:
        """The way that the rows came; fixed: in static mode."""
        kind, first = FixedCopies if fixed else Copies, 5 + len(self.cast)
        exchanges = [self[start : start + 3] for start in range(first, len(self), 3)]
        ways: list[Step] = [Exchange(group, kind(*copies), splits) for *copies, splits in exchanges]
        return [*ways, kind(self.source, self.position)]


class ExpertBuffer:
    """Moves tokens to their experts and back. Ranks hold equal runs of experts, the first rank the first ones.

    A token goes once to each rank that needs it. With several nodes it goes once to each node, to the rank that has there
    the index which its own rank has here, and that one forwards it (`send`: to each rank). No token is dropped. For the same
    number of ranks and of ranks a node, results are the same bits run after run, whatever the transport.

    All ranks of the group make the buffer together, with the same transport, and use it equally often, forward and
    backward; one that has no tokens dispatches none. Where a call fails on one rank alone, the others wait for it, until that
    rank's process ends; then they raise RankLost, which names it (dsv3/comm/alive.py). For one that lives they wait as long as
    the group's time-out, over ipc `timeout`, and then raise RuntimeError.

    Args:
        group: the ranks that share the experts; None: the default process group, or with "local" this rank on its own.
        num_experts: E, over all ranks.
        transport: "local", one rank that holds all experts, no communication; "collective", torch.distributed's
            all_to_all_single (gloo or NCCL); "ipc", kernels that write into the memory of the other ranks, which are on one
            machine and may share its Hopper GPUs; "nvshmem", the same within a node, and NVSHMEM between nodes (at most 8 of
            16 ranks, 64 in all; needs the wheel nvidia-nvshmem-cu13): what is said of ipc holds for it too; "auto", local for
            one rank, and for more ipc on GPUs, otherwise collective. Where ranks cannot reach each other so, all say so in one
            line and use collective; only where NVSHMEM itself does not start, it ends the process, with a line of its own.
        ranks_per_node: consecutive ranks that are a node; None: all of them, over nvshmem those of a machine.
        wire_dtype: of the rows between ranks and of the sums of a rank and of a node: None for x's; torch.float32; or
            torch.float8_e4m3fn on the way there (dispatch, and combine's backward), cast once by the sender in tiles of
            1x128 with power-of-two scales, and x's dtype on the way back.
        max_recv: None for exact mode; or the rows that a rank's experts get at most, for static mode: R is max_recv, no
            count is read on the host. Where more come, a CPU raises on all ranks at once; a GPU fills what it gives with NaN,
            and every later dispatch on this rank raises; a sum that lacks a row is NaN too (over ipc only if another row of
            its token there has room).
        max_tokens: of a rank in one dispatch; wanted in static mode alone.
        device: where x will be. None: this process's GPU where the transport is ipc or the group's backend NCCL, otherwise
            the CPU.
        num_sms: multiprocessors that kernels of ipc take while rows move; None: 20, or fewer where ranks share a GPU. Ranks
            that share one leave 4 of it free, or a kernel that others wait for might never start. What finds the order of the
            pairs before takes all of them for some us.
        low_latency: most tokens of a rank in a call of `send`; None where it is not used. Over ipc at most 1024, and at most
            22975 / (ranks * ceil(local experts / 32)). Every token of every rank has its place there and back, twice: 4 x ranks
            x low_latency x ceil(hidden / 2048) x 8.7 KB; between several nodes twice that, of NVSHMEM's memory, which has the
            size of what the first buffer of the process takes and up to 768 MB more, at least 256: make the largest one first.
        hidden: H of what is sent; wanted with low_latency alone.
        timeout: seconds that a kernel of ipc waits for a rank that is alive (for one that is gone: some 7). It then gives up,
            and the next call raises. What NVSHMEM does where a network fails is its own: it may end the process,
            or have `send` wait for ever.

    In static mode the first dispatch logs, as "dsv3", what memory it takes (see Room.line). The exchanges of collective have
    room for ranks x max_tokens tokens and move all of it, and what must be the same on all ranks is not compared.

    Over ipc dispatch and combine launch kernels that wait for the other ranks' on the device: all ranks call a buffer in the
    same order, and buffers that are used at once share the multiprocessors of num_sms. In static mode calls can be captured
    in a CUDA graph once one has run. Replays and calls must follow each other on the device; after replays `check` tells of
    ranks that were waited for in vain.

    Raises:
        ValueError: a transport that is unknown or does not fit the group, a group without this process, numbers that are
            no ints or do not divide, and, on every rank, numbers that differ between ranks.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        num_experts: int,
        transport: str = "auto",
        ranks_per_node: int | None = None,
        wire_dtype: torch.dtype | None = None,
        max_recv: int | None = None,
        max_tokens: int | None = None,
        device: torch.device | None = None,
        num_sms: int | None = None,
        low_latency: int | None = None,
        hidden: int | None = None,
        timeout: float = 600.0,
    ) -> None:
        if transport not in TRANSPORTS:
            raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {transport!r}")
        sizes = {"ranks_per_node": ranks_per_node, "max_recv": max_recv, "max_tokens": max_tokens, "num_sms": num_sms}
        sizes |= {"low_latency": low_latency, "hidden": hidden}
        for name, number in {"num_experts": num_experts, **sizes}.items():
            if type(number) is not int and (number is not None or name == "num_experts"):
                raise ValueError(f"{name} must be an int, got {number!r}")
        if (max_recv is None) != (max_tokens is None) or min(max_recv or 1, max_tokens or 1) < 0:
            raise ValueError(f"max_recv and max_tokens go together and are at least 0, got {max_recv} and {max_tokens}")
        if (low_latency is None) != (hidden is None) or (low_latency is not None and min(low_latency, hidden) < 1):
            raise ValueError(f"low_latency and hidden go together and are at least 1, got {low_latency} and {hidden}")
        if None not in (low_latency, max_tokens) and low_latency > max_tokens:
            raise ValueError(f"low_latency must be at most max_tokens, got {low_latency} and {max_tokens}")
        if wire_dtype not in WIRES:
            raise ValueError(f"wire_dtype must be one of {', '.join(map(str, WIRES))}, got {wire_dtype}")
        if transport in ("collective", "ipc", "nvshmem") and not dist.is_initialized():
            raise ValueError(
                f"transport {transport} needs a process group: torch.distributed.init_process_group comes first"
            )
        alone = not dist.is_initialized() or (transport == "local" and group is None)
        ranks, rank = (1, 0) if alone else (dist.get_world_size(group), dist.get_rank(group))
        if rank < 0:
            raise ValueError("this process is not one of the group's ranks")
        if transport == "local" and ranks > 1:
            raise ValueError(f"transport local is for one rank, and the group has {ranks}")
        self.group, self.num_experts, self.wire_dtype = group, num_experts, wire_dtype
        self.transport = transport
        if transport == "auto":
            on_gpu = ranks > 1 and _device(group, device).type == "cuda"
            self.transport = "local" if ranks == 1 else "ipc" if on_gpu else "collective"
        if self.transport != "local":
            self._heartbeat = Heartbeat()
            self._agree({"transport": transport, "num_experts": num_experts, "wire_dtype": wire_dtype, **sizes})
        width = ranks if ranks_per_node is None else ranks_per_node
        if ranks_per_node is None and self.transport == "nvshmem":
            width = reach.ranks_per_machine(group) or ranks
        if num_experts < 1 or num_experts % ranks:
            raise ValueError(
                f"num_experts must be a multiple of the ranks, got {num_experts} experts for {ranks} ranks"
            )
        if width < 1 or ranks % width:
            raise ValueError(f"ranks_per_node must divide the ranks, got {ranks_per_node} for {ranks} ranks")
        self.layout = counts.Layout(num_experts, ranks, width, rank)
        self.room = None if max_recv is None else Room(self.layout, max_tokens, max_recv)
        self._few = low_latency, hidden
        self._told = False  # whether the memory has been logged
        self._aside = Aside()
        self._link = None
        if self.transport in ("ipc", "nvshmem"):
            self._open(_device(group, device, "cuda"), num_sms, timeout)

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Dispatched:
        """Sends every token to its experts; differentiable in x (through the handle's `rows`) and topk_weights.

        In exact mode "collective" and "ipc" read all ranks' counts once on the host. On a GPU "local" and static mode never
        wait for the device, so they do not look at the expert ids; over ipc one that does not exist means the nearest that
        does.

        Args:
            x: [T, H], bf16, fp16, fp32 or fp64; over FP8 bf16 or fp32, H a multiple of 16; over ipc bf16 or fp32, rows of
                whole 16 bytes. Ranks may differ in T, and have T = 0.
            topk_idx: int64 [T, k], experts in 0..E-1; over ipc k at most 16.
            topk_weights: fp32 [T, k]; of another float dtype, so are the handle's, but not over ipc.

        Raises:
            ValueError: shapes, dtypes or expert ids that do not fit, in static mode also T > max_tokens. Between ranks exact
                mode, and static mode on CPUs, raise on every rank if they do not on one, or if H, k or a dtype differ.
            RuntimeError: "local" on a CPU, expert ids that do not exist; static mode, more rows than max_recv; over ipc, a rank
                that was waited for in vain (see RankLost).
        """
        cast = self.wire_dtype == FP8
        found = counts.problem(x, topk_idx, topk_weights, cast)
        if self._link is not None:
            self._link.raise_lost()
            found = found or self._link.problem(x, topk_idx, topk_weights)
        if self.room is not None:
            self.room.raise_noted()
            if found is None and x.shape[0] > self.room.max_tokens:
                found = f"{x.shape[0]} tokens are more than max_tokens {self.room.max_tokens}"
        traffic: counts.Counts | ipc.Told | None = None
        if self.room is None and self._link is not None:
            traffic = self._link.agree(x, topk_idx, topk_weights, found)
        elif self.transport == "collective" and (self.room is None or x.device.type == "cpu"):
            told = counts.exchange(self.layout, self.group, x, topk_idx, topk_weights, found)
            traffic = told if self.room is None else None
        if found is not None:
            raise ValueError(f"dispatch: {found}")
        if self.room is not None and not self._told:
            self._told = True
            dtype, exchanged = self.wire_dtype or x.dtype, self.transport == "collective"
            log.info("%s", self.room.line(x.shape[1], topk_idx.shape[1], dtype, exchanged=exchanged))
        if self._link is not None:
            return self._dispatch_over(self._link, x, topk_idx, topk_weights, traffic)
        exchanges, copies, offsets = self._route(topk_idx, traffic)
        spoiled = None
        if self.room is not None:
            offsets, spoiled = self._fit(offsets)
        steps = [*exchanges, copies]
        arrived: tuple[Tensor, ...] = ()
        if cast:
            rows, *arrived = spread_cast(x, steps)
        else:
            rows = spread(x.to(self.wire_dtype or x.dtype), steps).to(x.dtype)
        if spoiled is not None:
            (arrived[1] if cast else rows.detach()).masked_fill_(spoiled, float("nan"))
        weights = copies.of_pairs(spread(topk_weights, exchanges))
        ways = [tensor for way in exchanges for tensor in (*way.copies, way.splits)]
        return Dispatched(rows, weights, offsets, *copies, *arrived, *ways)

    def combine(self, y: Tensor, handle: Dispatched) -> Tensor:
        """Brings the rows y [R, H] home and sums each token's, unweighted -> [T, H]; differentiable in y.

        In fp32: experts ascending within a rank, then ranks ascending within a node, then nodes ascending, with one
        rounding after each. Raises ValueError, on this rank alone, where y has not the shape and dtype of the handle's rows;
        over ipc RankLost or RuntimeError as dispatch does.
        """
        if (y.shape, y.dtype) != (handle.rows.shape, handle.rows.dtype):
            expected, got = (f"{tuple(t.shape)} {t.dtype}".replace("torch.", "") for t in (handle.rows, y))
            raise ValueError(f"combine: y must be {expected} like handle.rows, got {got}")
        if self._link is not None:
            self._link.raise_lost()
            return ipc.add_up(y, self._link, handle.way, handle.position, handle.offsets, self.wire_dtype)
        steps = handle.steps(self.group, fixed=self.room is not None)
        if self.wire_dtype == FP8:
            return add_up_cast(y, steps)
        return add_up(y.to(self.wire_dtype or y.dtype), steps).to(y.dtype)

    def dispatch_aside(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Pending[Dispatched]:
        """`dispatch` on the buffer's own stream: it begins when all has run that the current stream has been given so far, and
        what that is given from now on runs beside it, on the multiprocessors that num_sms leaves. So does its backward.
        `receive` gives the handle and has the current stream wait for it. Between ranks, in exact mode, the host waits for the
        counts.
        """
        return self._aside.run(lambda: self.dispatch(x, topk_idx, topk_weights), (x, topk_idx, topk_weights))

    def combine_aside(self, y: Tensor, handle: Dispatched) -> Pending[Tensor]:
        """`combine` on the buffer's own stream, as dispatch_aside is."""
        return self._aside.run(lambda: self.combine(y, handle), (y, *handle))

    def send(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Pending[Masked]:
        """Low-latency dispatch of at most `low_latency` tokens, of which `receive` gives what came; not differentiable.

        Args:
            x: [T, H] of the buffer's hidden; dtypes and the rest as of `dispatch`.
            topk_idx: as of `dispatch`, but a token's experts all differ. Over ipc it is read again when the sums are received,
                and has to stay as it is until then.

        Raises:
            ValueError: what does not fit; over ipc, and for shapes, on this rank alone.
        """
        most, hidden = self._few
        if most is None:
            raise ValueError("send: the buffer was made without low_latency")
        if x.dim() != 2 or x.shape[1] != hidden or x.shape[0] > most:
            raise ValueError(f"send: x must be at most {most} rows of {hidden}, got {tuple(x.shape)}")
        if self._link is None:
            return low_latency.send(self, x, topk_idx, topk_weights, most * self.layout.ranks)
        self._link.raise_lost()
        cast = self.wire_dtype == FP8
        problem = counts.problem(x, topk_idx, topk_weights, cast) or self._link.problem(x, topk_idx, topk_weights)
        if problem is not None:
            raise ValueError(f"send: {problem}")
        link, x, topk_idx = self._link, x.detach(), topk_idx.contiguous()
        link.send(x, topk_idx, topk_weights.detach(), cast)
        return Pending(lambda: link.receive(x, topk_idx, cast))

    def send_sums(self, y: Tensor, masked: Masked) -> Pending[Tensor]:
        """Low-latency combine of y [G, R, H]: `receive` gives [T, H], the sums that `combine` gives.

        Raises ValueError, on this rank alone, where y has not the shape of the received rows and the dtype of what was sent.
        """
        if (y.shape, y.dtype) != (masked.x.shape, masked.dtype):
            found = f"{tuple(masked.x.shape)} {masked.dtype}, got {tuple(y.shape)} {y.dtype}".replace("torch.", "")
            raise ValueError(f"send_sums: y must be {found}")
        if self._link is None:
            return low_latency.send_sums(self, y, masked)
        self._link.raise_lost()
        link, y, fp32 = self._link, y.detach(), self.wire_dtype == torch.float32
        link.send_sums(y, masked, fp32)
        return Pending(lambda: link.receive_sums(y, masked, fp32))

    def check(self) -> None:
        """Raises what an earlier call has found out on the device since, without waiting for it: too many rows; over ipc, ranks
        that were waited for in vain."""
        if self.room is not None:
            self.room.raise_noted()
        if self._link is not None:
            self._link.raise_lost()

    def close(self) -> None:
        """Frees what ipc holds, as otherwise only the end of the process does (NVSHMEM's memory, of which later buffers have
        parts, stays until then); all ranks call it together, and nothing after it."""
        if self._link is not None:
            self._link.close()

    def _open(self, device: torch.device, num_sms: int | None, timeout: float) -> None:
        """Connects the ranks over ipc or nvshmem, or leaves them to collective."""
        try:
            tokens, hidden = self._few
            window = None if tokens is None else (tokens, 4 * hidden)  # fp32 rows or sums are the widest
            across = self.transport == "nvshmem" and self.layout.nodes > 1
            self._link = ipc.Link(
                self.group, self.layout, device, across=across, num_sms=num_sms, window=window, timeout=timeout
            )
        except reach.Unreachable as reason:
            wanted, self.transport = self.transport, "collective"
            if self.layout.rank == 0:
                log.warning("experts are exchanged through torch.distributed instead of %s: %s", wanted, reason)

    def _dispatch_over(
        self, link: ipc.Link, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, told: ipc.Told | None
    ) -> Dispatched:
        """told: None in static mode."""
        if self.room is not None:
            told = link.tell(topk_idx, self.room.max_recv, self.room.max_tokens)
        assert told is not None
        offsets = told.offsets if self.room is None else self._fit(told.offsets)[0]
        rows, weights, position, *cast = ipc.spread(x, topk_weights, link, told, self.wire_dtype)
        return Dispatched(rows, weights, offsets, position.new_empty(0), position, *cast, *told.way.tensors)

    def _route(
        self, slots: Tensor, traffic: counts.Counts | None
    ) -> tuple[list[Exchange], Copies | FixedCopies, Tensor]:
        """The exchanges on the way of tokens with the experts slots [T, k], the copies at its end, and their offsets."""
        if self.transport == "local" and self.room is not None and not torch.compiler.is_compiling():
            check_experts(slots, self.num_experts)  # exact mode's op does, and ranks tell each other
        exchanges = []
        num_rows = slots.numel() if traffic is None else traffic.num_rows
        for level in self.layout.levels if self.transport == "collective" else ():
            peers = len(level.peers)
            destination = distinct(slots // level.span, peers)
            if traffic is None:
                block = self.room.max_tokens * (1 if level.across else self.layout.nodes)
                sent = received = [block if rank in level.peers else 0 for rank in range(self.layout.ranks)]
                copies = blocks_to(destination, peers, block)
            else:
                sent, received = traffic.splits(level)
                copies, _ = copies_to(destination, peers, sum(sent))
            way = Exchange(self.group, copies, torch.tensor([sent, received]))
            slots = way.spread(slots, blank=-1) - level.index * level.span
            slots = slots.where((slots >= 0) & (slots < level.span), level.span)  # that is no expert of ours
            exchanges.append(way)
        if self.room is not None:
            return exchanges, *fixed_copies_to(slots, self.layout.num_local_experts, self.room.max_recv)
        return exchanges, *copies_to(slots, self.layout.num_local_experts, num_rows)

    def _fit(self, offsets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Offsets within max_recv and, on a GPU, whether they were not; on a CPU that raises."""
        spoiled = None
        if offsets.device.type == "cpu":
            self.room.raise_on_every_rank(offsets[-1], self.group)
        else:
            spoiled = self.room.note(offsets[-1])
        return offsets.clamp(max=self.room.max_recv), spoiled

    def _agree(self, settings: dict[str, object]) -> None:
        everyone: list[dict[str, object]] = [{}] * dist.get_world_size(self.group)
        with naming_lost_ranks(self.group):
            dist.all_gather_object(everyone, settings, group=self.group)
        for rank, other in enumerate(everyone):
            for name, value in other.items():
                if value != everyone[0][name]:
                    raise ValueError(
                        f"{name} must be the same on all ranks, got {everyone[0][name]} on rank 0 and {value} on rank {rank}"
                    )


def _device(group: dist.ProcessGroup | None, device: torch.device | None, kind: str = "cpu") -> torch.device:
    """device, or what it stands for: a GPU if `kind` or the backend says so."""
    if device is None:
        device = torch.device("cuda" if kind == "cuda" or dist.get_backend(group) == "nccl" else "cpu")
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return device
