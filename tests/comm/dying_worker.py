"""What the tests of dead ranks start in every process: one dies in the middle of a step. Arguments: rank that dies, moment,
transport."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from dsv3.comm import ExpertBuffer, RankLost


def main() -> None:
    torch.set_num_threads(1)
    dead, moment, transport = int(sys.argv[1]), *sys.argv[2:]
    device = "cpu" if transport == "collective" else "cuda"
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    buffer = ExpertBuffer(num_experts=2 * ranks, ranks_per_node=2, transport=transport)

    def here(name: str) -> None:
        if rank == dead and moment == name:
            os.kill(os.getpid(), signal.SIGKILL)

    x = torch.randn(5, 8, device=device, requires_grad=True)
    idx, weights = torch.arange(10, device=device).view(5, 2) % (2 * ranks), torch.rand(5, 2, device=device)
    try:
        for step in range(3):
            handle = buffer.dispatch(x, idx, weights)
            if step == 1:
                here("combine")
            out = buffer.combine(handle.x, handle)
            if step == 1:
                here("backward")
            out.sum().backward()
    except RankLost as error:
        print(f"rank {rank}: {error}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
