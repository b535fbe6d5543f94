"""Loading holds the parameters and nothing else, saving one shard more: measured on a checkpoint of a gigabyte in 8 shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Peak growth of RssAnon, the anonymous memory in use, by a thread that looks every millisecond. (VmData would count the
# address range of every mapped file too.)
CHILD = """
import json, re, sys, threading
from pathlib import Path
import torch
from dsv3 import Config, DeepSeekV3
from dsv3.weights import load_pretrained

CONFIG = Config(
    vocab_size=8192, hidden_size=4096, intermediate_size=8192, num_hidden_layers=6, num_attention_heads=8,
    q_lora_rank=512, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
    moe_intermediate_size=1024, first_k_dense_replace=2, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
    n_group=1, topk_group=1, num_nextn_predict_layers=0,
)

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

def grown(work):
    peak, done, start = [0], threading.Event(), anonymous()
    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = work()
    finally:
        done.set()
        thread.join()
    return max(peak[0], anonymous()) - start, result

def save(folder, dtype):
    folder = folder / dtype
    growth, _ = grown(lambda: model.save_pretrained(folder, max_shard_bytes=size // 7, dtype=getattr(torch, dtype)))
    return {"growth": growth, "size": size, "shards": [path.stat().st_size for path in folder.glob("*.safetensors")]}

def load(folder, dtype):
    growth, model = grown(lambda: load_pretrained(folder / "bfloat16", dtype=getattr(torch, dtype)))
    assert all((p.flatten()[::1009] == index + 1).all() for index, p in enumerate(model.parameters()))
    return {"growth": growth, "size": sum(p.nbytes for p in model.parameters())}

what, folder, dtypes = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
if what == "save":
    model = DeepSeekV3(CONFIG)
    with torch.no_grad():
        for index, tensor in enumerate(model.parameters()):
            tensor.fill_(index + 1)
    size = sum(p.nbytes for p in model.parameters())
print(json.dumps([{"save": save, "load": load}[what](folder, dtype) for dtype in dtypes]))
"""


def measure(what: str, folder: Path, *dtypes: str) -> list[dict]:
    """What a process of its own finds when it saves to `folder`/<dtype>, or loads `folder`/bfloat16, as each dtype."""
    command = [sys.executable, "-c", CHILD, what, str(folder), *dtypes]
    # glibc raises the size from which on freed blocks go back to the system; set by hand, it stays: what counts is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_memory(tmp_path: Path) -> None:
    plain, converted = measure("save", tmp_path, "bfloat16", "float16")
    for found in (plain, converted):
        assert sum(found["shards"]) > found["size"] >= 1e9
        assert len(found["shards"]) == 8
    # The first copies nothing, the second makes copies of one shard at a time.
    assert plain["growth"] < 0.2 * max(plain["shards"])
    assert 0.5 * max(converted["shards"]) < converted["growth"] <= 1.1 * max(converted["shards"])
    for found, size in zip(measure("load", tmp_path, "bfloat16", "float32"), (1e9, 2e9), strict=True):
        assert found["size"] >= size
        assert 0.95 * found["size"] <= found["growth"] <= 1.1 * found["size"]
