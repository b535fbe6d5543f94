"""Expert parallel: data parallel whose routed experts are split over ranks, applied to the model from outside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from dsv3.comm import ExpertBuffer
from dsv3.model import DeepSeekV3, is_expert_param
from dsv3.model.moe import MoE
from dsv3.parallel.data import DataParallel

if TYPE_CHECKING:
    from dsv3.train.buffers import ParamBuffers

_REPLICA, _EXPERT = "replica", "expert"


@dataclass(frozen=True)
class ExpertParallel(DataParallel):
    """All ranks train on data of their own; of the routed experts each holds one of `ep` equal runs.

    The runs lie on `ep` consecutive ranks, which dispatch tokens to each other; ranks that are `ep` apart hold the same
    run. All other parameters are on every rank.
    """

    mesh: DeviceMesh = field(kw_only=True)  # [replicas, ep]
    buffer: ExpertBuffer = field(kw_only=True)

    @classmethod
    def split(
        cls,
        parallel: DataParallel,
        ep: int,
        num_experts: int,
        *,
        wire_dtype: torch.dtype | None = None,
        transport: str = "auto",
    ) -> ExpertParallel:
        """Splits the experts of all ranks of `parallel`, which call this together; wire_dtype and transport are the buffer's.

        Nodes are those of torchrun; without it all ranks are one. Raises ValueError where `ep` does not divide the ranks or the
        experts.
        """
        if parallel.world % ep:
            hint = f"start it with torchrun --nproc-per-node {ep}"
            raise ValueError(f"ep must divide the number of ranks, got ep {ep} and {parallel.world}: {hint}")
        if num_experts % ep:
            raise ValueError(f"ep must divide the model's routed experts, got ep {ep} and {num_experts} experts")
        shape = (parallel.world // ep, ep)
        mesh = init_device_mesh(parallel.device.type, shape, mesh_dim_names=(_REPLICA, _EXPERT))
        local_ranks = parallel.gather(dist.get_node_local_rank(fallback_rank=parallel.rank))
        buffer = ExpertBuffer(
            mesh.get_group(_EXPERT),
            num_experts=num_experts,
            transport=transport,
            ranks_per_node=ranks_per_node(local_ranks, ep),
            wire_dtype=wire_dtype,
            device=parallel.device,
        )
        return cls(parallel.rank, parallel.world, parallel.device, parallel.joined, mesh=mesh, buffer=buffer)

    @property
    def experts(self) -> range:
        """The experts that this rank holds."""
        layout = self.buffer.layout
        return range(layout.num_experts)[layout.rank * layout.num_local_experts :][: layout.num_local_experts]

    def apply(self, model: DeepSeekV3) -> None:
        """Leaves `model`, on any device or meta, with this rank's experts alone and the buffer that joins them."""
        held = self.experts
        for moe in (module for module in model.modules() if isinstance(module, MoE)):
            for name, weight in list(moe.experts.named_parameters()):
                part = weight.detach()[held.start : held.stop].clone()
                setattr(moe.experts, name, nn.Parameter(part, requires_grad=weight.requires_grad))
            moe.buffer = self.buffer

    def close(self) -> None:
        self.buffer.close()

    def broadcast_parameters(self, buffers: ParamBuffers) -> None:
        dist.broadcast(buffers.dense.master, src=0)
        dist.broadcast(buffers.expert.master, group=self.mesh.get_group(_REPLICA), group_src=0)
        buffers.sync_weights()

    def reduce_gradients(self, buffers: ParamBuffers) -> None:
        """Sums main_grad over the ranks; that of experts over those that hold the same ones."""
        self.sum(buffers.dense.main_grad)
        dist.all_reduce(buffers.expert.main_grad, group=self.mesh.get_group(_REPLICA))

    def grad_norm(self, buffers: ParamBuffers) -> Tensor:
        norm = buffers.expert.grad_norm()
        norms = [torch.empty_like(norm) for _ in range(self.mesh.size(1))]
        dist.all_gather(norms, norm, group=self.mesh.get_group(_EXPERT))
        return torch.linalg.vector_norm(torch.stack([buffers.dense.grad_norm(), *norms]))

    def whole(self, name: str, part: Tensor) -> Tensor:
        if not is_expert_param(name):
            return part
        # A mesh of the tensor's kind of device (averages lie on the CPU), else from_local would move it.
        groups = [self.mesh.get_group(dim) for dim in (_REPLICA, _EXPERT)]
        mesh = DeviceMesh.from_group(groups, part.device.type, self.mesh.mesh, mesh_dim_names=(_REPLICA, _EXPERT))
        return DTensor.from_local(part, mesh, [Replicate(), Shard(0)], run_check=False)


def ranks_per_node(local_ranks: Sequence[int], ep: int) -> int:
    """The largest number of ranks such that runs of it divide `ep` and never cross a node.

    local_ranks: every rank's place in its node, of consecutive ranks.
    """
    starts = [rank for rank, local in enumerate(local_ranks) if local == 0]
    return math.gcd(ep, len(local_ranks), *starts)
