"""Generation over an FP8 cache is generation over one whose rows are rounded as FP8 rounds them: each row goes through the
reference's pack and unpack as soon as it is stored."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import dsv3
from dsv3 import DeepSeekV3, Engine, ops
from dsv3.inference.cache import PAGE, allocate_cache, pages_for
from dsv3.model import AttentionContext
from dsv3.reference.attention import FP8_ROW, pack_fp8_cache, unpack_fp8_cache
from dsv3.testing import relative_error
from tests.inference.small import random_model, random_prompts, small_config
from tests.inference.test_graphs import GREEDY, make_model, tokens_of

append = ops.mla_append_kv


@torch.no_grad()
def fitting_model(device: torch.device, **changes: object) -> DeepSeekV3:
    """Latents as FP8 rows hold them, and attention that says less than 512 columns of such weights would: drafts are taken."""
    model = make_model(device, num_hidden_layers=2, **changes)
    for block in [*model.layers, *(module.layer for module in model.mtp)]:
        block.attention.o.weight.mul_(0.1 if block is model.layers[0] else 0.3)
    return model


def append_rounded(*args: Tensor, **others: Any) -> None:
    """mla_append_kv into a cache of floats, which then holds what an FP8 cache would."""
    *_, slots, cache = args
    append(*args, **others)
    rows, slots = cache.view(-1, cache.shape[-1]), slots[slots >= 0]
    rows[slots] = unpack_fp8_cache(pack_fp8_cache(rows[slots].bfloat16())).to(cache.dtype)


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """rounded(True) makes every cache of floats one of rounded rows, rounded(False) what it is."""
    return lambda on: monkeypatch.setattr(ops, "mla_append_kv", append_rounded if on else append)


@torch.no_grad()
def logits_through_a_cache(
    model: DeepSeekV3, tokens: list[int], pieces: list[int], steps: int, dtype: torch.dtype | str
) -> Tensor:
    """[T, V]: the first tokens prefilled in pieces that end at `pieces`, the others decoded `steps` at a time."""
    device, width = model.embed.weight.device, pages_for(len(tokens))
    layers = model.config.num_hidden_layers
    cache = allocate_cache(model.config, 1 + width, layers=layers, device=device, dtype=dtype)
    table = torch.arange(width, 0, -1, dtype=torch.int32, device=device)[None]
    text, found = torch.tensor(tokens, device=device), []
    for begin, end in pairwise([0, *pieces]):
        ctx = AttentionContext.prefill([end - begin], [begin], table, PAGE, chunk=16)
        found.append(model.logits(model.hidden(text[begin:end], ctx, cache)[0]))
    for begin in range(pieces[-1], len(tokens), steps):
        places = torch.arange(begin, begin + steps, device=device)
        slots = table[0, places // PAGE].long() * PAGE + places % PAGE
        seq_lens = torch.tensor([begin + steps], dtype=torch.int32, device=device)
        ctx = AttentionContext.decode(table, seq_lens, slots, steps)
        found.append(model.logits(model.hidden(text[begin : begin + steps], ctx, cache)[0]))
    return torch.cat(found)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("heads", [2, 16])
def test_logits_are_those_of_rounded_rows(device, heads, steps, rounded):
    """On a CPU to the last bit; on a GPU as close to fp32 over rounded rows as bf16 over them is. `heads` times `steps` is on
    either side of what few_attention takes. No experts: a choice that rounding changes is no rounding."""
    model = fitting_model(device, num_attention_heads=heads, n_routed_experts=0)
    tokens = [t for prompt in random_prompts(8) for t in prompt][:130]
    settings = {"pieces": [35, 70], "steps": steps}
    found = logits_through_a_cache(model, tokens, dtype="fp8", **settings)
    plain = logits_through_a_cache(model, tokens, dtype=model.embed.weight.dtype, **settings)
    rounded(True)
    expected = logits_through_a_cache(model, tokens, dtype=model.embed.weight.dtype, **settings)
    if device.type == "cpu":
        assert torch.equal(found, expected)
    else:
        exact = logits_through_a_cache(model.float(), tokens, dtype=torch.float32, **settings)
        assert relative_error(found, exact) <= 2 * relative_error(expected, exact) + 1e-3
    assert 1e-4 < relative_error(found, plain) < 0.1


@pytest.mark.parametrize("piece", [10, 16384])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_generation_is_that_over_rounded_rows(depth, piece, rounded):
    """To the last token, accepted draft and bit of every layer's cache, the modules' included: prompts of many lengths in a
    batch, some prefilled in pieces, sequences that wait, end and move."""
    model = fitting_model(torch.device("cpu"), num_nextn_predict_layers=depth)
    prompts, params = random_prompts(7), [dataclasses.replace(GREEDY, max_tokens=5 + 9 * i % 25) for i in range(7)]
    params[1::2] = [dataclasses.replace(p, temperature=0.8, top_p=0.9, seed=3) for p in params[1::2]]
    options = {"max_batch": 4, "max_prefill_tokens": piece}
    engine = Engine(model, kv_cache_dtype="fp8", **options)
    found = engine.generate(prompts, params)
    rounded(True)
    twin = Engine(model, **options)
    assert found == twin.generate(prompts, params)
    assert engine.stats.accepted > 10 or depth == 0
    caches = engine._decoder.cache
    assert [(c.dtype, c.shape[3]) for c in caches] == [(torch.uint8, FP8_ROW)] * (2 + depth)
    for cache, expected in zip(caches, twin._decoder.cache, strict=True):
        assert expected.any()
        assert torch.equal(unpack_fp8_cache(cache).float(), expected)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_speculative_greedy_equals_plain_greedy(depth):
    model, prompts = fitting_model(torch.device("cpu"), num_nextn_predict_layers=depth), random_prompts(12, longest=100)
    plain = dsv3.generate(model, prompts, GREEDY, speculative=False, kv_cache_dtype="fp8")
    engine = Engine(model, kv_cache_dtype="fp8")
    assert tokens_of(engine.generate(prompts, GREEDY)) == tokens_of(plain)
    assert 0.05 < engine.stats.acceptance_rate < 0.7


def test_speculative_greedy_in_bf16_differs_only_where_two_tokens_tie(device):
    """Where plain and speculative output part, the logits over the same cache are as close as rounding puts them: that of bf16,
    by which a value beside the border between two codes of e4m3 falls on either side. Drafts are as good as ever."""
    model, prompts = fitting_model(device, dtype="bfloat16", n_routed_experts=0), random_prompts(24)
    plain = tokens_of(dsv3.generate(model, prompts, GREEDY, speculative=False, kv_cache_dtype="fp8"))
    engine, usual = Engine(model, kv_cache_dtype="fp8"), Engine(model)
    speculative = tokens_of(engine.generate(prompts, GREEDY))
    usual.generate(prompts, GREEDY)
    assert abs(engine.stats.acceptance_rate - usual.stats.acceptance_rate) < 0.1 < usual.stats.acceptance_rate
    gaps, partings = [], []
    for prompt, a, b in zip(prompts, plain, speculative, strict=True):
        logits = logits_through_a_cache(model, prompt + a, pieces=[len(prompt)], steps=1, dtype="fp8")
        best = logits[len(prompt) - 1 : -1].float().topk(2).values.cpu()
        gap = (best[:, 0] - best[:, 1]) / best[:, 0].abs()
        gaps += gap.tolist()
        partings += gap[[i for i in range(len(a)) if a[:i] == b[:i] and a[i] != b[i]]].tolist()
    rounding = 8 * 2.0**-8
    assert all(gap <= rounding for gap in partings), partings
    assert torch.tensor(gaps).median() > 2 * rounding


def test_the_cache_is_in_fp8_only_where_it_is_asked_for():
    model, prompts = fitting_model(torch.device("cpu")), random_prompts(2)
    assert {c.dtype for c in Engine(model)._decoder.cache} == {torch.float32}
    expected = Engine(model, kv_cache_dtype="fp8").generate(prompts, GREEDY)
    assert dsv3.generate(model, prompts, GREEDY, kv_cache_dtype="fp8") == expected


@pytest.mark.parametrize("found", ["fp16", "FP8", "", torch.float8_e4m3fn])
def test_a_dtype_that_no_cache_has(found):
    model = fitting_model(torch.device("cpu"))
    message = re.escape(f'kv_cache_dtype must be "fp8", or left out for that of the weights, got {found!r}')
    with pytest.raises(ValueError, match=message):
        Engine(model, kv_cache_dtype=found)
    with pytest.raises(ValueError, match=message):
        dsv3.generate(model, [[1]], GREEDY, kv_cache_dtype=found)


@pytest.mark.parametrize(("latent", "rotated"), [(16, 8), (512, 32), (256, 64)])
def test_latents_that_fp8_rows_do_not_hold(latent, rotated):
    model = random_model(small_config(kv_lora_rank=latent, qk_rope_head_dim=rotated))
    message = f'kv_cache_dtype="fp8" needs kv_lora_rank 512 and qk_rope_head_dim 64, got {latent} and {rotated}'
    with pytest.raises(ValueError, match=message):
        dsv3.generate(model, [[1]], GREEDY, kv_cache_dtype="fp8")
