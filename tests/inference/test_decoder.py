from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsv3 import DeepSeekV3, SamplingParams
from dsv3.inference.decoder import FILTERED, GREEDY, PLAIN, Decoder
from dsv3.model.attention import MLA
from tests.inference.small import random_model, random_prompts, small_config

# Of as many rows; no two alike, so that what a row does not take with it when it moves is seen.
PARAMS = [
    SamplingParams(temperature=0.8 + 0.1 * i, top_p=0.9 - 0.1 * i, top_k=40 - i, min_p=0.01 * i) for i in range(8)
]
SIZES = {"max_batch": 8, "num_pages": 40, "max_pages": 5, "max_context": 256, "max_prefill_tokens": 1000}


def _decoder(model: DeepSeekV3, prompts: list[list[int]], mode: int) -> Decoder:
    decoder = Decoder(model, depth=len(model.mtp), **SIZES)
    pages = [[1 + 2 * i, 2 + 2 * i] for i in range(len(prompts))]
    decoder.assign(0, pages, PARAMS[: len(prompts)], list(range(len(prompts))))
    decoder.prefill(0, prompts, mode)
    return decoder


class _Stub(nn.Module):
    """As much of a model as the decoder calls, without the model's own operations."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.config = small_config(num_nextn_predict_layers=depth, kv_lora_rank=512, qk_rope_head_dim=64)
        self.layers = [SimpleNamespace(attention=MLA(self.config))]
        self.embed = nn.Embedding(64, 32)
        self.mtp = [lambda h, tokens, ctx, cache: (self.embed(tokens) + h, None) for _ in range(depth)]

    def hidden(self, tokens: Tensor, ctx: Any, cache: list[Tensor]) -> tuple[Tensor, list[Any]]:
        return self.embed(tokens), []

    def logits(self, h: Tensor) -> Tensor:
        return h @ self.embed.weight.t()


@pytest.mark.parametrize("mode", [GREEDY, PLAIN, FILTERED])
@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("kv_cache_dtype", [None, "fp8"])
@torch.no_grad()
def test_a_round_reads_nothing_on_the_host(kv_cache_dtype, depth, mode):
    """On the meta device there are no values: what the host reads, and shapes that depend on values, are errors there."""
    decoder = Decoder(_Stub(depth).to("meta"), depth=depth, kv_cache_dtype=kv_cache_dtype, **SIZES)
    state = [id(t) for t in vars(decoder).values()]
    result = decoder.round(4, 2, mode)
    assert result.shape == (4, depth + 2)
    assert [id(t) for t in vars(decoder).values()] == state
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        result.tolist()


@pytest.mark.parametrize("mode", [GREEDY, FILTERED])
@torch.no_grad()
def test_idle_rows_and_a_wider_table_change_nothing(device, mode):
    model, prompts = random_model(small_config(num_nextn_predict_layers=2), device), random_prompts(3)
    exact, padded = _decoder(model, prompts, mode), _decoder(model, prompts, mode)
    for _ in range(6):
        assert torch.equal(exact.round(3, 2, mode), padded.round(8, 5, mode)[:3])
    assert torch.equal(exact.lengths, padded.lengths)
    assert padded.lengths[3:].tolist() == [0] * 5
    for a, b in zip(exact.cache, padded.cache, strict=True):
        torch.testing.assert_close(a[1:], b[1:])
        assert not b[7:].any()


@torch.no_grad()
def test_a_moved_row_goes_on_as_before():
    model, prompts = random_model(small_config(num_nextn_predict_layers=2)), random_prompts(3)
    stayed, moved = _decoder(model, prompts, FILTERED), _decoder(model, prompts, FILTERED)
    moved.move(2, 0)
    moved.release(2, 3)
    for _ in range(5):
        expected, found = stayed.round(3, 2, FILTERED), moved.round(2, 2, FILTERED)
        assert torch.equal(found, expected[[2, 1]])
