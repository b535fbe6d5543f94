"""What test_ipc.py starts under torchrun, a rank or two on a GPU. Arguments: the transport, num_sms, and where the first rank
writes what kernels took (a JSON of name to [blocks]). Leaves without closing its buffers."""

from __future__ import annotations

import json
import math
import os
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from dsv3.comm import ExpertBuffer

transport, num_sms, path = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
ranks = int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo")
torch.cuda.set_device(0)
torch.manual_seed(dist.get_rank())


def step(buffer: ExpertBuffer) -> None:
    """There and back, forward and backward, and the same for few tokens."""
    x = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    idx = torch.rand(512, 16, device="cuda").topk(4).indices
    weights = torch.rand(512, 4, device="cuda", requires_grad=True)
    handle = buffer.dispatch(x, idx, weights)
    out = buffer.combine(handle.rows * handle.topk_weights[:, None].to(x.dtype), handle)
    out.backward(out.detach())
    with torch.no_grad():
        masked = buffer.send(x[:64], idx[:64], weights[:64]).receive()
        buffer.send_sums(masked.x.to(x.dtype), masked).receive()
    torch.cuda.synchronize()


settings = {"ranks_per_node": ranks if transport == "ipc" else ranks // 2, "low_latency": 64, "hidden": 1024}
buffers = [
    ExpertBuffer(num_experts=16, transport=transport, num_sms=num_sms, wire_dtype=wire, timeout=20, **settings)
    for wire in (None, torch.float8_e4m3fn)
]
for buffer in buffers:
    assert buffer.transport == transport
    step(buffer)
if ranks == 1:
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for buffer in buffers:
            step(buffer)
    found.export_chrome_trace(str(path))
    blocks = defaultdict(list)
    for event in json.loads(path.read_text())["traceEvents"]:
        if event.get("cat") == "kernel":
            blocks[event["name"]].append(math.prod(event["args"]["grid"]))
    path.write_text(json.dumps(blocks))
dist.barrier()
dist.destroy_process_group()
