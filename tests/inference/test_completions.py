"""What a completion holds: the tokens that parameters allow, where it ends, its text and its log-probabilities."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import dsv3
from dsv3 import DeepSeekV3, SamplingParams
from tests.inference.small import GREEDY, full_logits, random_model, random_prompts, small_config, tokens_of
from tests.inference.test_text import EOS, TOKENIZER


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    return random_model(small_config())


# ---- what is drawn ----
@pytest.mark.parametrize("speculative", [False, True])
def test_min_p_alone_leaves_out_what_is_too_unlikely(model, speculative):
    prompts = random_prompts(6)
    each = [
        SamplingParams(max_tokens=24, seed=i, temperature=2.0, min_p=0.45 * (i % 3), ignore_eos=True) for i in range(6)
    ]
    least = []
    for prompt, params, completion in zip(
        prompts, each, dsv3.generate(model, prompts, each, speculative=speculative), strict=True
    ):
        logits = full_logits(model, prompt + completion.token_ids)[len(prompt) - 1 : -1].double()
        p = (logits / params.temperature).softmax(-1)
        share = p.gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1) / p.amax(-1)
        assert share.min() >= params.min_p * (1 - 1e-4)
        least.append(float(share.min()))
    assert min(least[::3]) < 0.45  # what is left out of the others


# ---- ends, text ----
@pytest.mark.parametrize("speculative", [False, True])
def test_end_of_sequence_stops_unless_ignored(speculative):
    model = random_model(small_config())
    prompt = random_prompts(1)[0]
    ignoring = dataclasses.replace(GREEDY, max_tokens=12)
    free = dsv3.generate(model, [prompt], ignoring)[0].token_ids
    for position in (0, 1, 2, 5):
        eos = free[position]
        for value in (eos, [63, eos]):
            model.config = dataclasses.replace(model.config, eos_token_id=value)
            params = dataclasses.replace(ignoring, ignore_eos=False)
            completion = dsv3.generate(model, [prompt], params, speculative=speculative)[0]
            assert completion.token_ids == free[: free.index(eos) + 1]
            assert completion.finish_reason == "stop"
        assert dsv3.generate(model, [prompt], ignoring, speculative=speculative)[0].token_ids == free


@pytest.mark.parametrize("speculative", [False, True])
def test_stop_tokens_end_a_completion_also_without_end_of_sequence(model, speculative):
    prompt = random_prompts(1)[0]
    free = dsv3.generate(model, [prompt], dataclasses.replace(GREEDY, max_tokens=12))[0].token_ids
    absent = next(t for t in range(64) if t not in free)
    for position in (0, 1, 2, 5):
        ids = (absent, free[position])
        params = dataclasses.replace(GREEDY, max_tokens=12, stop_token_ids=ids)
        completion = dsv3.generate(model, [prompt], params, speculative=speculative)[0]
        assert completion.token_ids == free[: free.index(free[position]) + 1]
        assert completion.finish_reason == "stop"
    params = dataclasses.replace(GREEDY, max_tokens=12, stop_token_ids=absent)
    completion = dsv3.generate(model, [prompt], params, speculative=speculative)[0]
    assert completion.token_ids == free
    assert completion.finish_reason == "length"


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.5}, {"top_k": 5, "temperature": 0.7}])
def test_logprobs_are_those_of_the_model_whatever_is_drawn(model, settings, speculative):
    """Some ask for them and some do not, in one batch; a completion may end among a round's tokens."""
    prompts = random_prompts(4)
    each = [SamplingParams(max_tokens=5 + 4 * i, seed=i, logprobs=i != 2, **settings) for i in range(4)]
    completions = dsv3.generate(model, prompts, each, speculative=speculative)
    without = [dataclasses.replace(p, logprobs=False) for p in each]
    assert tokens_of(completions) == tokens_of(dsv3.generate(model, prompts, without, speculative=speculative))
    assert completions[2].logprobs is None
    for prompt, completion in zip(prompts, completions, strict=True):
        if completion.logprobs is not None:
            logits = full_logits(model, prompt + completion.token_ids)[len(prompt) - 1 : -1].double()
            expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1)
            assert completion.logprobs == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-4)


