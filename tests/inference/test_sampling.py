from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dsv3 import SamplingParams
from dsv3.inference.sampling import ACCEPT, DRAFT, DRAW, draw, noise_key, probabilities, uniform
from tests.inference.chi_square import chi_square


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("max_tokens", 2.0), ("max_tokens", True), ("temperature", -0.1), ("temperature", math.nan),
        ("temperature", math.inf), ("temperature", "1"), ("top_p", 0.0), ("top_p", 1.01), ("top_k", -1), ("seed", 1.5),
        ("stop", ("",)), ("stop", (3,)), ("stop_token_ids", (-1,)), ("stop_token_ids", ("a",)), ("stop_token_ids", (True,)),
        ("stop_token_ids", False), ("stop_token_ids", 0.0), ("stop_token_ids", "<eos>"), ("stop_token_ids", (1.0,)),
        ("min_p", -0.1), ("min_p", 1.1), ("min_p", math.nan), ("logprobs", 1), ("stop", 5), ("ignore_eos", "no"),
    ],
)  # fmt: skip
def test_params_outside_their_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be .*, got") as error:
        SamplingParams(**{name: value})
    assert repr(value) in str(error.value)


def test_numbers_may_be_those_of_numpy():
    given = SamplingParams(seed=np.int64(7), max_tokens=np.int32(3), temperature=np.float32(0.5), top_k=np.uint8(2))
    assert given == SamplingParams(seed=7, max_tokens=3, temperature=0.5, top_k=2)
    assert type(given.seed) is int  # reckoned with modulo 2^64


def test_stop_may_be_one_string_or_a_list():
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=3).stop_token_ids == (3,)
    assert SamplingParams(stop_token_ids=[0, 3]).stop_token_ids == (0, 3)
    assert SamplingParams(stop_token_ids=None).stop_token_ids == ()
    for zero in (0, (0,), np.int64(0), np.array([0]), torch.tensor(0), torch.tensor([0])):
        assert SamplingParams(stop_token_ids=zero).stop_token_ids == (0,)
    assert SamplingParams(stop_token_ids=np.array([1, 2])).stop_token_ids == (1, 2)


def _plain(logits: list[float], temperature: float, top_p: float, top_k: int, min_p: float) -> list[float]:
    """The distribution in plain Python, fp64."""
    best = max(range(len(logits)), key=lambda i: logits[i])
    if temperature == 0:
        return [float(i == best) for i in range(len(logits))]
    weight = [math.exp((x - logits[best]) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weight[i])[: top_k or None]
    total, kept, mass = sum(weight[i] for i in order), [], 0.0
    for i in order:
        if mass < top_p * total and weight[i] >= min_p * weight[best]:
            kept.append(i)
        mass += weight[i]
    total = sum(weight[i] for i in kept)
    return [weight[i] / total if i in kept else 0.0 for i in range(len(logits))]


def test_probabilities_equal_a_plain_implementation(device):
    limits = [(p, k) for p in (0.05, 0.5, 0.9, 1.0) for k in (0, 1, 7, 100)]
    cases = [(t, p, k, m) for t in (0.0, 0.3, 1.0, 2.5) for p, k in limits for m in (0.0, 0.03, 0.4, 1.0)]
    logits = torch.randn(len(cases), 50, device=device) * 2
    temperature, top_p, top_k, min_p = (torch.tensor(x, device=device) for x in zip(*cases, strict=True))
    p = probabilities(logits, temperature, top_p, top_k, min_p)
    expected = torch.tensor([_plain(row, *case) for row, case in zip(logits.tolist(), cases, strict=True)])
    torch.testing.assert_close(p.cpu(), expected, rtol=1e-5, atol=1e-7)
    unfiltered = (top_p == 1) & (top_k == 0) & (min_p == 0)
    q = probabilities(*(x[unfiltered] for x in (logits, temperature, top_p, top_k, min_p)), filtered=False)
    torch.testing.assert_close(q, p[unfiltered])


def test_probabilities_keep_their_meaning_with_extreme_values(device):
    logits = torch.tensor([[5.0, 5.0, 1.0], [3e38, -3e38, 0.0], [0.0, -math.inf, 0.0]], device=device)
    zero = torch.zeros(3, device=device)
    at = {"top_p": torch.ones(3, device=device), "top_k": zero.long(), "min_p": zero}
    greedy = probabilities(logits, torch.zeros(3, device=device), **at)
    assert greedy.tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 0]]
    cold = probabilities(logits, torch.full((3,), 1e-30, device=device), **at)
    assert cold.tolist() == [[0.5, 0.5, 0], [1, 0, 0], [0.5, 0, 0.5]]


