"""A layer of V3's attention at full width in decoding, over 4096 cached tokens a sequence: projections, mla_append_kv,
mla_decode, and the projection behind it, with bf16 weights, by the model's own module. The schedule, which all layers share, is
made outside the timed part."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bench.cases import Baseline, Case
from dsv3 import ops
from dsv3.config import Config
from dsv3.model import AttentionContext, few
from dsv3.model.attention import MLA
from dsv3.testing import reference_ops

PAGE = 64
REFERENCE_TOKENS = 32 * 4096  # the reference makes fp32 copies of all keys


@functools.cache
def _module(preset: str, device: torch.device) -> MLA:
    module = MLA(Config.preset(preset), device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        for param in module.parameters():
            if param.dim() == 2:
                param.normal_(0.0, param.shape[1] ** -0.5)
    return module


def _inputs(config: Config, batch: int, length: int, device: torch.device) -> tuple[Tensor, ...]:
    """x, cache, block table, lengths, positions, slots, schedule."""
    pages = -(-length // PAGE)
    table = torch.randperm(batch * pages, device=device).int().view(batch, pages)
    cache = torch.randn(batch * pages, PAGE, 1, config.latent_dim, device=device, dtype=torch.bfloat16)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    positions = lengths.long() - 1
    slots = table[:, -1].long() * PAGE + positions % PAGE
    x = torch.randn(batch, config.hidden_size, device=device, dtype=torch.bfloat16)
    schedule = ops.mla_schedule(lengths, 1, config.num_attention_heads)
    return x, cache, table, lengths, positions, slots, schedule


@torch.no_grad()
def _layer(preset: str, x: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, *rest: Tensor) -> Tensor:
    positions, slots, schedule = rest
    ctx = AttentionContext(positions, block_table=table, seq_lens=lengths, slot_mapping=slots, schedule=schedule)
    module = _module(preset, x.device)
    if len(x) > ops.FEW_TOKENS:
        return module(x, ctx, cache)
    return few.attention(module, few.attention_weights(module), x, ctx, cache)


def _plain(preset: str, *inputs: Tensor) -> Tensor:
    with reference_ops():
        return _layer(preset, *inputs)


def decode_layer(batch: int, tiny: bool) -> Case:
    """Bytes: weights and cached rows once, x and the output."""
    preset, length = ("tiny", 40) if tiny else ("671b", 4096)
    config = Config.preset(preset)
    batch, heads, hidden = min(batch, 3) if tiny else batch, config.num_attention_heads, config.hidden_size
    matrices = (
        hidden * (config.q_lora_rank + config.latent_dim)
        + config.q_lora_rank * heads * config.qk_head_dim
        + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
        + heads * config.v_head_dim * hidden
    )
    attention = heads * length * (config.latent_dim + config.kv_lora_rank)
    peers = {"torch": Baseline(functools.partial(_plain, preset), tolerance=2e-2)}
    return Case(
        op="mla_decode",
        case={"batch": batch, "s_q": 1, "heads": heads, "s_k": length, "kv": "bf16", "layer": True},
        flops=2.0 * batch * (matrices + attention),
        bytes=2 * (matrices + batch * length * config.latent_dim + 2 * batch * hidden),
        inputs=functools.partial(_inputs, config, batch, length),
        run=functools.partial(_layer, preset),
        baselines=peers if batch * length <= REFERENCE_TOKENS else {},
    )
