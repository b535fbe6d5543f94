"""What the engine samples, against the model's own distributions: 20000 completions, temperature and top-p on, fixed seeds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv3 import DeepSeekV3, Engine, SamplingParams
from dsv3.inference import decoder
from dsv3.inference.sampling import probabilities
from tests.inference.chi_square import chi_square
from tests.inference.small import random_model, small_config
from tests.inference.wrong_rules import WRONG_RULES

DRAWS, VOCAB, PROMPT = 20000, 8, [3, 1, 4]
TEMPERATURE, TOP_P = 0.8, 0.9


def _model(depth: int) -> DeepSeekV3:
    return random_model(small_config(vocab_size=VOCAB, num_nextn_predict_layers=depth), noise=1.0)


def _samples(model: DeepSeekV3, *, speculative: bool) -> tuple[Tensor, Engine]:
    """int64 [DRAWS, 3]: the first three tokens of as many completions."""
    engine = Engine(model, speculative=speculative, max_batch=4000, max_context=16, max_prefill_tokens=20000)
    settings = {"max_tokens": 3, "temperature": TEMPERATURE, "top_p": TOP_P, "ignore_eos": True}
    params = [SamplingParams(**settings, seed=seed) for seed in range(DRAWS)]
    completions = engine.generate([PROMPT] * DRAWS, params)
    return torch.tensor([c.token_ids for c in completions]), engine


@torch.no_grad()
def _joint(model: DeepSeekV3) -> Tensor:
    """fp64 [V, V, V]: the probability of each first three tokens, from whole passes without a cache."""
    pairs = torch.cartesian_prod(torch.arange(VOCAB), torch.arange(VOCAB))
    tokens = torch.cat([torch.tensor(PROMPT).expand(len(pairs), -1), pairs], 1)
    settings = [torch.tensor(x).expand(1, 1) for x in (TEMPERATURE, TOP_P, 0, 0.0)]
    p = probabilities(model(tokens)[:, len(PROMPT) - 1 :], *settings).double().view(VOCAB, VOCAB, 3, VOCAB)
    return p[0, 0, 0][:, None, None] * p[:, 0, 1][:, :, None] * p[:, :, 2]


def _p_values(tokens: Tensor, joint: Tensor) -> dict[str, float]:
    index = tokens @ torch.tensor([VOCAB * VOCAB, VOCAB, 1])
    count = torch.bincount(index, minlength=VOCAB**3).view(VOCAB, VOCAB, VOCAB)
    expected = joint * DRAWS
    sums = {"first": (1, 2), "second": (0, 2), "third": (0, 1), "pairs": (2,)}
    values = {name: chi_square(count.sum(dims), expected.sum(dims)) for name, dims in sums.items()}
    return {**values, "all": chi_square(count, expected)}


@pytest.mark.parametrize(("depth", "speculative"), [(1, False), (1, True), (2, True)])
def test_sampled_tokens_are_distributed_as_the_model_says(depth, speculative):
    model = _model(depth)
    joint = _joint(model)
    assert abs(float(joint.sum()) - 1) < 1e-5
    assert 0.2 < float((joint > 0).double().mean()) < 0.9  # top-p cuts, but not everything
    tokens, engine = _samples(model, speculative=speculative)
    values = _p_values(tokens, joint)
    assert min(values.values()) > 1e-3, values
    if speculative:
        assert 0.2 < engine.stats.acceptance_rate < 0.9


@pytest.mark.parametrize("wrong", sorted(WRONG_RULES))
def test_wrong_rules_fail_the_same_test(monkeypatch, wrong):
    model = _model(1)
    monkeypatch.setattr(decoder, "accept_sampled", WRONG_RULES[wrong])
    tokens, _ = _samples(model, speculative=True)
    values = _p_values(tokens, _joint(model))
    assert values["first"] > 1e-3  # it comes from the prefill, before any draft
    assert values["second"] < 1e-9