def test_top_p_one_drops_nothing(device):
    p = probabilities(
        torch.zeros(1, 4096, device=device),
        torch.ones(1, device=device),
        torch.ones(1, device=device),
        torch.full((1,), 4096, device=device),
        torch.zeros(1, device=device),
    )
    assert bool((p > 0).all())


def test_draw_follows_the_weights_and_never_takes_a_zero(device):
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.5, 0.0], device=device)
    draws = 20000
    u = uniform(torch.tensor(noise_key(1), device=device), torch.arange(draws, device=device), DRAW)
    count = torch.bincount(draw(weights.expand(draws, -1), u).cpu(), minlength=6)
    assert count[weights.cpu() == 0].sum() == 0
    assert chi_square(count, weights.cpu().double() / 4.5 * draws) > 1e-3
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64, device=device)
    assert draw(weights.expand(2, -1), ends).tolist() == [1, 4]


def test_noise_is_uniform_and_unrelated_between_seeds_positions_and_streams():
    keys = torch.tensor([noise_key(seed) for seed in range(200)])[:, None]
    position = torch.arange(500)
    u = torch.stack([uniform(keys, position, stream) for stream in (DRAFT, ACCEPT, DRAW)])
    assert chi_square(torch.histc(u.float(), 100, 0, 1), torch.full((100,), u.numel() / 100)) > 1e-3
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert u.unique().numel() == u.numel()
    x = u - 0.5
    neighbours = [(x[:, 1:], x[:, :-1]), (x[..., 1:], x[..., :-1]), (x[1:], x[:-1])]
    for a, b in neighbours:
        correlation = float((a * b).mean() * 12)
        assert abs(correlation) < 5 / a.numel() ** 0.5


def test_noise_depends_on_seed_and_position_alone(device):
    key, other = noise_key(7), noise_key(8)
    alone = uniform(torch.tensor([key], device=device), torch.tensor([3], device=device), DRAW)
    keys, position = torch.tensor([other, key], device=device), torch.tensor([3, 3], device=device)
    assert torch.equal(uniform(keys, position, DRAW)[1:], alone)
    assert uniform(keys, position, DRAW)[0] != alone
    assert noise_key(7) == key
    assert noise_key(None) != noise_key(None)


def test_splitmix64_gives_its_published_outputs():
    """The first outputs of SplitMix64 from state 1234567 (Rosetta Code's check values), top 53 bits."""
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    state = torch.tensor(1234567)
    u = [float(uniform(state, torch.tensor(0), stream)) for stream in range(4)]
    assert u == [(x >> 11) / 2**53 for x in outputs]


def test_the_best_token_stays_however_small_top_p_is():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]])
    one = torch.ones(2)
    for top_p in (1e-30, 1e-40, 1e-50):
        p = probabilities(logits, one, torch.full((2,), top_p), torch.zeros(2, dtype=torch.int64), torch.zeros(2))
        assert p.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


def test_no_stop_strings():
    assert SamplingParams(stop=None).stop == ()


@pytest.mark.parametrize(("name", "value"), [("top_k", 2**63), ("temperature", 10**400)])
def test_numbers_too_large(name, value):
    with pytest.raises(ValueError, match=f"SamplingParams: {name} must be"):
        SamplingParams(**{name: value})
