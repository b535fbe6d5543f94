"""Expert placement: the published example, and what every placement must keep to."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3.comm import ExpertBuffer
from dsv3.parallel import Placement, rebalance

# experts, replicas, groups, nodes, GPUs; the last three have nodes that do not divide the groups
HIERARCHICAL = [(12, 16, 4, 2, 8), (256, 288, 8, 4, 32), (256, 640, 8, 8, 320), (16, 16, 4, 4, 4), (8, 24, 1, 1, 6)]
GLOBAL = [(12, 16, 4, 8, 16), (256, 320, 8, 40, 320), (64, 90, 8, 3, 9)]


def loads(kind: str, experts: int, layers: int = 5) -> Tensor:
    """[layers, experts], in an order of their own."""
    generator = torch.Generator().manual_seed(experts)
    if kind == "equal":
        return torch.ones(layers, experts, dtype=torch.int64)
    if kind == "none":
        return torch.zeros(layers, experts)
    if kind == "one":
        return torch.eye(experts)[torch.randint(experts, (layers,), generator=generator)]
    ranks = torch.rand(layers, experts, generator=generator).argsort(-1) + 1
    return 1e4 / ranks if kind == "zipf" else ranks.double()


def gpu_loads(load: Tensor, placed: Placement, gpus: int) -> Tensor:
    """fp64 [layers, gpus], where replicas share their expert's load equally; [layers, replicas] -> its sums."""
    share = (load.double() / placed.counts).gather(1, placed.physical_to_logical)
    return share.view(len(load), gpus, -1).sum(-1)


