"""Small models and checkpoints that the tests of weights share."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv3 import Config
from dsv3.model import DeepSeekV3
from dsv3.ops.linear import Quantized
from dsv3.weights import writer

BASE = Config(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12,
    moe_intermediate_size=16, first_k_dense_replace=1, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
    n_group=4, topk_group=2, routed_scaling_factor=2.5, num_nextn_predict_layers=1, max_position_embeddings=128,
    initializer_range=0.1, dtype="float32",
)  # fmt: skip

# Fused parts start at a multiple of 128 rows and kv_a has 576 rows, 4.5 blocks, as in the 671B model. A head has 192 rows of
# q_b and kv_b (one block and a half) and 64 columns of o (half a block).
FP8 = dataclasses.replace(
    BASE, vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=3,
    q_lora_rank=136, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=64,
    moe_intermediate_size=128, n_routed_experts=4, n_group=2, topk_group=1, dtype="bfloat16",
)  # fmt: skip


def small_config(**changes: Any) -> Config:
    return dataclasses.replace(BASE, **changes)


def random_model(config: Config, *, seed: int = 0, dtype: torch.dtype | None = None) -> DeepSeekV3:
    """Every tensor random, norms and gate biases too: a loader that forgets one is found out."""
    generator = torch.Generator().manual_seed(seed)
    model = DeepSeekV3(config, dtype=dtype)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.5)
    return model


def state(model: DeepSeekV3) -> dict[str, Tensor]:
    """Parameters, buffers, and the parts of Quantized weights, by name."""
    found = dict(model.state_dict())
    for name, module in model.named_modules():
        for leaf, value in vars(module).items():
            if isinstance(value, Quantized):
                found |= {f"{name}.{leaf}.data": value.data, f"{name}.{leaf}.sf": value.sf}
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(_bytes(found[name]), _bytes(tensor)), name


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def file_tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def edit(folder: Path, change: dict[str, Tensor | None]) -> None:
    """Rewrite model.safetensors with these tensors set, or removed where None."""
    path = folder / "model.safetensors"
    tensors = {key: value for key, value in {**load_file(path), **change}.items() if value is not None}
    save_file(tensors, path, metadata={"format": "pt"})


def write_fp8(folder: Path, config: Config = FP8, *, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint of random finite FP8 values and random scales, made without our own quantisation."""
    random_model(config, seed=seed).save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    change: dict[str, Tensor | None] = {}
    for key, tensor in file_tensors(folder).items():
        if key.endswith(("_proj.weight", "_mqa.weight")) and "eh_proj" not in key:
            rows, cols = tensor.shape
            values = torch.randint(0, 256, tensor.shape, generator=generator, dtype=torch.uint8)
            values[(values & 0x7F) == 0x7F] = 0x80  # NaN -> -0
            change[key] = values.view(torch.float8_e4m3fn)
            scales = torch.rand(-(-rows // 128), -(-cols // 128), generator=generator) * 1e-3 + 1e-5
            change[key + "_scale_inv"] = scales
    edit(folder, change)
    path = folder / "config.json"
    values = json.loads(path.read_text()) | {"quantization_config": {**writer.QUANTIZATION, "scale_fmt": "ue8m0"}}
    path.write_text(json.dumps(values))
    return file_tensors(folder)
