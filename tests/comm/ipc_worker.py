"""What the tests of ipc and nvshmem alone start under torchrun: four processes that share a GPU, or one a GPU, where collective
goes over NCCL. Arguments: the transport, and how many rounds of chance."""

from __future__ import annotations

import logging
import os
import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.comm import Dispatched, ExpertBuffer, nvshmem
from dsv3.ops import registry
from tests.comm.cases import arrived

RANKS, EXPERTS, TOPK, HIDDEN = int(os.environ["WORLD_SIZE"]), 64, 8, 1024
FP8 = torch.float8_e4m3fn
STATIC = {"max_recv": 4096, "max_tokens": 300}
TRANSPORT = sys.argv[1]  # two nodes, which but over nvshmem is a matter of sums alone


def buffer_of(transport: str = TRANSPORT, group: dist.ProcessGroup | None = None, **settings: object) -> ExpertBuffer:
    settings = {"ranks_per_node": RANKS // 2, **settings}
    return ExpertBuffer(group, num_experts=EXPERTS, transport=transport, timeout=20, **settings)


def draw(tokens: int, hidden: int = HIDDEN, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(tokens, hidden, device="cuda").to(dtype)
    idx = torch.rand(tokens, EXPERTS, device="cuda").argsort(-1)[:, :TOPK].contiguous()
    return x, idx, torch.rand(tokens, TOPK, device="cuda")


def there_and_back(buffer: ExpertBuffer, x: Tensor, idx: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """All that a training step sees, elementwise experts between."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    handle = buffer.dispatch(x, idx, weights)
    end = int(handle.offsets[-1])
    codes = {"codes": handle.x[:end].view(torch.uint8), "sf": handle.x_sf[:end]} if handle.cast else {}
    rows = arrived(handle)
    y = rows * handle.topk_weights[:, None].to(rows.dtype)
    out = buffer.combine(y, handle)
    out.backward(x.detach() * 1e-3)
    found = {**codes, "offsets": handle.offsets, "rows": rows[:end], "out": out, "dx": x.grad, "dweights": weights.grad}
    return {name: value.detach().cpu() for name, value in found.items()}


def by_chance(rounds: int) -> None:
    """Sizes that change from call to call, some of them 0, against the collective transport over gloo, bit for bit."""
    gloo = dist.new_group(backend="gloo")
    for wire in (None, torch.float32, FP8):
        pair = [buffer_of(wire_dtype=wire), buffer_of("collective", gloo, wire_dtype=wire)]
        for turn in range(rounds):
            # In the last round more than channels take at a time.
            tokens = int(torch.randint(0, 300, ())) * (turn % 3 != dist.get_rank()) if turn < rounds - 1 else 1500
            hidden, dtype = ((7168, torch.bfloat16), (2048, torch.float32), (272, torch.bfloat16))[turn % 3]
            inputs = draw(tokens, hidden, dtype)
            mine, other = (there_and_back(buffer, *inputs) for buffer in pair)
            for name in mine:
                assert torch.equal(mine[name], other[name]), f"{name} of round {turn} over {wire}"
        pair[0].close()


def a_graph() -> None:
    """Captured once, replayed with other contents: what calls without a graph give, which wait for nothing on the host."""
    for wire in (None, FP8):
        buffer = buffer_of(wire_dtype=wire, **STATIC)
        x, idx, weights = draw(256)

        def step(buffer: ExpertBuffer, x: Tensor, idx: Tensor, weights: Tensor) -> tuple[Tensor, Dispatched]:
            handle = buffer.dispatch(x, idx, weights)
            rows = handle.x_sf[:, :1].to(x.dtype).expand_as(handle.rows).contiguous() if handle.cast else handle.rows
            return buffer.combine(rows, handle), handle

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step(buffer, x, idx, weights)
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            dist.barrier()
            with torch.cuda.graph(graph, stream=stream):
                out, handle = step(buffer, x, idx, weights)
        for _ in range(3):
            for target, value in zip((x, idx, weights), draw(256), strict=True):
                target.copy_(value)
            graph.replay()
            torch.cuda.synchronize()
            buffer.check()
            found, end = (out.clone(), handle.x.clone().view(torch.uint8)), int(handle.offsets[-1])
            torch.cuda.set_sync_debug_mode("error")
            again, same = step(buffer, x, idx, weights)
            torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(again, found[0])
            assert torch.equal(same.x[:end].view(torch.uint8), found[1][:end])
        del graph
        buffer.close()


def few_tokens() -> None:
    """Low-latency mode: the rows and sums of a dispatch, in a graph as without, also for ranks without tokens."""
    for wire in (None, torch.float32, FP8):
        buffer = buffer_of(wire_dtype=wire, low_latency=128, hidden=HIDDEN)
        # One node: of several, a dispatch has an expert's rows by the ranks' places in their nodes, the masked layout by rank.
        near = buffer_of("ipc", wire_dtype=wire, ranks_per_node=RANKS)
        x, idx, weights = draw(128 if dist.get_rank() else 0)
        handle = near.dispatch(x, idx, weights)
        masked = buffer.send(x, idx, weights).receive()
        assert torch.equal(masked.counts, handle.offsets.diff())
        sizes = masked.counts.tolist()
        pairs = [(masked.x, handle.x), (masked.topk_weights, handle.topk_weights)]
        pairs += [(masked.x_sf, handle.x_sf)] if handle.cast else []
        for found, expected in pairs:
            rows = torch.cat([found[g, :n].contiguous().view(torch.uint8) for g, n in enumerate(sizes)])
            assert torch.equal(rows, expected.contiguous().view(torch.uint8))

        def step(buffer: ExpertBuffer, x: Tensor, idx: Tensor, weights: Tensor) -> Tensor:
            masked = buffer.send(x, idx, weights).receive()
            rows = masked.x if masked.x_sf is None else masked.x_sf[..., :1].to(x.dtype).expand(masked.x.shape)
            return buffer.send_sums(rows.contiguous(), masked).receive()

        handle = buffer.dispatch(x, idx, weights)
        rows = handle.x_sf[:, :1].to(x.dtype).expand_as(handle.x) if handle.cast else handle.x
        expected = buffer.combine(rows.contiguous(), handle)
        assert torch.equal(step(buffer, x, idx, weights), expected)
        astray = torch.where(idx == EXPERTS - 1, idx + 1000, torch.where(idx == 0, idx - 1000, idx))
        apart = torch.cat([weights.new_zeros(1), weights.flatten()])[1:].view_as(weights)  # not where vectors begin
        assert torch.equal(step(buffer, x, astray, apart), expected), "the nearest experts"
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            step(buffer, x, idx, weights)
            torch.cuda.synchronize()
            dist.barrier()
            with torch.cuda.graph(graph, stream=stream):
                out = step(buffer, x, idx, weights)
            for _ in range(5):
                for target, value in zip((x, idx, weights), draw(len(x)), strict=True):
                    target.copy_(value)
                graph.replay()
                found = out.clone()
                assert torch.equal(step(buffer, x, idx, weights), found)
        torch.cuda.synchronize()
        buffer.check()
        del graph
        buffer.close()
        near.close()


def too_many_rows() -> None:
    """The rank whose room does not suffice gets NaN, and hears of it at its next call."""
    for wire in (None, FP8):
        buffer = buffer_of(wire_dtype=wire, max_recv=300, max_tokens=300)
        x, idx, weights = draw(100)
        idx = torch.arange(TOPK, device="cuda").expand(100, TOPK).contiguous()  # experts of rank 0
        handle = buffer.dispatch(x, idx, weights)
        out = buffer.combine(torch.ones_like(handle.rows), handle)
        assert out.isnan().all(), "every token has rows there that were dropped"
        if dist.get_rank() == 0:
            assert (handle.x_sf if handle.cast else handle.x).isnan().all()
            assert int(handle.offsets[-1]) == 300
            with pytest.raises(RuntimeError, match=f"an earlier dispatch got {RANKS * 800} rows, and max_recv is 300"):
                buffer.check()
        else:
            buffer.check()
        dist.barrier()
        buffer.close()


def a_peer_out_of_reach(caplog: list[str]) -> None:
    """One rank cannot map the others' memory: all use collective, and say so once."""
    module, name = (registry._C, "Peers") if TRANSPORT == "ipc" else (nvshmem.native(), "Network")
    real = getattr(module, name)

    class Fenced:
        symmetric_bytes = getattr(real, "symmetric_bytes", None)

        def __init__(self, *args: object) -> None:
            self.peers = real(*args)

        def __getattr__(self, name: str) -> object:
            return getattr(self.peers, name)

        def connect(self, handles: list[bytes]) -> None:
            raise RuntimeError("cudaIpcOpenMemHandle: invalid argument")

    if dist.get_rank() == RANKS - 1:
        setattr(module, name, Fenced)
    buffer = buffer_of()
    setattr(module, name, real)
    assert buffer.transport == "collective"
    reason = f"cudaIpcOpenMemHandle: invalid argument (rank {RANKS - 1})"
    line = f"experts are exchanged through torch.distributed instead of {TRANSPORT}: {reason}"
    assert caplog == [line] * (dist.get_rank() == 0)
    assert there_and_back(buffer, *draw(10))["out"].shape == (10, HIDDEN)


def memory_comes_back() -> None:
    taken = []
    for _ in range(2):
        for _ in range(4):
            buffer = buffer_of(num_sms=32)
            size = buffer._link._peers.bytes
            buffer.close()
        dist.barrier()
        torch.cuda.synchronize()
        taken.append(torch.cuda.mem_get_info()[0])
        dist.barrier()
    assert abs(taken[0] - taken[1]) < size
    assert nvshmem.memory.taken == {}, "every part of the symmetric memory has been given back"
    with pytest.raises(RuntimeError, match="this buffer has been closed"):
        buffer.check()


def mistakes() -> None:
    with pytest.raises(ValueError, match=r"num_sms must be in 1\.\.\d+ for [124] ranks a GPU, got 200"):
        buffer_of(num_sms=200)
    buffer = buffer_of()
    x, idx, weights = draw(4)
    for bad in (
        (x.half(), idx, weights),
        (x[:, :4], idx, weights),
        (x, idx, weights.double()),
        (x.cpu(), idx, weights),
    ):
        with pytest.raises(ValueError, match="dispatch: over ipc "):
            buffer.dispatch(*bad)
    buffer.close()


def main() -> None:
    own_gpu = torch.cuda.device_count() >= RANKS
    dist.init_process_group("cpu:gloo,cuda:nccl" if own_gpu else "gloo")
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("dsv3").addHandler(handler)
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    torch.manual_seed(dist.get_rank())
    by_chance(int(sys.argv[2]))
    if TRANSPORT != "collective":
        a_graph()
        too_many_rows()
        mistakes()
        memory_comes_back()
        few_tokens()
        a_peer_out_of_reach(said)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
