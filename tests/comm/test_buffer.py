"""The expert-parallel buffer between 2, 4 and 8 processes against plain loops over tokens, bit for bit: over gloo between
CPUs, and over ipc and nvshmem where there is a Hopper GPU, which they share."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.shared_gpu import shared_gpu, torchrun
from dsv3.comm import ExpertBuffer
from dsv3.comm.counts import Layout
from dsv3.comm.room import Room
from dsv3.comm.steps import fixed_copies_to
from dsv3.ops import Fp8Weight, fp8_experts, per_token_cast
from dsv3.ops.fp8_linear import GRADIENT_FLOOR
from dsv3.reference.quant import dequantize
from tests.comm.cases import CASES, FP8, Case, experts, inputs, over_wire

ON_A_GPU = [pytest.param(transport, marks=[pytest.mark.cuda, pytest.mark.alone]) for transport in ("ipc", "nvshmem")]


@pytest.fixture(scope="module", params=["collective", *ON_A_GPU])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of eight ranks got. The workers themselves check that a second run gives the same bits."""
    out = tmp_path_factory.mktemp("buffer")
    with nullcontext(os.environ) if request.param == "collective" else shared_gpu() as env:
        torchrun(8, "-m", "tests.comm.buffer_worker", out, request.param, env=env)
    return [torch.load(out / f"{rank}.pt") for rank in range(8)]


