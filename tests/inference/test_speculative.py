from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsv3 import ops
from dsv3.inference.sampling import ACCEPT, DRAFT, DRAW, draw, noise_key, probabilities, uniform
from dsv3.inference.speculative import accept_sampled
from tests.inference.chi_square import chi_square
from tests.inference.wrong_rules import WRONG_RULES

DRAWS, VOCAB = 20000, 6
Rule = Callable[..., tuple[Tensor, Tensor]]


def _chains(device: torch.device, depth: int) -> tuple[Tensor, Tensor]:
    """p [D+1, V, V] and q [D, V, V]: a model and a drafter that look at the last token only, after temperature and top-p."""
    generator = torch.Generator().manual_seed(3)
    p_logits = torch.randn(depth + 1, VOCAB, VOCAB, generator=generator) * 1.5
    q_logits = p_logits[:depth] * 0.6 + torch.randn(depth, VOCAB, VOCAB, generator=generator)
    settings = [torch.tensor(x).expand(1, 1) for x in (0.8, 0.9, 0, 0.0)]
    return tuple(probabilities(x, *settings).to(device) for x in (p_logits, q_logits))


def _outcomes(rule: Rule, device: torch.device, depth: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """p, tokens [DRAWS, D+1] and accepted [DRAWS] of many sequences that all follow token 0."""
    p, q = _chains(device, depth)
    key = torch.tensor([noise_key(seed * DRAWS + i) for i in range(DRAWS)], device=device)
    place = torch.arange(1, depth + 2, device=device).expand(DRAWS, -1)
    last, drafts, rows = torch.zeros(DRAWS, dtype=torch.int64, device=device), [], [p[0, 0].expand(DRAWS, -1)]
    q_rows = []
    for k in range(depth):
        q_rows.append(q[k][last])
        last = draw(q_rows[-1], uniform(key, place[:, k], DRAFT))
        drafts.append(last)
        rows.append(p[k + 1][last])
    u_accept, u_draw = uniform(key[:, None], place[:, :depth], ACCEPT), uniform(key[:, None], place, DRAW)
    tokens, accepted = rule(torch.stack(rows, 1), torch.stack(q_rows, 1), torch.stack(drafts, 1), u_accept, u_draw)
    return p, tokens, accepted


def _p_values(rule: Rule, device: torch.device, depth: int) -> list[float]:
    """Of the first token; and of the token after each pair (place, token before) among the sequences that got so far."""
    p, tokens, accepted = _outcomes(rule, device, depth)
    p, tokens, accepted = p.cpu(), tokens.cpu(), accepted.cpu()
    values = [chi_square(torch.bincount(tokens[:, 0], minlength=VOCAB), p[0, 0] * DRAWS)]
    for place in range(1, depth + 1):
        for token in range(VOCAB):
            here = (accepted >= place) & (tokens[:, place - 1] == token)
            if int(here.sum()) < 200:
                continue
            count = torch.bincount(tokens[here, place], minlength=VOCAB)
            values.append(chi_square(count, p[place, token] * int(here.sum())))
    return values


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_accepted_tokens_are_distributed_as_the_model_says(device, depth):
    values = _p_values(accept_sampled, device, depth)
    assert len(values) > 3 * depth
    assert min(values) > 1e-3
    _, _, accepted = _outcomes(accept_sampled, device, depth)
    rate = float(accepted.double().mean()) / depth
    assert 0.2 < rate < 0.8


def test_acceptance_rate_is_the_overlap_of_the_distributions(device):
    p, q = _chains(device, 1)
    _, _, accepted = _outcomes(accept_sampled, device, 1)
    overlap = float(torch.minimum(p[0, 0], q[0, 0]).sum())
    assert abs(float(accepted.double().mean()) - overlap) < 4 * (overlap * (1 - overlap) / DRAWS) ** 0.5


@pytest.mark.parametrize("wrong", sorted(WRONG_RULES))
def test_wrong_rules_fail_the_test_of_the_distribution(wrong):
    assert min(_p_values(WRONG_RULES[wrong], torch.device("cpu"), 1)) < 1e-9


def test_equal_distributions_accept_everything():
    p = torch.softmax(torch.randn(500, 3, VOCAB), -1)
    drafts = draw(p[:, :2], torch.rand(500, 2, dtype=torch.float64))
    u = torch.rand(500, 3, dtype=torch.float64)
    tokens, accepted = accept_sampled(p, p[:, :2], drafts, u[:, :2], u)
    assert bool((accepted == 2).all())
    assert torch.equal(tokens[:, :2], drafts)


def test_one_hot_distributions_follow_the_greedy_rule_whatever_q_says():
    """A greedy row beside sampled ones: p is one-hot, and what is stored as q may be anything between 0 and 1."""
    best = torch.randint(VOCAB, (1000, 3))
    drafts = torch.where(torch.rand(1000, 2) < 0.6, best[:, :2], torch.randint(VOCAB, (1000, 2)))
    p = torch.nn.functional.one_hot(best, VOCAB).float()
    q = torch.rand(1000, 2, VOCAB).round(decimals=1)  # with exact zeros and ones
    u = torch.rand(1000, 3, dtype=torch.float64)
    tokens, accepted = accept_sampled(p, q, drafts, u[:, :2], u)
    state = torch.zeros(1000, dtype=torch.int64)
    result, newest = torch.zeros(1000, 4, dtype=torch.int64), torch.cat([state[:, None], drafts], 1)
    ops.greedy_round(result, newest, state.clone(), p, state)
    greedy_tokens, greedy_accepted = result[:, :3], result[:, 3]
    assert torch.equal(accepted, greedy_accepted)
    assert set(accepted.tolist()) == {0, 1, 2}
    counted = torch.arange(3) <= accepted[:, None]
    assert torch.equal(tokens[counted], greedy_tokens[counted])
