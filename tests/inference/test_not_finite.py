"""Weights and activations that are NaN or infinite: generation says so instead of giving tokens."""

from __future__ import annotations

import pytest
import torch

import dsv3
from dsv3 import Engine, SamplingParams
from tests.inference.small import GREEDY, random_model, random_prompts, small_config

NAN = "expected finite logits of token {}, got NaN or infinity: the weights hold what is not finite, or activations overflow"


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=0), SamplingParams(seed=0, top_p=0.9)])
@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize(
    "broken", ["embed.weight", "layers.0.attention.kv_a.weight", "layers.1.moe.experts.down", "norm.weight"]
)
@torch.no_grad()
def test_weights_that_are_nan(broken, speculative, params):
    model = random_model(small_config())
    model.get_parameter(broken).fill_(torch.nan)
    with pytest.raises(ValueError, match=f"prompt 0: {NAN.format(3)}"):
        dsv3.generate(model, [[1, 2, 3]] * 3, params, speculative=speculative)


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=0)])
@torch.no_grad()
def test_weights_that_are_infinite(device, params, speculative):
    model = random_model(small_config(), device)
    model.norm.weight[0] = torch.inf
    with pytest.raises(ValueError, match=f"prompt 0: {NAN.format(2)}"):
        dsv3.generate(model, [[1, 2]], params, speculative=speculative)


@torch.no_grad()
def test_one_word_of_the_head_that_is_nan(device):
    model = random_model(small_config(), device)
    model.head.weight[5] = torch.nan
    with pytest.raises(ValueError, match=f"prompt 0: {NAN.format(2)}"):
        dsv3.generate(model, [[1, 2]], GREEDY)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=0, max_tokens=64, ignore_eos=True)])
@pytest.mark.parametrize("speculative", [False, True])
@torch.no_grad()
def test_nan_while_decoding(device, speculative, params):
    """It is said at the first token that it makes, and the engine goes on when the weights are good again."""
    model, prompts = random_model(small_config(), device), random_prompts(3)
    engine = Engine(model, speculative=speculative)
    expected, head = engine.generate(prompts, params), model.head.weight.clone()

    def spoil(index: int, new: list[int], piece: str) -> None:
        taken[index] += len(new)
        if taken[1] >= 10:
            model.head.weight.fill_(torch.nan)

    taken = [0, 0, 0]
    with pytest.raises(ValueError, match=r"prompt 0: expected finite logits of token \d+, got NaN or infinity"):
        engine.generate(prompts, params, on_token=spoil)
    assert taken[1] >= 10
    model.head.weight.copy_(head)
    assert engine.generate(prompts, params) == expected


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=0, max_tokens=32, ignore_eos=True)])
@torch.no_grad()
def test_tokens_whose_embedding_is_not_finite_are_no_drafts(device, params):
    """A draft that is not accepted must not end a completion: only the token itself, once it is the newest, does."""
    model, prompt, ended = random_model(small_config(), device), [[1, 2, 3]], 0
    healthy = dsv3.generate(model, prompt, params)
    for token in range(4, 64):
        kept, seen = model.embed.weight[token].clone(), []
        model.embed.weight[token, 3] = torch.nan
        try:
            dsv3.generate(model, prompt, params, on_token=lambda index, new, piece, seen=seen: seen.extend(new))
        except ValueError:
            assert token in seen
            ended += 1
        else:
            assert params.temperature or seen == healthy[0].token_ids
        model.embed.weight[token] = kept
    assert 0 < ended < 40
    assert dsv3.generate(model, prompt, params) == healthy
