"""A small random model whose MTP modules agree with it now and then."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3 import Config, DeepSeekV3, SamplingParams
from dsv3.inference import Completion

GREEDY = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)


def small_config(**changes: Any) -> Config:
    settings = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5,
        "num_nextn_predict_layers": 1, "max_position_embeddings": 256, "initializer_range": 0.1, "dtype": "float32",
    }  # fmt: skip
    return Config(**{**settings, **changes})


@torch.no_grad()
def random_model(
    config: Config, device: torch.device | str = "cpu", *, seed: int = 0, noise: float = 0.1
) -> DeepSeekV3:
    """Weights of std 0.1, norms in [0.5, 1.5], gate biases in [-0.5, 0.5].

    A module of MTP is the last block again, on the embedding of the token that the main model reads next, plus `noise` times
    what it is given as h: it often, not always, predicts what the main model does, and needs both of its inputs for it.
    """
    model = DeepSeekV3(config, device="cpu", dtype=torch.float32).init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        if param.dim() == 1:
            param.uniform_(0.5, 1.5, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("gate.bias"):
            buffer.uniform_(-0.5, 0.5, generator=generator)
    if config.num_hidden_layers > 1:
        for part in (model.layers[0].attention.o, model.layers[0].mlp.down):
            part.weight.mul_(0.2)
    for module in model.mtp:
        module.layer.load_state_dict(model.layers[-1].state_dict())
        module.norm.load_state_dict(model.norm.state_dict())
        hidden = config.hidden_size
        mix = torch.randn(hidden, hidden, generator=generator) / hidden**0.5
        module.enorm.weight.fill_(1.0)
        module.eh_proj.weight.copy_(torch.cat([0.1 * torch.eye(hidden), 0.1 * noise * mix], 1))
    return model.to(device=device, dtype=getattr(torch, config.dtype))


def random_prompts(count: int, *, longest: int = 70, vocab: int = 64) -> list[list[int]]:
    """`count` prompts of 1 to `longest` tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def full_logits(model: DeepSeekV3, tokens: list[int]) -> Tensor:
    """[T, V] of one pass over all tokens, without a cache."""
    return model(torch.tensor([tokens], device=model.embed.weight.device))[0]


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    return [c.token_ids for c in completions]
