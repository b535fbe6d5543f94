"""Small random models for the tests of the model."""

from __future__ import annotations

from dataclasses import replace

import torch

from dsv3 import Config, DeepSeekV3

BASE = Config(
    vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=3,
    q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=16,
    moe_intermediate_size=24, first_k_dense_replace=1, n_routed_experts=12, n_shared_experts=1, num_experts_per_tok=3,
    n_group=4, topk_group=2, routed_scaling_factor=2.5, max_position_embeddings=256, initializer_range=0.1, dtype="float32",
)  # fmt: skip
V2 = replace(
    BASE, model_type="deepseek_v2", scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, n_group=1, topk_group=1
)  # fmt: skip
# An original context shorter than the tests' texts, so that the stretched positions are used.
YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}

CASES = {
    "groups and q_lora": BASE,
    "without q_lora": replace(BASE, q_lora_rank=0),
    "one group": replace(BASE, n_group=1, topk_group=1),
    "two shared experts": replace(BASE, n_shared_experts=2),
    "yarn": replace(BASE, rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "yarn with two mscales": replace(BASE, rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}),
    "yarn without mscales": replace(BASE, rope_scaling=YARN),
    "weights not normalised": replace(BASE, norm_topk_prob=False),
    "all dense": replace(BASE, first_k_dense_replace=3),
    "large eps": replace(BASE, rms_norm_eps=0.05),
    "v2 greedy": V2,
    "v2 groups": replace(
        V2, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=4.0, n_shared_experts=2,
        rope_scaling={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    ),
}  # fmt: skip


@torch.no_grad()
def random_model(config: Config, seed: int = 0, device: torch.device | str = "cpu") -> DeepSeekV3:
    """Every tensor random: norm weights in [0.5, 1.5], gate biases in [-0.5, 0.5], the rest of std initializer_range."""
    model = DeepSeekV3(config).init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        if param.dim() == 1:
            param.uniform_(0.5, 1.5, generator=generator)
    for name, buffer in model.named_buffers():
        assert name.endswith("gate.bias")
        buffer.uniform_(-0.5, 0.5, generator=generator)
    return model.to(device)


def tokens_for(config: Config, *shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
