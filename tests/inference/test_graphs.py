"""Decoding by CUDA graphs, one round ahead of the host, gives the tokens of rounds launched one by one. On a CPU, which has
neither, the same bodies show that nothing else tells such engines apart."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import dsv3
from dsv3 import DeepSeekV3, Engine, SamplingParams
from dsv3.graphs import addresses
from tests.inference.small import random_model, random_prompts, small_config, tokens_of

# Sizes that all native kernels of a decoding step take.
NATIVE = {
    "hidden_size": 64, "q_lora_rank": 32, "kv_lora_rank": 512, "qk_nope_head_dim": 16, "qk_rope_head_dim": 64,
    "v_head_dim": 16, "num_hidden_layers": 3, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4,
    "topk_group": 2,
}  # fmt: skip
GREEDY = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)


def make_model(device: torch.device, **changes: object) -> DeepSeekV3:
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    return random_model(small_config(**{**NATIVE, "dtype": dtype, **changes}), device)


def graphed(model: DeepSeekV3, **options: object) -> Engine:
    return Engine(model, cuda_graphs=True if model.embed.weight.is_cuda else None, **options)


def uneven(params: SamplingParams, count: int) -> list[SamplingParams]:
    """Lengths so different that the batch shrinks through all of its sizes."""
    return [dataclasses.replace(params, max_tokens=3 + 11 * i % 50, seed=i) for i in range(count)]


@pytest.mark.parametrize("speculative", [False, True])
def test_graphs_give_logprobs_where_somebody_asks(device, speculative):
    """Rounds with and without them are graphs of their own."""
    model, prompts = make_model(device), random_prompts(5)
    each = [SamplingParams(max_tokens=9 + 7 * i, seed=i, logprobs=i == 1, ignore_eos=True) for i in range(5)]
    engine, plain = graphed(model, speculative=speculative), Engine(model, cuda_graphs=False, speculative=speculative)
    expected = plain.generate(prompts, each)
    for _ in range(2):
        found = engine.generate(prompts, each)
        assert tokens_of(found) == tokens_of(expected)
        assert found[1].logprobs == pytest.approx(expected[1].logprobs, rel=1e-5, abs=1e-5)
        assert len(found[1].logprobs) == 16
        assert [c.logprobs for c in found if c is not found[1]] == [None] * 4


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(seed=0, temperature=0.8), SamplingParams(top_p=0.8, top_k=20)]
)
@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("kv_cache_dtype", [None, "fp8"])
def test_graphs_give_the_tokens_of_rounds_launched_one_by_one(device, kv_cache_dtype, speculative, params):
    """13 prompts, of which 8 run at a time: batches grow, shrink, and have rows of which nobody is."""
    model, prompts = make_model(device), random_prompts(13)
    each = uneven(dataclasses.replace(params, ignore_eos=True), 13)
    options = {"speculative": speculative, "max_batch": 8, "kv_cache_dtype": kv_cache_dtype}
    engine, plain = graphed(model, **options), Engine(model, cuda_graphs=False, **options)
    expected = plain.generate(prompts, each)
    assert engine.generate(prompts, each) == expected
    assert engine.generate(prompts, each) == expected
    counts = [(s.prompt_tokens, s.generated_tokens, s.prefills) for s in (engine.stats, plain.stats)]
    assert counts[0] == (2 * counts[1][0], 2 * counts[1][1], 2 * counts[1][2])
    assert engine.stats.accepted == 2 * plain.stats.accepted


@pytest.mark.cuda
def test_a_graph_for_every_size_is_captured_once():
    model, prompts = make_model(torch.device("cuda")), random_prompts(12)
    engine = graphed(model, max_batch=12, speculative=False)
    engine.generate(prompts, uneven(GREEDY, 12))
    first = dict(engine._decoder._graphs._captured)
    assert {rows for rows, *_ in first} == {1, 2, 4, 8, 12}
    engine.generate(prompts, uneven(GREEDY, 12))
    again = engine._decoder._graphs._captured
    assert all(again[key] is graph for key, graph in first.items() if graph is not None)


@pytest.mark.parametrize("speculative", [False, True])
def test_the_end_of_a_sequence_is_seen_in_time(device, speculative):
    """What comes behind the end, in rounds that were launched before it was seen, belongs to nobody."""
    model, prompts = make_model(device), random_prompts(5)
    free = tokens_of(dsv3.generate(model, prompts, GREEDY, speculative=False))
    eos = free[0][9]
    model.config = dataclasses.replace(model.config, eos_token_id=eos)
    params = dataclasses.replace(GREEDY, ignore_eos=False)
    pieces: dict[int, list[int]] = {}
    engine = graphed(model, speculative=speculative, max_batch=3)
    found = engine.generate(prompts, params, on_token=lambda i, new, _: pieces.setdefault(i, []).extend(new))
    cut = [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in free]
    assert tokens_of(found) == cut
    assert [pieces[i] for i in range(5)] == cut
    assert engine.stats.generated_tokens == sum(map(len, cut))


@pytest.mark.parametrize("depth", [1, 2])
def test_speculative_equals_plain_to_the_last_token(device, depth):
    """A token's bits do not depend on how many are decoded beside it, nor on whether it was drafted."""
    model, prompts = make_model(device, num_nextn_predict_layers=depth), random_prompts(9, longest=100)
    plain = tokens_of(graphed(model, speculative=False).generate(prompts, GREEDY))
    engine = graphed(model)
    assert tokens_of(engine.generate(prompts, GREEDY)) == plain
    assert engine.stats.accepted > 0