def test_the_published_example() -> None:
    """The README of deepseek-ai/eplb: 12 experts in 4 groups, 16 replicas, 2 nodes of 4 GPUs."""
    load = torch.tensor(
        [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
    )
    placed = rebalance(load, 16, 4, 2, 8)
    assert placed.physical_to_logical.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert placed.counts[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert placed.logical_to_physical[0, :3].tolist() == [[12, -1], [13, 15], [11, -1]]


@pytest.mark.parametrize("kind", ["equal", "none", "one", "zipf", "linear"])
@pytest.mark.parametrize("sizes", HIERARCHICAL + GLOBAL, ids=str)
def test_every_expert_is_placed(sizes: tuple[int, ...], kind: str) -> None:
    """The three tensors say the same; the same arguments give the same placement."""
    experts, replicas, *machine = sizes
    load = loads(kind, experts)
    placed = rebalance(load, replicas, *machine)
    physical, logical, counts = placed
    assert physical.dtype == logical.dtype == counts.dtype == torch.int64
    assert physical.shape == (5, replicas)
    assert logical.shape == (5, experts, int(counts.max()))
    assert counts.min() >= 1
    assert (counts.sum(-1) == replicas).all()
    for layer in range(5):
        for expert in range(experts):
            slots = (physical[layer] == expert).nonzero().flatten().tolist()
            assert len(slots) == counts[layer, expert]
            assert logical[layer, expert].tolist() == slots + [-1] * (logical.shape[2] - len(slots))
    assert all(torch.equal(a, b) for a, b in zip(placed, rebalance(load.clone(), replicas, *machine), strict=True))
    alone = [rebalance(row[None], replicas, *machine).physical_to_logical for row in load]
    assert torch.equal(torch.cat(alone), physical), "layers do not see each other"


@pytest.mark.parametrize("sizes", HIERARCHICAL, ids=str)
def test_groups_stay_together(sizes: tuple[int, ...]) -> None:
    experts, replicas, groups, nodes, gpus = sizes
    placed = rebalance(loads("zipf", experts), replicas, groups, nodes, gpus)
    group = (placed.physical_to_logical // (experts // groups)).view(5, nodes, -1)
    for layer in group:
        held = [set(node.tolist()) for node in layer]
        assert all(len(node) == groups // nodes for node in held)
        assert set.union(*held) == set(range(groups)), "so no group is on two nodes"


@pytest.mark.parametrize("kind", ["equal", "one", "zipf", "linear"])
@pytest.mark.parametrize("sizes", HIERARCHICAL + GLOBAL, ids=str)
def test_balance(sizes: tuple[int, ...], kind: str) -> None:
    """On every node: no expert should have had another's replica, and no GPU is further above the mean than the largest
    replica is heavy."""
    experts, replicas, groups, nodes, gpus = sizes
    load = loads(kind, experts).double()
    placed = rebalance(load, replicas, groups, nodes, gpus)
    if groups % nodes:
        nodes = 1
    share = (load / placed.counts).gather(1, placed.physical_to_logical).view(5, nodes, -1)
    heaviest = share.amax(-1)
    with_one_less = (load / (placed.counts - 1)).masked_fill(placed.counts == 1, torch.inf)
    least = with_one_less.gather(1, placed.physical_to_logical).view(5, nodes, -1).amin(-1)
    assert (least >= heaviest * (1 - 1e-12)).all()
    busy = gpu_loads(load, placed, gpus).view(5, nodes, -1)
    assert (busy.amax(-1) <= (busy.mean(-1) + heaviest) * (1 + 1e-12)).all()


def test_replicas_even_out_what_no_placement_could() -> None:
    """Loads of 256 experts that fall off like 1/n, 32 GPUs: 8 experts each leave one with 5 times the mean."""
    load = loads("zipf", 256)
    plain, spread = (rebalance(load, replicas, 8, 1, 32) for replicas in (256, 320))
    before, after = (gpu_loads(load, placed, 32) for placed in (plain, spread))
    assert (before.amax(-1) / before.mean(-1)).min() > 5
    assert (after.amax(-1) / after.mean(-1)).max() < 1.1


def test_v3_is_placed_in_time() -> None:
    """256 experts, 61 layers, 320 GPUs: below 0.2 seconds, the best of three, under both policies."""
    load = loads("zipf", 256, layers=61)
    for nodes in (8, 40):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            rebalance(load, 640, 8, nodes, 320)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"load": torch.ones(8)}, r"load must be \(layers, experts\), got \(8,\)"),
        ({"load": torch.full((1, 8), torch.nan)}, "load must be finite and not negative"),
        ({"load": -torch.ones(1, 8)}, "load must be finite and not negative"),
        ({"num_replicas": 7}, "num_replicas must be at least the 8 experts, got 7"),
        ({"num_groups": 3}, "num_groups must divide the 8 experts, got 3"),
        ({"num_nodes": 3}, "num_nodes must divide the 4 GPUs, got 3"),
        ({"num_gpus": 6}, "num_gpus must divide the 8 replicas, got 6"),
        ({"num_gpus": 0}, "num_gpus must be a positive int, got 0"),
        ({"num_nodes": 2.0}, r"num_nodes must be a positive int, got 2\.0"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], said: str) -> None:
    given = {"load": torch.ones(1, 8), "num_replicas": 8, "num_groups": 2, "num_nodes": 2, "num_gpus": 4}
    with pytest.raises(ValueError, match=said):
        rebalance(**{**given, **changes})


def test_replicas_work_through_dispatch(device: torch.device) -> None:
    """The same sums as without them, since replicas are equal; an expert's tokens are shared among its replicas."""
    experts, tokens, topk, hidden = 8, 64, 2, 16
    load = torch.tensor([[1.0] * experts, [40.0, 1, 1, 1, 20, 1, 1, 1]])
    placed = rebalance(load, 12, 4, 1, 4).to(device)
    scores = torch.rand(tokens, experts, device=device)
    scores[:, 0] += 1  # everyone's first choice
    topk_idx = scores.topk(topk).indices
    x, factors = torch.randn(tokens, hidden, device=device), torch.randn(experts, device=device)
    weights = torch.rand(tokens, topk, device=device)

    def run(num_experts: int, chosen: Tensor, of_expert: Tensor) -> tuple[Tensor, Tensor]:
        buffer = ExpertBuffer(num_experts=num_experts, transport="local")
        handle = buffer.dispatch(x, chosen, weights)
        sizes = handle.offsets.diff()
        scale = of_expert.repeat_interleave(sizes.long()) * handle.topk_weights
        return buffer.combine(handle.x * scale[:, None], handle), sizes

    plain, _ = run(experts, topk_idx, factors)
    for layer in range(2):
        expert_of = placed.physical_to_logical[layer]
        for first in (0, 1):
            chosen = placed.choose(topk_idx, layer, first=first)
            assert torch.equal(expert_of[chosen], topk_idx)
            out, sizes = run(12, chosen, factors[expert_of])
            torch.testing.assert_close(out, plain)
            counts = placed.counts[layer]
            assert sizes[expert_of == 0].max() - sizes[expert_of == 0].min() <= 1
            assert int(sizes[expert_of == 0].sum()) == tokens
            assert int(counts[0]) == int((expert_of == 0).sum())
    assert int(placed.counts[1, 0]) > 1
