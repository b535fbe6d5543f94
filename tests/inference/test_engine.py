from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import dsv3
from dsv3 import DeepSeekV3, Engine, SamplingParams
from dsv3.inference.cache import PAGE
from dsv3.inference.engine import engine_for
from tests.inference.small import GREEDY, full_logits, random_model, random_prompts, small_config, tokens_of


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    return random_model(small_config())


def _greedy_by_full_passes(model: DeepSeekV3, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(full_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


# ---- greedy ----
def test_greedy_equals_full_passes_without_a_cache(model):
    prompts = random_prompts(6, longest=150)
    completions = dsv3.generate(model, prompts, dataclasses.replace(GREEDY, max_tokens=24), speculative=False)
    assert tokens_of(completions) == [_greedy_by_full_passes(model, p, 24) for p in prompts]
    assert {c.finish_reason for c in completions} == {"length"}


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_speculative_greedy_equals_plain_greedy(device, depth):
    """32 prompts of 1 to 100 tokens, 64 new tokens each, exactly; with an acceptance rate that makes both ways count."""
    model = random_model(small_config(num_nextn_predict_layers=depth), device)
    prompts = [*random_prompts(30, longest=100), [5], [6, 7]]
    plain = dsv3.generate(model, prompts, GREEDY, speculative=False)
    engine = Engine(model)
    speculative = engine.generate(prompts, GREEDY)
    assert tokens_of(speculative) == tokens_of(plain)
    assert 0.1 < engine.stats.acceptance_rate < 0.7
    assert [c.num_drafted for c in plain] == [0] * 32
    assert sum(c.num_drafted for c in speculative) == engine.stats.drafted
    assert sum(c.num_accepted for c in speculative) == engine.stats.accepted > 0


def test_speculative_greedy_with_dense_layers_and_without_query_compression():
    model = random_model(small_config(n_routed_experts=0, q_lora_rank=0, num_nextn_predict_layers=2))
    prompts = random_prompts(8)
    plain = dsv3.generate(model, prompts, GREEDY, speculative=False)
    assert tokens_of(dsv3.generate(model, prompts, GREEDY)) == tokens_of(plain)


def test_greedy_in_bf16_differs_only_where_two_tokens_tie(device):
    """Where plain output and speculative (of prompts prefilled in pieces) part, and wherever a token is not the best of a full
    pass (naive attention, no cache), the logits are as close as bf16 rounding puts them; most places are far clearer."""
    model = random_model(small_config(dtype="bfloat16"), device)
    prompts = random_prompts(32)
    plain = tokens_of(dsv3.generate(model, prompts, GREEDY, speculative=False))
    speculative = tokens_of(Engine(model, max_prefill_tokens=16).generate(prompts, GREEDY))
    partings, deficits, gaps = [], [], []
    for prompt, a, b in zip(prompts, plain, speculative, strict=True):
        logits = full_logits(model, prompt + b)[len(prompt) - 1 : -1].float().cpu()
        best = logits.topk(2).values
        gap = (best[:, 0] - best[:, 1]) / best[:, 0].abs()
        partings += gap[[i for i in range(64) if a[:i] == b[:i] and a[i] != b[i]]].tolist()
        chosen = logits.gather(1, torch.tensor(b)[:, None]).squeeze(1)
        deficits += ((best[:, 0] - chosen) / best[:, 0].abs()).tolist()
        gaps += gap.tolist()
    rounding = 4 * 2.0**-8
    assert all(gap <= rounding for gap in partings), partings
    assert 0 < max(deficits) <= rounding
    assert torch.tensor(gaps).median() > 4 * rounding


# ---- the drafter ----
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("length", "piece"), [(1, 100), (2, 100), (70, 100), (70, 3), (70, 10), (70, 69)])
def test_drafts_are_those_of_mtp_over_the_whole_sequence(depth, length, piece):
    """After the prefill, in one piece or many, and after every round, the distributions of the drafts equal a pass without a
    cache."""
    model = random_model(small_config(num_nextn_predict_layers=depth), noise=1.0)
    sequence = random_prompts(1)[0] * length
    del sequence[length:]
    prompt, sizes, max_tokens = list(sequence), [], 40
    engine = Engine(model, max_batch=2, max_prefill_tokens=piece)
    decoder = engine._decoder

    def check(index: int, new: list[int], piece: str) -> None:
        sequence.extend(new)
        if len(sequence) - length == max_tokens:
            return  # the round may have found more tokens than were wanted
        expected = _draft_probs(model, sequence, decoder.tokens[0, 1:])
        torch.testing.assert_close(decoder.draft_probs[0], expected, rtol=1e-3, atol=1e-5)
        sizes.append(len(new))

    params = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=2, ignore_eos=True)
    engine.generate([prompt], params, on_token=check)
    assert len(set(sizes[1:])) > 1