def tree(case: Case, rows: dict[int, Tensor]) -> Tensor:
    """The sum over a token's experts {expert: row [H]}: in a rank, in a node, then over nodes; each rounded once."""

    def add(values: list[Tensor]) -> Tensor:
        total = values[0].float()
        for value in values[1:]:
            total = total + value.float()
        return total.to(torch.float32 if case.wire == torch.float32 else case.dtype)

    def by(key: int, parts: dict[int, Tensor]) -> dict[int, Tensor]:
        return {
            at: add([parts[p] for p in sorted(parts) if p // key == at]) for at in sorted({p // key for p in parts})
        }

    of_rank = by(case.num_experts // case.ranks, rows)
    of_node = by(case.per_node, of_rank)
    return add([of_node[node] for node in sorted(of_node)]).to(case.dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_plain_loops(results: list[dict[str, Any]], case: Case) -> None:
    """Rows, sums and the gradients of x bit for bit; those of the weights are sums over H in another order."""
    local = case.num_experts // case.ranks
    arrived: list[list[tuple[int, int, int, int, Tensor, Tensor]]] = [[] for _ in range(case.ranks)]
    for rank in range(case.ranks):
        x, idx, weights, dout = inputs(case, rank)
        sent, dout = over_wire(case, x), over_wire(case, dout, GRADIENT_FLOOR)
        found = results[rank][case.name]
        assert found["out"].shape == found["dx"].shape == x.shape
        assert found["dweights"].shape == weights.shape
        for token in range(len(x)):
            rows, drows = {}, {}
            for slot, expert in enumerate(idx[token].tolist()):
                row, weight = sent[token : token + 1].clone().requires_grad_(), weights[token, slot].view(1).clone()
                weight.requires_grad_()
                y = experts(row, weight, torch.tensor([expert]))
                y.backward(dout[token : token + 1])
                rows[expert], drows[expert] = y[0].detach(), row.grad[0]
                torch.testing.assert_close(found["dweights"][token, slot], weight.grad[0])
                node, index = divmod(rank, case.per_node)
                arrived[expert // local].append((expert, index, node, token, x[token], weights[token, slot]))
            assert torch.equal(found["out"][token], tree(case, rows))
            assert torch.equal(found["dx"][token], tree(case, drows))
    for rank, rows in enumerate(arrived):
        rows.sort(key=lambda row: row[:4])
        found = results[rank][case.name]
        held = [row[0] for row in rows]
        assert found["offsets"].dtype == torch.int32
        assert found["offsets"].tolist() == [
            sum(e < n for e in held) for n in range(rank * local, (rank + 1) * local + 1)
        ]
        expected = torch.stack([row[4] for row in rows]) if rows else torch.empty(0, case.hidden, dtype=case.dtype)
        if case.wire == FP8:
            expected, x_sf = per_token_cast(expected, pow2_scale=True)
            assert torch.equal(found["x_sf"], x_sf)
            if not case.static:
                assert found["strides"].tolist() == list(x_sf.stride())
        assert found["x"].dtype == expected.dtype
        assert torch.equal(found["x"].view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(found["weights"], torch.tensor([float(row[5]) for row in rows]))


def test_every_case_says_something() -> None:
    """Among the random cases are tokens that need several experts of a rank, or ranks of a node, and others."""
    case = Case(8, 2)
    idx = torch.cat([inputs(case, rank)[1] for rank in range(8)])
    for span in (2, 4):
        sizes = {len({e // span for e in row}) for row in idx.tolist()}
        assert max(sizes) == case.topk
        assert min(sizes) < case.topk


def test_mistakes_are_said_on_every_rank(results: list[dict[str, Any]]) -> None:
    first, second = (results[rank]["errors"] for rank in (0, 1))
    same = "hidden size, topk and dtypes of x and of the weights must be the same on all ranks"
    expected = {
        "hidden": rf"{same}, got \(8, 2, float32, float32\) on rank 0 and \(4, 2, float32, float32\) on rank 1",
        "dtype": rf"{same}, got .* and \(8, 2, bfloat16, float32\) on rank 1",
        "topk": rf"{same}, got .* and \(8, 1, float32, float32\) on rank 1",
        "ids": r"expert ids must lie in 0\.\.7 on rank 1",
        "negative": r"expert ids must lie in 0\.\.7 on rank 1",
        "rows": r"combine: y must be \(\d, 8\) float32 like handle.rows, got \(\d, 8\) float32",
        "differ": "num_experts must be the same on all ranks, got 8 on rank 0 and 16 on rank 1",
        "full": "dispatch: rank 0 gets 8 rows, and max_recv is 4",
        "static": r"expert ids must lie in 0\.\.7 on rank 1",
        "long": "dispatch: 4 tokens are more than max_tokens 3",
        "experts": "num_experts must be a multiple of the ranks, got 7 experts for 2 ranks",
        "nodes": "ranks_per_node must divide the ranks, got 3 for 2 ranks",
        "local": "transport local is for one rank, and the group has 2",
    }
    if "full" not in first:  # a GPU says it later, or not at all
        del expected["full"], expected["static"]
    for name, text in expected.items():
        assert re.search(text, first[name]), first[name]
        assert re.search(text, second[name]), second[name]
    own = {
        "tokens": r"x must be \(T, H\), topk_idx and topk_weights \(T, k\) with k >= 1, got \(2, 8\), \(3, 2\), \(3, 2\)",
        "weights": r"topk_idx and topk_weights \(T, k\) with k >= 1, got \(3, 8\), \(3, 2\), \(3, 1\)",
        "index": "topk_idx int64, got float32, int32, float32",
    }
    for name, text in own.items():
        assert re.search(text, second[name]), second[name]
        assert first[name] == "dispatch: arguments do not fit on rank 1"
    assert first.keys() == second.keys() == expected.keys() | own.keys()


@pytest.mark.parametrize("transport", ["smoke", "pigeon"])
def test_other_transports_are_refused(transport: str) -> None:
    with pytest.raises(
        ValueError, match=f"transport must be one of auto, local, collective, ipc, nvshmem, got '{transport}'"
    ):
        ExpertBuffer(num_experts=8, transport=transport)


def test_without_a_process_group() -> None:
    assert ExpertBuffer(num_experts=8).transport == "local"
    for transport in ("collective", "ipc", "nvshmem"):
        with pytest.raises(ValueError, match=f"transport {transport} needs a process group"):
            ExpertBuffer(num_experts=8, transport=transport)
    with pytest.raises(ValueError, match=r"wire_dtype must be one of None, .*, got torch\.bfloat16"):
        ExpertBuffer(num_experts=8, wire_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"dispatch: x must be \(T, H\)"):
        ExpertBuffer(num_experts=8).dispatch(torch.zeros(2, 8), torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1))


@pytest.mark.parametrize("number", ["8", 8.0, True, None])
def test_numbers_that_are_none(number: object) -> None:
    with pytest.raises(ValueError, match="num_experts must be an int"):
        ExpertBuffer(num_experts=number)


def test_a_dispatch_in_fp8_compiles() -> None:
    """What it leaves with the rows, so that tokens can be kept instead, is not for graphs."""
    buffer = ExpertBuffer(num_experts=4, transport="local", wire_dtype=FP8)
    index, weights = torch.tensor([[0, 3], [2, 1], [3, 0]]), torch.rand(3, 2)

    def arrived(x: Tensor) -> Tensor:
        return dequantize(*buffer.dispatch(x, index, weights)[5:7])

    x = torch.randn(3, 32)
    assert torch.equal(torch.compile(arrived, fullgraph=True, backend="aot_eager")(x), arrived(x))


def test_combine_takes_the_rows_as_they_came() -> None:
    buffer = ExpertBuffer(num_experts=8)
    handle = buffer.dispatch(torch.ones(2, 16), torch.tensor([[0, 3], [1, 0]]), torch.ones(2, 2))
    for y in (handle.x.bfloat16(), handle.x.int(), handle.x[:3]):
        with pytest.raises(ValueError, match=r"combine: y must be \(4, 16\) float32 like handle\.rows, got \(\d, 16\)"):
            buffer.combine(y, handle)


def test_low_latency_says_what_does_not_fit() -> None:
    for low_latency, hidden in ((0, 8), (4, 0), (4, None), (None, 8)):
        with pytest.raises(ValueError, match="low_latency and hidden go together and are at least 1"):
            ExpertBuffer(num_experts=4, low_latency=low_latency, hidden=hidden)
    with pytest.raises(ValueError, match="low_latency must be at most max_tokens, got 4 and 3"):
        ExpertBuffer(num_experts=4, low_latency=4, hidden=8, max_tokens=3, max_recv=8)
    x, idx, weights = torch.ones(3, 8), torch.tensor([[0, 3], [1, 0], [2, 3]]), torch.ones(3, 2)
    with pytest.raises(ValueError, match="send: the buffer was made without low_latency"):
        ExpertBuffer(num_experts=4).send(x, idx, weights)
    buffer = ExpertBuffer(num_experts=4, low_latency=3, hidden=8)
    for bad in (x[:, :4], x[0], torch.ones(4, 8)):
        with pytest.raises(ValueError, match=r"send: x must be at most 3 rows of 8, got \("):
            buffer.send(bad, idx, weights)
    with pytest.raises(ValueError, match="receive: an expert got 6 rows of at most 3 tokens: its tokens have it twice"):
        buffer.send(x, torch.zeros_like(idx), weights).receive()
    pending = buffer.send(x, idx, weights)
    masked = pending.receive()
    with pytest.raises(RuntimeError, match="receive: this has been received already"):
        pending.receive()
    for y in (masked.x.bfloat16(), masked.x[:, :2]):
        with pytest.raises(ValueError, match=r"send_sums: y must be \(4, 3, 8\) float32, got \(4, \d, 8\)"):
            buffer.send_sums(y, masked)
    assert torch.equal(buffer.send_sums(masked.x, masked).receive(), 2 * x)


def test_local_sums_experts_in_ascending_order(device: torch.device) -> None:
    """2^24 + 1 + 1 in fp32 depends on the order, and the order is the experts', not that of the choices."""
    x = torch.ones(1, 8, device=device)
    idx, weights = torch.tensor([[5, 0, 2]], device=device), torch.ones(1, 3, device=device)
    buffer = ExpertBuffer(num_experts=8)
    handle = buffer.dispatch(x, idx, weights)
    values = torch.tensor([1.0, 1.0, 2.0**24], device=device)  # experts 0, 2, 5
    assert buffer.combine(handle.x * values[:, None], handle)[0, 0] == 2.0**24 + 2
    assert buffer.combine(handle.x * values.flip(0)[:, None], handle)[0, 0] == 2.0**24


# ---- FP8 on the wire, and static mode ----
def trained(buffer: ExpertBuffer, x: Tensor, dout: Tensor, *, cast_on_arrival: bool = False) -> list[Tensor]:
    """The output of FP8 experts behind `buffer`, then the gradients of x, of the routing weights and of the parameters."""
    torch.manual_seed(1)
    idx = torch.rand(len(x), 4, device=x.device).argsort(-1)[:, :2].contiguous()
    weights = torch.rand(len(x), 2, device=x.device, requires_grad=True)
    x = x.clone().requires_grad_()
    shapes = (4, 2 * 48, x.shape[1]), (4, x.shape[1], 48)
    params = [torch.nn.Parameter(0.1 * torch.randn(shape, device=x.device).to(x.dtype)) for shape in shapes]
    handle = buffer.dispatch(x, idx, weights)
    for t in (handle.topk_weights, *handle.cast) if buffer.room else ():
        t.detach()[int(handle.offsets[-1]) :] = float("nan")
    made = [Fp8Weight.make(param) for param in params]
    y = fp8_experts(handle.rows, handle.topk_weights, handle.offsets, *made, cast=handle.cast or None)
    if cast_on_arrival:
        y.register_hook(
            lambda dy: dequantize(*per_token_cast(dy, pow2_scale=True, amax_floor=GRADIENT_FLOOR)).to(dy.dtype)
        )
    out = buffer.combine(y, handle)
    out.backward(dout)
    return [out.detach(), x.grad, weights.grad, *(param.grad for param in params)]


@pytest.mark.parametrize("room", [{}, {"max_recv": 90, "max_tokens": 40}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_casting_before_the_way_is_casting_after_it(
    dtype: torch.dtype, room: dict[str, int], device: torch.device
) -> None:
    """Training behind an FP8 wire, forward and backward, bit for bit; in static mode with NaN in the rows of nobody."""
    x, dout = torch.randn(40, 272, device=device).to(dtype), (1e-9 * torch.randn(40, 272, device=device)).to(dtype)
    expected = trained(ExpertBuffer(num_experts=4, transport="local"), x, dout, cast_on_arrival=True)
    fp8 = ExpertBuffer(num_experts=4, transport="local", wire_dtype=FP8, **room)
    assert all(torch.equal(a, b) for a, b in zip(trained(fp8, x, dout), expected, strict=True))
    assert all(grad.any() for grad in expected)


def few_experts(device: torch.device) -> tuple[Callable[[Callable[..., Tensor]], Tensor], list[torch.nn.Parameter]]:
    """The sum of what FP8 experts behind an FP8 wire make of some tokens, by how they are called; and their weights."""
    buffer = ExpertBuffer(num_experts=2, transport="local", wire_dtype=FP8)
    x, (idx, weights) = torch.randn(4, 32, device=device, requires_grad=True), (t.to(device) for t in indices(4))
    params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in ((2, 64, 32), (2, 32, 32))]
    made = [Fp8Weight.make(param) for param in params]

    def run(call: Callable[..., Tensor]) -> Tensor:
        handle = buffer.dispatch(x, idx, weights)
        experts = functools.partial(fp8_experts, cast=handle.cast)
        y = call(experts, handle.rows, handle.topk_weights, handle.offsets, *made)
        return buffer.combine(y, handle).square().sum()

    return run, params


def plainly(experts: Callable[..., Tensor], *args: Any) -> Tensor:
    return experts(*args)


WAYS = {
    "checkpointed": lambda experts, *args: checkpoint(experts, *args, use_reentrant=False),
    "checkpointed from outside": lambda experts, *args: checkpoint(experts, *args, use_reentrant=True),
    "another tensor": lambda experts, *args: experts(*args) * 1,
    "in place": lambda experts, *args: experts(*args).mul_(1),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_gradients_that_come_as_fp8_reach_the_experts_by_any_way(
    way: Callable[..., Tensor], device: torch.device
) -> None:
    """The same bits: where what combine gets is not the very result, its gradient comes in its own dtype."""
    run, params = few_experts(device)

    def gradients(way: Callable[..., Tensor]) -> list[Tensor]:
        for param in params:
            param.grad = None
        run(way).backward()
        return [param.grad for param in params]

    expected = gradients(plainly)
    assert all(grad.isfinite().all() and grad.any() for grad in expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients(way), expected, strict=True))
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        assert all(torch.equal(a, b) for a, b in zip(gradients(plainly), expected, strict=True))


def test_a_gradient_that_came_as_fp8_is_no_part_of_a_sum(device: torch.device) -> None:
    run, _ = few_experts(device)
    kept: list[Tensor] = []
    out = run(lambda experts, *args: kept.append(experts(*args)) or kept[0])
    with pytest.raises(
        RuntimeError, match="came as FP8 and has been changed, by a second use of the result or by a hook"
    ):
        (out + kept[0].sum()).backward()
    out = run(lambda experts, *args: kept.append(experts(*args)) or kept[1])
    torch.autograd.grad(out, kept[1], retain_graph=True)  # leaves what nobody takes
    with pytest.raises(RuntimeError, match="came as FP8 and has been changed"):
        kept[1].sum().backward()


def test_rows_that_stand_for_fp8_take_no_memory() -> None:
    handle = ExpertBuffer(num_experts=4, wire_dtype=FP8).dispatch(
        torch.ones(8, 32), torch.zeros(8, 1, dtype=torch.int64), torch.ones(8, 1)
    )
    assert handle.rows.untyped_storage().nbytes() == 4
    assert handle.rows.shape == handle.x.shape == (8, 32)
    assert handle.rows.isnan().all()
    assert ExpertBuffer(num_experts=4).dispatch(torch.ones(1, 8), *indices(1)).x_sf is None


def indices(tokens: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)


def test_what_cannot_be_cast_or_does_not_fit_is_refused() -> None:
    buffer = ExpertBuffer(num_experts=4, wire_dtype=FP8)
    for x in (torch.zeros(2, 24), torch.zeros(2, 32, dtype=torch.float16)):
        with pytest.raises(
            ValueError, match=r"over FP8 x must be bfloat16 or float32, H a multiple of 16, got \d+ float"
        ):
            buffer.dispatch(x, *indices(2))
    for settings in ({"max_recv": 4}, {"max_tokens": 4}, {"max_recv": -1, "max_tokens": 1}):
        with pytest.raises(ValueError, match="max_recv and max_tokens go together and are at least 0, got"):
            ExpertBuffer(num_experts=4, **settings)
    for settings, bad in itertools.product(({}, {"max_recv": 8, "max_tokens": 2}), (-1, 4, 5)):
        with pytest.raises(RuntimeError, match=rf"experts must lie in 0\.\.3, got {bad}"):
            ExpertBuffer(num_experts=4, **settings).dispatch(
                torch.ones(2, 8), torch.tensor([[0, 1], [2, bad]]), torch.ones(2, 2)
            )
    small = ExpertBuffer(num_experts=4, max_recv=1, max_tokens=8)
    with pytest.raises(RuntimeError, match="dispatch: rank 0 gets 2 rows, and max_recv is 1"):
        small.dispatch(torch.zeros(2, 8), *indices(2))


def test_a_device_that_got_too_many_rows_is_told_later(device: torch.device) -> None:
    """The word that the host reads, at the call after; on a GPU also the NaN and the whole way."""
    room = Room(Layout(4, 1, 1, 0), 8, 3)
    assert not room.note(torch.tensor(3, dtype=torch.int32, device=device))
    room.raise_noted()
    assert room.note(torch.tensor(5, dtype=torch.int32, device=device))
    assert not room.note(torch.tensor(1, dtype=torch.int32, device=device)), "a later one does not hide it"
    with pytest.raises(RuntimeError, match="an earlier dispatch got 5 rows, and max_recv is 3: what it gave is NaN"):
        room.raise_noted()
    if device.type == "cuda":
        buffer = ExpertBuffer(num_experts=4, max_recv=3, max_tokens=8)
        x, idx, weights = (t.to(device) for t in (torch.ones(5, 8), *indices(5)))
        torch.cuda.set_sync_debug_mode("error")
        handle = buffer.dispatch(x, idx, weights)
        torch.cuda.set_sync_debug_mode("default")
        assert handle.x.isnan().all()
        assert handle.offsets.tolist() == [0, 3, 3, 3, 3]
        buffer.combine(handle.rows, handle)  # the step goes on, or the other ranks would wait
        with pytest.raises(RuntimeError, match="an earlier dispatch got 5 rows"):
            buffer.dispatch(x, idx, weights)


def test_a_sum_without_one_of_its_rows_is_nan(device: torch.device) -> None:
    """Four tokens for expert 1, of which two had no room; the last token has nothing here, and is not harmed."""
    destination = torch.tensor([[0, 1], [2, 1], [1, 0], [2, 1], [2, 2]], device=device)
    copies, offsets = fixed_copies_to(destination, 2, 4)
    assert offsets.tolist() == [0, 2, 6]
    assert copies.position.tolist() == [[0, 2], [3, 4], [1, 5], [4, 5], [4, 4]]
    x = torch.arange(1.0, 6, device=device)[:, None].expand(5, 8).contiguous()
    rows = copies.spread(x)
    assert rows[:, 0].tolist() == [1, 3, 1, 2]
    sums = copies.sum(rows)[:, 0]
    assert sums.isnan().tolist() == [False, False, True, True, False]
    assert sums[[0, 1, 4]].tolist() == [2, 2, 0]


def test_the_memory_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """The issue's figures, which are without scales: 1.9 GB among 8 ranks, 7.5 GB among 64."""
    for ranks, rows, gigabytes in ((8, 262144, 1.94), (64, 1048576, 7.75)):
        room = Room(Layout(256, ranks, 8, 0), 4096, 32768)
        assert room.most_rows(8) == rows
        assert room.line(7168, 8, FP8).endswith(f"{gigabytes} GB")
        assert rows * 7168 / 1e9 == pytest.approx({8: 1.88, 64: 7.52}[ranks], abs=5e-3)
    assert room.line(7168, 8, FP8) == (
        "dispatch takes 0.242 GB for 32768 rows of 7168 float8_e4m3fn; 1.94 GB for 262144 tokens that arrive. "
        "Never too small: 1048576 rows = 64 ranks x 4096 tokens x 4 experts, 7.75 GB"
    )
    buffer = ExpertBuffer(num_experts=4, max_recv=4, max_tokens=2)
    with caplog.at_level(logging.INFO, logger="dsv3"):
        for _ in range(2):
            buffer.dispatch(torch.ones(2, 8), *indices(2))
    (record,) = caplog.records
    assert record.getMessage() == (
        "dispatch takes 1.28e-07 GB for 4 rows of 8 float32. Never too small: 2 rows = 1 ranks x 2 tokens x 1 experts, "
        "6.4e-08 GB"
    )


def test_an_engine_may_dispatch_before_training() -> None:
    """What is remembered of static calls is made once, and is no tensor of inference."""
    room = Room(Layout(4, 1, 1, 0), 2, 8)
    for context in (torch.inference_mode(), nullcontext()):
        with context:
            assert not room.note(torch.tensor(3, dtype=torch.int32))
    assert [int(word) for word in room.words[torch.device("cpu")]] == [3, 3]


@pytest.mark.parametrize("wire", [None, torch.float32, FP8])
def test_static_mode_reads_nothing_on_the_host(monkeypatch: pytest.MonkeyPatch, wire: torch.dtype | None) -> None:
    """The whole way, forward and backward, with tensors that have no values; all shapes are known without."""
    monkeypatch.setattr(Room, "note", lambda room, needed: needed > room.max_recv)  # its copy to the host wants values
    x = torch.empty(6, 32, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weights = torch.empty(6, 2, device="meta", requires_grad=True)
    buffer = ExpertBuffer(num_experts=4, max_recv=9, max_tokens=8, wire_dtype=wire)
    handle = buffer.dispatch(x, torch.empty(6, 2, dtype=torch.int64, device="meta"), weights)
    assert (handle.num_recv, handle.x.shape, handle.offsets.shape) == (9, (9, 32), (5,))
    assert wire != FP8 or handle.x_sf.stride() == (1, 12)
    out = buffer.combine(handle.rows * handle.topk_weights[:, None].bfloat16(), handle)
    out.sum().backward()
    assert (out.shape, x.grad.shape, weights.grad.shape) == (x.shape, x.shape, weights.shape)