@pytest.fixture(scope="module")
def byte_model() -> DeepSeekV3:
    return random_model(small_config(vocab_size=257, eos_token_id=EOS))


def test_text_streams_and_equals_the_decoded_tokens(byte_model):
    params = SamplingParams(max_tokens=60, seed=3, temperature=1.0)
    pieces, tokens = {}, {}

    def on_token(index: int, new: list[int], piece: str) -> None:
        pieces.setdefault(index, []).append(piece)
        tokens.setdefault(index, []).extend(new)

    prompts = ["hé", "b", "漢字"]
    streamed = dsv3.generate(byte_model, prompts, params, tokenizer=TOKENIZER, on_token=on_token)
    for index, completion in enumerate(streamed):
        assert "".join(pieces[index]) == completion.text == TOKENIZER.decode(completion.token_ids)
        assert tokens[index] == completion.token_ids
    assert dsv3.generate(byte_model, prompts, params, tokenizer=TOKENIZER) == streamed
    ids = [list(p.encode()) for p in prompts]
    assert tokens_of(dsv3.generate(byte_model, ids, params)) == tokens_of(streamed)


def test_a_stop_string_ends_text_and_tokens(byte_model):
    params = SamplingParams(max_tokens=80, seed=5, temperature=1.2, ignore_eos=True)
    free = dsv3.generate(byte_model, ["x"], params, tokenizer=TOKENIZER)[0]
    stop = next(free.text[i : i + 2] for i in range(10, 60) if "\ufffd" not in free.text[i : i + 2])
    pieces = []
    stopped = dsv3.generate(
        byte_model,
        ["x"],
        dataclasses.replace(params, stop=stop),
        tokenizer=TOKENIZER,
        on_token=lambda i, new, piece: pieces.append(piece),
    )[0]
    assert stopped.text == "".join(pieces) == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert free.token_ids[: len(stopped.token_ids)] == stopped.token_ids
    assert TOKENIZER.decode(stopped.token_ids).endswith(stop)


def test_the_tokenizer_beside_a_loaded_model_is_the_default(byte_model, tmp_path):
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    byte_model.tokenizer_path = tmp_path / "tokenizer.json"
    params = SamplingParams(max_tokens=8, temperature=0)
    found = dsv3.generate(byte_model, ["abc"], params)
    del byte_model.tokenizer_path
    assert found == dsv3.generate(byte_model, ["abc"], params, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="texts and stop strings need a tokenizer, got none"):
        dsv3.generate(byte_model, ["abc"], params)


def test_generation_survives_saving_and_loading(byte_model, tmp_path):
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    folder = tmp_path / "model"
    byte_model.save_pretrained(folder, tokenizer_dir=tmp_path)
    loaded = DeepSeekV3.from_pretrained(folder)
    params = SamplingParams(max_tokens=40, seed=1, temperature=0.8, top_p=0.95)
    expected = dsv3.generate(byte_model, ["saved"], params, tokenizer=TOKENIZER)
    assert dsv3.generate(loaded, ["saved"], params) == expected
    assert expected[0].num_drafted > 0


def test_end_tokens_of_the_generation_config_count(model, tmp_path):
    """Beside those of config.json; the file is saved as it was read."""
    model.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "generation_config.json"
    plain = dsv3.generate(model, [[1, 2, 3]], GREEDY)[0].token_ids
    values = {"eos_token_id": [1, plain[4]], "temperature": 0.6}
    path.write_text(json.dumps(values))
    loaded = DeepSeekV3.from_pretrained(tmp_path / "a")
    ends = dataclasses.replace(GREEDY, ignore_eos=False)
    found = dsv3.generate(loaded, [[1, 2, 3]], ends)[0]
    assert found.finish_reason == "stop"
    assert found.token_ids == plain[: plain.index(plain[4]) + 1]
    loaded.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == values
    for bad, message in (
        ("[1]", "must hold one JSON object, got list"),
        ('{"eos_token_id": "x"}', "expected eos_token_id"),
    ):
        path.write_text(bad)
        with pytest.raises(ValueError, match=rf"generation_config\.json.* {message}"):
            DeepSeekV3.from_pretrained(tmp_path / "a")
