"""Expert placement by load: heavy experts get several replicas, and replicas are packed so that every GPU has as much to do.

The redundant experts of the DeepSeek-V3 report (3.4), by the algorithm that its authors published (the README of
github.com/deepseek-ai/eplb): where nodes divide the groups of experts, the hierarchical policy packs groups into nodes, since a
token's experts lie in few groups (group-limited gate), replicates experts within a node and packs the replicas into its GPUs;
otherwise the global one does the same without nodes. Both are greedy: they are good, not optimal.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Placement(NamedTuple):
    """Where experts are: slot s of P lies on GPU s // (P / num_gpus). int64, on the CPU unless moved."""

    physical_to_logical: Tensor  # [L, P]: the expert in a slot
    logical_to_physical: Tensor  # [L, E, most replicas of an expert]: its slots, by replica; -1 behind them
    counts: Tensor  # [L, E]: replicas of an expert, at least 1

    def to(self, device: torch.device | str) -> Placement:
        """On another device, so that `choose` copies nothing to it."""
        return Placement(*(tensor.to(device) for tensor in self))

    def choose(self, topk_idx: Tensor, layer: int, *, first: int = 0) -> Tensor:
        """The slots to which tokens go whose gate has chosen experts: what an ExpertBuffer of P experts dispatches.

        A token takes the replicas of its experts in turn with the tokens beside it. Reads nothing on the host.

        Args:
            topk_idx: int64 [T, k], experts in 0..E-1, on the placement's device.
            layer: in 0..L-1.
            first: at which replica token 0 begins; different on every rank, or few tokens would all go to the first.

        Returns:
            int64 [T, k].
        """
        turn = torch.arange(first, first + topk_idx.shape[0], device=topk_idx.device)[:, None]
        return self.logical_to_physical[layer][topk_idx, turn % self.counts[layer][topk_idx]]


def rebalance(load: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> Placement:
    """Places `num_replicas` (P) replicas of E experts in every layer; the same for the same arguments.

    Args:
        load: [L, E], any real dtype and device: what an expert has to do, such as the tokens that it got.
        num_replicas: slots on all GPUs together, at least E.
        num_groups: consecutive experts that are a group of the gate (Config.n_group).
        num_nodes, num_gpus: consecutive GPUs are a node.

    Raises:
        ValueError: a load that is no matrix, not finite or negative; numbers that do not divide; too few replicas.
    """
    _check(load, num_replicas, num_groups, num_nodes, num_gpus)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    weight = load.detach().double().cpu().numpy()
    layers, experts = weight.shape
    size, local = experts // num_groups, experts // num_nodes  # experts of a group, of a node
    groups = _pack(weight.reshape(layers, num_groups, size).sum(2), num_nodes)
    order = (groups[:, :, None] * size + np.arange(size)).reshape(layers, experts)  # the experts node by node
    # From here on every node of every layer is a row of its own.
    weight = _gather(weight, order).reshape(layers * num_nodes, local)
    replicas, counts = _replicate(weight, num_replicas // num_nodes)
    slots = _pack(_gather(weight / counts, replicas), num_gpus // num_nodes)
    chosen = _gather(replicas, slots).reshape(layers, num_nodes, -1) + np.arange(num_nodes)[:, None] * local
    physical = _gather(order, chosen.reshape(layers, num_replicas))
    totals = np.stack([np.bincount(row, minlength=experts) for row in physical])
    return Placement(*map(torch.from_numpy, (physical, _inverse(physical, totals), totals)))


def _pack(weight: np.ndarray, num_packs: int) -> np.ndarray:
    """Items of `weight` [R, n] -> [R, n], the items pack by pack, n / num_packs in each.

    The heaviest item that is left goes to the lightest pack with room, the first of several.
    """
    rows, items = weight.shape
    size = items // num_packs
    if size == 1 or num_packs == 1:
        return np.tile(np.arange(items), (rows, 1))
    row, total, filled = np.arange(rows), np.zeros((rows, num_packs)), np.zeros((rows, num_packs), int)
    packed = np.empty((rows, items), int)
    for item in np.argsort(-weight, axis=1, kind="stable").T:
        pack = total.argmin(1)
        place = filled[row, pack]
        packed[row, pack * size + place] = item
        filled[row, pack] = place + 1
        total[row, pack] += np.where(place + 1 == size, np.inf, weight[row, item])  # a full pack is never the lightest
    return packed


def _replicate(weight: np.ndarray, num_replicas: int) -> tuple[np.ndarray, np.ndarray]:
    """Replicas of the experts of `weight` [R, n]: the expert of each, [R, num_replicas], and counts [R, n].

    Every expert has one; every further one goes to the expert with the highest load a replica, the first of several.
    """
    rows, experts = weight.shape
    row, counts, share = np.arange(rows), np.ones((rows, experts), int), weight.copy()
    replicas = np.tile(np.arange(num_replicas), (rows, 1))
    for replica in range(experts, num_replicas):
        heaviest = share.argmax(1)
        replicas[:, replica] = heaviest
        counts[row, heaviest] += 1
        share[row, heaviest] = weight[row, heaviest] / counts[row, heaviest]
    return replicas, counts


def _inverse(physical: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """logical_to_physical of physical_to_logical [L, P] and counts [L, E]; an expert's slots ascend."""
    layers, replicas = physical.shape
    slots = np.argsort(physical, axis=1, kind="stable")
    expert = _gather(physical, slots)
    replica = np.arange(replicas) - _gather(counts.cumsum(1) - counts, expert)
    found = np.full((*counts.shape, counts.max()), -1)
    found[np.arange(layers)[:, None], expert, replica] = slots
    return found


def _gather(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, index, axis=1)


def _check(load: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> None:
    if load.dim() != 2 or not load.numel():
        raise ValueError(f"load must be (layers, experts), got {tuple(load.shape)}")
    if not (load.isfinite() & (load >= 0)).all():
        raise ValueError("load must be finite and not negative")
    numbers = {"num_replicas": num_replicas, "num_groups": num_groups, "num_nodes": num_nodes, "num_gpus": num_gpus}
    for name, number in numbers.items():
        if type(number) is not int or number < 1:
            raise ValueError(f"{name} must be a positive int, got {number!r}")
    experts = load.shape[1]
    if num_replicas < experts:
        raise ValueError(f"num_replicas must be at least the {experts} experts, got {num_replicas}")
    pairs = [
        ("num_groups", experts, "experts"),
        ("num_nodes", num_gpus, "GPUs"),
        ("num_gpus", num_replicas, "replicas"),
    ]
    for name, whole, of in pairs:
        if whole % numbers[name]:
            raise ValueError(f"{name} must divide the {whole} {of}, got {numbers[name]}")