@pytest.mark.parametrize("start", [1000, 8000])
@pytest.mark.parametrize("heads", [8, 40])
@pytest.mark.parametrize("kv_cache_dtype", [None, "fp8"])
@pytest.mark.parametrize(("precision", "max_batch"), [("bf16", 4), ("fp8", 4), ("fp8", 40)])
@pytest.mark.cuda
def test_speculative_equals_plain_in_long_contexts(precision, max_batch, kv_cache_dtype, heads, start):
    """Where lengths cross 1024, 2048 and 8192, at which sequences are divided: by few_attention (8 heads, up to 4096 tokens)
    and by mla_decode, with products in bf16, with FP8 weights, and in FP8, as where rounds may have 80 tokens. Prompts end a
    few tokens before, so that some drafts lie behind it and some do not."""
    context = 4096 if start == 1000 else 8400
    changes = {"max_position_embeddings": context, "num_nextn_predict_layers": 1, "num_attention_heads": heads}
    model = make_model(torch.device("cuda"), num_hidden_layers=2, **changes)
    with torch.no_grad():  # attention that says less than the embedding, so that drafts are taken
        for block in [*model.layers, *(module.layer for module in model.mtp)]:
            block.attention.o.weight.mul_(0.1 if block is model.layers[0] else 0.3)
    model.set_precision(precision)
    prompts = [(p * 8400)[: n + start] for n, p in zip((20, 23, 1044, 150), random_prompts(4), strict=True)]
    prompts = [p[:8300] for p in prompts]
    options = {"kv_cache_dtype": kv_cache_dtype, "max_batch": max_batch}
    plain = tokens_of(graphed(model, speculative=False, **options).generate(prompts, GREEDY))
    engine = graphed(model, **options)
    assert tokens_of(engine.generate(prompts, GREEDY)) == plain
    assert engine.stats.accepted > 0


def test_completions_fill_the_context_exactly(device):
    """The round behind the last one has no place left in the cache, nor in the tables."""
    model = make_model(device)
    limit = model.config.max_position_embeddings
    params = dataclasses.replace(GREEDY, max_tokens=1000)
    prompts = [(random_prompts(1)[0] * limit)[:n] for n in (limit - 1, limit - 3, limit - 64)]
    for speculative in (False, True):
        engine = graphed(model, speculative=speculative)
        for _ in range(2):
            assert [len(t) for t in tokens_of(engine.generate(prompts, params))] == [1, 3, 64]


@pytest.mark.cuda
@pytest.mark.parametrize("change", [{"kv_lora_rank": 256}, {"qk_rope_head_dim": 32}])
def test_sizes_that_have_no_kernel_decode_all_the_same(change):
    """Many heads, which are few_attention's no more: rounds run on the reference, in graphs too."""
    model = make_model(torch.device("cuda"), num_attention_heads=40, **change)
    prompts = random_prompts(4)
    expected = Engine(model, cuda_graphs=False, speculative=False).generate(prompts, GREEDY)
    assert tokens_of(Engine(model, speculative=False).generate(prompts, GREEDY)) == tokens_of(expected)


@torch.no_grad()
def test_weights_may_change_between_calls(device):
    model, prompts = make_model(device), random_prompts(4)
    engine = graphed(model, speculative=False)

    def check(changed: bool) -> None:
        found = tokens_of(engine.generate(prompts, GREEDY))
        assert found == tokens_of(Engine(model, cuda_graphs=False, speculative=False).generate(prompts, GREEDY))
        assert (found != before[-1]) == changed
        before.append(found)

    before = [[]]
    check(True)
    check(False)
    model.layers[1].moe.experts.down.mul_(-1.0)  # in place: the graphs stay
    check(True)
    layer = model.layers[0].attention
    layer.o.weight = nn.Parameter(-layer.o.weight)  # elsewhere: they must not
    check(True)
    model.set_precision("fp8")
    check(True)
    model.head.weight.copy_(model.head.weight.flip(0))
    check(True)
    model.load_state_dict({name: value.detach() for name, value in model.state_dict().items()}, assign=True)
    check(False)  # the same memory under other names: the copies in FP8 are others


def test_copies_in_fp8_are_among_the_addresses():
    model = random_model(small_config())
    model.set_precision("fp8")
    layer = model.layers[0].attention.o
    layer.fp8_weight()
    before = addresses(model)
    assert addresses(model) == before
    layer.weight = nn.Parameter(layer.weight.detach())  # the same memory
    first = layer.fp8_copies.made["weight"]
    assert layer.fp8_weight() is not first
    assert addresses(model) != before


def test_an_interrupted_engine_goes_on(device):
    model, prompts = make_model(device), random_prompts(6)
    engine = graphed(model, max_batch=4)
    expected = engine.generate(prompts, GREEDY)

    def stop(index: int, new: list[int], piece: str) -> None:
        if index == 2 and len(seen) > 20:
            raise KeyboardInterrupt
        seen.extend(new)

    for _ in range(2):
        seen: list[int] = []
        with pytest.raises(KeyboardInterrupt):
            engine.generate(prompts, GREEDY, on_token=stop)
        assert engine.generate(prompts, GREEDY) == expected


def test_graphs_need_bf16_on_a_hopper_gpu(device):
    model = random_model(small_config(), device)
    with pytest.raises(ValueError, match=rf"needs a bfloat16 model on a Hopper GPU, got float32 on {device.type}"):
        Engine(model, cuda_graphs=True)