@torch.no_grad()
def _draft_probs(model: DeepSeekV3, sequence: list[int], drafts: Tensor) -> Tensor:
    """[D, V]: what the modules say behind `sequence`, given the drafts before, as in training."""
    tokens = torch.tensor(sequence)
    ctx = dsv3.model.AttentionContext.packed([len(sequence) - 1])
    h, _ = model.hidden(tokens[:-1], ctx)
    extended, rows = torch.cat([tokens, drafts]), []
    for k, module in enumerate(model.mtp):
        h, _ = module(h, extended[1 + k : len(sequence) + k], ctx)
        rows.append(model.logits(h[-1:])[0].softmax(-1))
    return torch.stack(rows)


def test_an_mtp_that_repeats_the_model_is_nearly_always_accepted():
    """One block, which MTP is again, on embeddings that its norm leaves as they are: a draft differs from the model's token
    only by what the attention to the first token adds."""
    model = random_model(
        small_config(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=2), noise=0
    )
    with torch.no_grad():
        length = model.embed.weight.square().mean(-1, keepdim=True).sqrt()
        model.embed.weight.mul_(0.1 / length)
    engine = Engine(model)
    engine.generate(random_prompts(8), GREEDY)
    assert engine.stats.acceptance_rate > 0.9


def test_speculation_without_mtp_is_refused_or_left_out():
    model = random_model(small_config(num_nextn_predict_layers=0))
    with pytest.raises(ValueError, match="speculative=True needs an MTP module, but this model's checkpoint has none"):
        dsv3.generate(model, [[1]], GREEDY, speculative=True)
    assert dsv3.generate(model, [[1]], GREEDY)[0].num_drafted == 0


# ---- long prompts ----
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("piece", [3, 16, 64, 100])
def test_a_prompt_in_pieces_is_a_prompt_in_one(device, depth, piece):
    """Lengths on either side of multiples of a piece, whose ends are at, before and behind those of pages."""
    model = random_model(small_config(num_nextn_predict_layers=depth), device)
    lengths = [n * piece + k for n in range(1, 3) for k in range(-1, 4)]
    prompts = [(prompt * 250)[:n] for n, prompt in zip(lengths, random_prompts(10), strict=True)]
    params = dataclasses.replace(GREEDY, max_tokens=12)
    expected = tokens_of(Engine(model).generate(prompts, params))
    engine = Engine(model, max_prefill_tokens=piece)
    sizes = []
    hooks = [m.attention.register_forward_hook(lambda _, x, __: sizes.append(len(x[0]))) for m in _blocks(model)]
    completions = engine.generate(prompts, dataclasses.replace(params, max_tokens=1))
    for hook in hooks:
        hook.remove()
    assert max(sizes) == piece
    assert sum(sizes) == sum(lengths) * (model.config.num_hidden_layers + depth)
    assert [c.token_ids for c in completions] == [tokens[:1] for tokens in expected]
    assert tokens_of(engine.generate(prompts, params)) == expected


def _blocks(model: DeepSeekV3) -> list[torch.nn.Module]:
    return [*model.layers, *(module.layer for module in model.mtp)]


# ---- batching ----
def test_a_full_queue_and_few_pages_change_nothing(model):
    prompts = random_prompts(10, longest=100)
    params = [dataclasses.replace(GREEDY, max_tokens=1 + 7 * i % 30) for i in range(10)]
    alone = [dsv3.generate(model, [p], q)[0].token_ids for p, q in zip(prompts, params, strict=True)]
    tight = Engine(model, max_batch=3, num_pages=8, max_prefill_tokens=120)
    assert tokens_of(tight.generate(prompts, params)) == alone
    assert tight.stats.generated_tokens == sum(p.max_tokens for p in params)
    again = tight.generate(prompts[:4], params[:4])
    assert tokens_of(again) == alone[:4]


