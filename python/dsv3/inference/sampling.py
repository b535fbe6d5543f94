"""Sampling: parameters, the distribution that they make of logits, and noise that depends on nothing but seed and position."""

from __future__ import annotations

import operator
import secrets
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypeVar

import torch
from torch import Tensor

# What a uniform number decides; together with the position it is the counter of the noise.
DRAFT, ACCEPT, DRAW = 0, 1, 2
_STREAMS = 4
_WORD = 1 << 64
_Word = TypeVar("_Word", int, Tensor)
_GAMMA, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass(frozen=True)
class SamplingParams:
    """How one completion is drawn.

    Args:
        max_tokens: new tokens at most; a full context ends a completion too.
        temperature: divides the logits; 0 takes the best token always.
        top_p: only the fewest most likely tokens whose probabilities sum to at least top_p; 1 keeps all.
        top_k: only the k most likely tokens, before top_p; 0 keeps all.
        seed: fixes the noise. A completion depends on its own seed, prompt and parameters, not on what else is in the batch
            (up to the rounding of the logits), and equal prompts with equal seeds give equal completions. None: a new one
            from the operating system for each prompt.
        ignore_eos: go on past the end-of-sequence token.
        stop: strings that end the completion, or None; its text ends before them. They need a tokenizer.
        stop_token_ids: tokens that end the completion, whatever ignore_eos says, or None. It keeps the token, and its text too
            unless it is a special one.
        min_p: only tokens at least min_p times as likely as the likeliest, of those that top_k and top_p leave; 0 keeps all.
        logprobs: whether the completion has the logarithm of each token's probability in the model's own distribution, before
            temperature and filters.

    Raises:
        ValueError: a value outside its range.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_p: float = 0.0
    logprobs: bool = False

    def __post_init__(self) -> None:
        for name, number in vars(self).copy().items():  # as numpy has them: what follows reckons with more bits
            if isinstance(number, Real) and not isinstance(number, int | float):
                object.__setattr__(self, name, int(number) if isinstance(number, Integral) else float(number))
        object.__setattr__(self, "stop", _strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        checks = [
            ("max_tokens", "an integer of at least 1", _is_int(self.max_tokens) and self.max_tokens >= 1),
            ("temperature", "a finite number of at least 0", _is_number(self.temperature) and self.temperature >= 0),
            ("top_p", "a number in (0, 1]", _is_number(self.top_p) and 0 < self.top_p <= 1),
            ("top_k", "an integer from 0 to 2^63 - 1", _is_int(self.top_k) and 0 <= self.top_k < 2**63),
            ("seed", "an integer or None", self.seed is None or _is_int(self.seed)),
            ("stop", "non-empty strings", all(isinstance(s, str) and s for s in self.stop)),
            ("stop_token_ids", "token ids of at least 0", all(t >= 0 for t in self.stop_token_ids)),
            ("min_p", "a number in [0, 1]", _is_number(self.min_p) and 0 <= self.min_p <= 1),
            ("logprobs", "True or False", isinstance(self.logprobs, bool)),
            ("ignore_eos", "True or False", isinstance(self.ignore_eos, bool)),
        ]
        for name, expected, good in checks:
            if not good:
                raise ValueError(f"SamplingParams: {name} must be {expected}, got {getattr(self, name)!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def filtered(self) -> bool:
        return not self.greedy and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


def _is_int(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e308


def _strings(stop: object) -> tuple[object, ...]:
    try:
        return (stop,) if isinstance(stop, str) else tuple(stop or ())
    except TypeError:
        return (stop,)


def _token_ids(ids: object) -> tuple[int, ...]:
    """Of one id, several or None; an id is whatever can be an index, as in prompts, but no bool."""

    def index(x: object) -> int:
        if isinstance(x, bool):
            raise TypeError
        return operator.index(x)

    if ids is None:
        return ()
    try:
        return (index(ids),)
    except TypeError:
        pass
    try:
        return tuple(index(t) for t in ids)
    except TypeError:
        expected = "a token id, several or None"
        raise ValueError(f"SamplingParams: stop_token_ids must be {expected}, got {ids!r}") from None


def _signed(x: int) -> int:
    """The int64 with the bits of x modulo 2^64."""
    return (x + _WORD // 2) % _WORD - _WORD // 2


def noise_key(seed: int | None) -> int:
    """int64 key of the noise of `seed`: one step of SplitMix64, so that neighbouring seeds have nothing in common."""
    if seed is None:
        seed = secrets.randbits(64)
    return _signed(_finalize(_signed(seed + _GAMMA)))


def _finalize(x: _Word) -> _Word:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014) on int64, whose products wrap around; of ints the lower
    64 bits count."""
    for shift, factor in ((30, _MIX1), (27, _MIX2)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    return x ^ (x >> 31 & (1 << 33) - 1)


def uniform(key: Tensor, position: Tensor, stream: int | Tensor) -> Tensor:
    """Counter-based noise, fp64 in [0, 1): output number position * 4 + stream of the SplitMix64 generator `key`.

    key, position, stream: int64 of shapes that broadcast; position is the index of the token that the number decides.
    """
    state = key + (position * _STREAMS + (stream + 1)) * _signed(_GAMMA)
    return (_finalize(state) >> 11 & (1 << 53) - 1).double() * 2.0**-53


def probabilities(
    logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor, *, filtered: bool = True
) -> Tensor:
    """The distribution that is drawn from: softmax(logits / temperature), cut to top_k, to top_p, then to min_p, renormalised.

    Args:
        logits: [..., V], any floating dtype.
        temperature, top_p, min_p: fp32 of shapes that broadcast with [...]. Temperature 0 puts everything on the best token.
        top_k: int64 likewise, 0 keeps all. Equal probabilities are kept from the lowest index on.
        filtered: False where no row has top_p < 1, top_k > 0 or min_p > 0: saves the sort.

    Returns:
        fp32 [..., V], rows sum to 1.
    """
    logits = logits.float()
    temperature = temperature[..., None]
    best, index = logits.max(-1, keepdim=True)
    p = torch.softmax((logits - best) / temperature.clamp(min=torch.finfo(torch.float32).tiny), -1)
    if filtered:
        ranked, order = p.sort(stable=True, dim=-1, descending=True)
        rank = torch.arange(p.shape[-1], device=p.device)
        ranked = ranked.masked_fill((rank >= top_k[..., None]) & (top_k > 0)[..., None], 0.0)
        cumulative = ranked.cumsum(-1)
        limit = torch.where(top_p < 1, top_p, torch.inf)[..., None] * cumulative[..., -1:]
        ranked = ranked.masked_fill((cumulative - ranked >= limit) & (rank > 0), 0.0)  # the best always stays
        ranked = ranked.masked_fill(ranked < min_p[..., None] * ranked[..., :1], 0.0)
        p = torch.empty_like(p).scatter_(-1, order, ranked / ranked.sum(-1, keepdim=True))
    return torch.where(temperature > 0, p, torch.zeros_like(p).scatter_(-1, index, 1.0))


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """int64 [...]: an index of weights [..., V] (not negative, need not sum to 1) by inversion at u fp64 [...] in [0, 1).

    Sums are fp64, and an index of weight 0 is never drawn.
    """
    cdf = weights.double().cumsum(-1)
    index = torch.searchsorted(cdf, u[..., None] * cdf[..., -1:], right=True)
    return index.squeeze(-1).clamp(max=weights.shape[-1] - 1)
