"""The expert-parallel buffer between 2, 4 and 8 gloo processes against plain loops over tokens, bit for bit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3.comm import ExpertBuffer
from tests.comm.cases import CASES, HIDDEN, Case, experts, inputs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of eight ranks got. The workers themselves check that a second run gives the same bits."""
    out = tmp_path_factory.mktemp("buffer")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8"]
    done = subprocess.run(
        [*torchrun, "-m", "tests.comm.buffer_worker", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"{rank}.pt") for rank in range(8)]


def tree(case: Case, rows: dict[int, Tensor]) -> Tensor:
    """The sum over a token's experts {expert: row [H]}: in a rank, in a node, then over nodes; each rounded once."""

    def add(values: list[Tensor]) -> Tensor:
        total = values[0].float()
        for value in values[1:]:
            total = total + value.float()
        return total.to(case.wire or case.dtype)

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
        found = results[rank][case.name]
        assert found["out"].shape == found["dx"].shape == x.shape
        assert found["dweights"].shape == weights.shape
        for token in range(len(x)):
            rows, drows = {}, {}
            for slot, expert in enumerate(idx[token].tolist()):
                row, weight = x[token : token + 1].clone().requires_grad_(), weights[token, slot].view(1).clone()
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
        assert found["x"].dtype == case.dtype
        assert found["x"].shape == (len(rows), HIDDEN)
        assert all(torch.equal(a, row[4]) for a, row in zip(found["x"], rows, strict=True))
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
        "rows": r"combine: y must be \(\d, 8\) float32 like handle.x, got \(\d, 8\) float32",
        "differ": r"must be the same on all ranks, got \(8, None, None\) on rank 0 and \(16, None, None\) on rank 1",
        "experts": "num_experts must be a multiple of the ranks, got 7 experts for 2 ranks",
        "nodes": "ranks_per_node must divide the ranks, got 3 for 2 ranks",
        "local": "transport local is for one rank, and the group has 2",
    }
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


@pytest.mark.parametrize("transport", ["ipc", "nvshmem", "pigeon"])
def test_other_transports_are_refused(transport: str) -> None:
    with pytest.raises(ValueError, match=f"transport must be one of auto, local, collective, got '{transport}'"):
        ExpertBuffer(num_experts=8, transport=transport)


def test_without_a_process_group() -> None:
    assert ExpertBuffer(num_experts=8).transport == "local"
    with pytest.raises(ValueError, match="transport collective needs a process group"):
        ExpertBuffer(num_experts=8, transport="collective")
    with pytest.raises(ValueError, match=r"wire_dtype must be None or torch\.float32, got torch\.bfloat16"):
        ExpertBuffer(num_experts=8, wire_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"dispatch: x must be \(T, H\)"):
        ExpertBuffer(num_experts=8).dispatch(torch.zeros(2, 8), torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1))


@pytest.mark.parametrize("number", ["8", 8.0, True, None])
def test_numbers_that_are_none(number: object) -> None:
    with pytest.raises(ValueError, match="num_experts must be an int"):
        ExpertBuffer(num_experts=number)


def test_combine_takes_the_rows_as_they_came() -> None:
    buffer = ExpertBuffer(num_experts=8)
    handle = buffer.dispatch(torch.ones(2, 16), torch.tensor([[0, 3], [1, 0]]), torch.ones(2, 2))
    for y in (handle.x.bfloat16(), handle.x.int(), handle.x[:3]):
        with pytest.raises(ValueError, match=r"combine: y must be \(4, 16\) float32 like handle\.x, got \(\d, 16\)"):
            buffer.combine(y, handle)


def test_local_sums_experts_in_ascending_order(device: torch.device) -> None:
    """2^24 + 1 + 1 in fp32 depends on the order, and the order is the experts', not that of the choices."""
    x = torch.ones(1, 8, device=device)
    idx, weights = torch.tensor([[5, 0, 2]], device=device), torch.ones(1, 3, device=device)
    buffer = ExpertBuffer(num_experts=8)
    handle = buffer.dispatch(x, idx, weights)
    values = torch.tensor([1.0, 1.0, 2.0**24], device=device)  # experts 0, 2, 5
    assert buffer.combine(handle.x * values[:, None], handle)[0, 0] == 2.0**24 + 2
    assert buffer.combine(handle.x * values.flip(0)[:, None], handle)[0, 0] == 2.0**24