def test_a_seed_fixes_a_completion_whatever_else_is_in_the_batch(model):
    prompts = random_prompts(6)
    params = [
        SamplingParams(max_tokens=16, temperature=0.7 * (i % 3), top_p=(0.8, 1.0)[i % 2], seed=i, ignore_eos=True)
        for i in range(6)
    ]
    for speculative in (False, True):
        alone = [
            dsv3.generate(model, [p], q, speculative=speculative)[0].token_ids
            for p, q in zip(prompts, params, strict=True)
        ]
        together = dsv3.generate(model, prompts[::-1], params[::-1], speculative=speculative, max_batch=4)
        assert tokens_of(together)[::-1] == alone
    other = dsv3.generate(model, prompts[1:2], dataclasses.replace(params[1], seed=99))[0].token_ids
    assert other != alone[1]


def test_without_a_seed_completions_differ(model):
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    assert len({tuple(c.token_ids) for c in dsv3.generate(model, [[1, 2]] * 4, params)}) == 4


def test_completions_fill_the_context_exactly(model):
    limit = model.config.max_position_embeddings
    for length in (limit - 1, limit - 2, limit - PAGE):
        prompt = (random_prompts(1)[0] * limit)[:length]
        params = SamplingParams(max_tokens=1000, temperature=0, ignore_eos=True)
        plain, speculative = (dsv3.generate(model, [prompt], params, speculative=s)[0] for s in (False, True))
        assert len(plain.token_ids) == limit - length
        assert plain.finish_reason == "length"
        assert speculative.token_ids == plain.token_ids


def test_an_interrupted_engine_can_be_used_again(model):
    engine = Engine(model, max_batch=2)

    def stop(index: int, new: list[int], piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(random_prompts(5), GREEDY, on_token=stop)
    prompts = random_prompts(3)
    assert tokens_of(engine.generate(prompts, GREEDY)) == tokens_of(dsv3.generate(model, prompts, GREEDY))


def test_training_goes_on_after_generating():
    """Whatever the model makes once and keeps (rotary tables) must not be made in a mode that autograd refuses."""
    model = random_model(small_config(rope_theta=12345.0))
    dsv3.generate(model, [[1, 2, 3]], GREEDY)
    model.loss(dsv3.Batch(torch.randint(64, (2, 9)))).total.backward()
    assert float(model.embed.weight.grad.abs().sum()) > 0


# ---- bad input ----
@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 1: expected at least one token, got none"),
        ([[1, 64]], "prompt 0: expected tokens from 0 to 63, got 64"),
        ([[-1]], "prompt 0: expected tokens from 0 to 63, got -1"),
        ([[1], [1.5]], r"prompt 1: expected a text or token ids, got \[1.5\]"),
        ([None], "prompt 0: expected a text or token ids, got None"),
        ([torch.tensor(3)], r"prompt 0: expected a text or token ids, got tensor\(3\)"),
        ([[1] * 200 + [1.5]], r"prompt 0: expected a text or token ids, got \[1, 1, 1, 1, 1, 1, ...\]$"),
        ([[1] * 256], r"prompt 0: expected at most 255 tokens \(context of 256\), got 256"),
        ("text", "prompts must be a list of texts or of token ids, got one text"),
        (["text"], "prompt 0: texts and stop strings need a tokenizer, got none"),
    ],
)
def test_bad_prompts(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        dsv3.generate(model, prompts, GREEDY)


def test_stop_tokens_outside_the_vocabulary(model):
    params = SamplingParams(stop_token_ids=(63, 64))
    with pytest.raises(ValueError, match="prompt 1: stop_token_ids must be from 0 to 63, got 64"):
        dsv3.generate(model, [[1], [1]], [GREEDY, params])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch must be an int of at least 1, got 0"),
        ({"max_batch": 1.5}, "max_batch must be an int of at least 1, got 1.5"),
        ({"max_context": 257}, "max_context must be an int from 2 to max_position_embeddings 256, got 257"),
        ({"max_context": 64.0}, "max_context must be an int from 2 to max_position_embeddings 256, got 64.0"),
        ({"num_pages": 1}, "num_pages must be an int of at least 2, got 1"),
        ({"num_pages": 2.0}, "num_pages must be an int of at least 2, got 2.0"),
        ({"max_prefill_tokens": 0}, "max_prefill_tokens must be an int of at least 1, got 0"),
        ({"max_prefill_tokens": "8"}, "max_prefill_tokens must be an int of at least 1, got '8'"),
    ],
)
def test_bad_engines(model, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(model, **options)


def test_a_piece_holds_what_drafting_starts_from():
    model = random_model(small_config(num_nextn_predict_layers=3))
    with pytest.raises(ValueError, match="max_prefill_tokens must be an int of at least 3, got 2"):
        Engine(model, max_prefill_tokens=2)
    assert Engine(model, max_prefill_tokens=2, speculative=False).generate([[1] * 9], GREEDY)


def test_bad_requests(model):
    with pytest.raises(ValueError, match="prompt 0: needs 2 cache pages, the engine has 1"):
        Engine(model, num_pages=2).generate([[1]], GREEDY)
    for bad, found in (
        ([GREEDY], "1 of SamplingParams"),
        ({"max_tokens": 3}, "1 of dict"),
        ([None] * 2, "2 of NoneType"),
    ):
        with pytest.raises(ValueError, match=rf"one SamplingParams or one a prompt \(2\), got {found}"):
            dsv3.generate(model, [[1], [2]], bad)
    assert dsv3.generate(model, [], GREEDY) == []


def test_prompts_and_parameters_may_be_generators(model):
    prompts = [[1, 2], [3]]
    expected = dsv3.generate(model, prompts, GREEDY)
    assert dsv3.generate(model, (p for p in prompts), (GREEDY for _ in prompts)) == expected
    assert Engine(model).generate((p for p in prompts), (GREEDY for _ in prompts)) == expected


def test_an_engine_generates_one_call_at_a_time(model):
    engine = Engine(model)
    expected = engine.generate([[1, 2]], GREEDY)

    def again(index: int, new: list[int], piece: str) -> None:
        with pytest.raises(ValueError, match="this engine is generating already: give it all prompts in one call"):
            engine.generate([[3]], GREEDY)

    assert engine.generate([[1, 2]], GREEDY, on_token=again) == expected
    assert engine.generate([[1, 2]], GREEDY) == expected


def test_an_engine_made_in_inference_mode_serves_outside_of_it(model):
    with torch.inference_mode():
        engine = Engine(model)
        expected = engine.generate([[1, 2]], GREEDY)
    assert engine.generate([[1, 2]], GREEDY) == expected


def test_accepted_drafts_are_in_the_completion():
    model = random_model(small_config(num_nextn_predict_layers=3), noise=0.0)
    for tokens in range(1, 9):
        [found] = dsv3.generate(model, [[1, 2, 3]], dataclasses.replace(GREEDY, max_tokens=tokens))
        assert len(found.token_ids) == tokens
        assert found.num_accepted <= tokens - 1


def test_the_cache_is_as_large_as_the_prompts_need(model):
    short = dataclasses.replace(GREEDY, max_tokens=10)
    engine, prompts, each = engine_for(model, [[1] * 60, [2]], [short, GREEDY], max_batch=1)
    assert engine._scheduler.pool.capacity == 1 + 2
    assert engine.generate(prompts, each) == dsv3.generate(model, [[1] * 60, [2]], [short, GREEDY])


def test_stats_count_what_happened(model):
    engine = Engine(model, speculative=False)
    engine.generate([[1, 2], [3]], dataclasses.replace(GREEDY, max_tokens=10))
    stats = engine.stats
    assert (stats.prompt_tokens, stats.generated_tokens, stats.prefills, stats.steps) == (3, 20, 1, 9)
    assert (stats.drafted, stats.accepted, stats.acceptance_rate) == (0, 0, 0.0)
    assert stats.tokens_per_second == 20 / (stats.prefill_seconds + stats.decode_seconds) > 0
