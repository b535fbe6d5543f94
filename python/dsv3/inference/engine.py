"""Generation: prompts in, completions out. The host's side of it; decoder.py is the device's."""

from __future__ import annotations

import operator
import reprlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from dsv3.inference.cache import PagePool, check_kv_cache_dtype, pages_for
from dsv3.inference.decoder import FILTERED, GREEDY, NO_TOKEN, PLAIN, Decoder, Pending
from dsv3.inference.sampling import SamplingParams, noise_key
from dsv3.inference.scheduler import Request, Scheduler
from dsv3.inference.text import TextStream, Tokenizer, encode
from dsv3.model import DeepSeekV3
from dsv3.model.moe import MoE
from dsv3.ops import batch_invariance
from dsv3.ops.attention import LATENT, ROPE
from dsv3.ops.registry import why_no_kernels
from dsv3.tokenizer import load_tokenizer

OnToken = Callable[[int, list[int], str], None]
# Pages of a block table as a graph sees it at least: more cost nothing, since a kernel looks at the lengths.
MIN_WIDTH = 64


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt."""

    token_ids: list[int]  # new tokens, with the end-of-sequence or stop token where it came
    text: str  # "" without a tokenizer; no special tokens; ends before a stop string
    finish_reason: str  # "stop": end of sequence, stop token or string; "length": max_tokens or the context is used up
    num_drafted: int
    num_accepted: int
    logprobs: list[float] | None = None  # of each new token under the model's own distribution, in nats, if asked for


@dataclass
class Stats:
    """Sums over an engine's life."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefills: int = 0
    steps: int = 0  # decode rounds
    drafted: int = 0
    accepted: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second, prefill included."""
        seconds = self.prefill_seconds + self.decode_seconds
        return self.generated_tokens / seconds if seconds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted share of the drafts."""
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass(frozen=True)
class _Round:
    """A decode round whose tokens the host has not taken yet; row r of it is sequence `requests[r]`."""

    requests: list[Request]
    pending: Pending

    def more_to_come(self) -> bool:
        """Whether some sequence may go on behind it: each gets one token at least."""
        return any(r.finish_reason is None and len(r.output) + 1 < r.max_tokens for r in self.requests)


class Engine:
    """Continuous batching over a paged cache, with the model's MTP modules as drafters.

    Args:
        model: on any device; its weights are read, never changed.
        tokenizer: object, path of a tokenizer.json or of its folder; None takes `model.tokenizer_path` where a loader left one.
        speculative: draft with MTP. None: where the model has MTP.
        max_batch: sequences that run at a time; more wait. Where max_batch sequences have at most 64 tokens a step, counting
            what the model's MTP modules would draft, whether they do or not, layers with FP8 weights decode with activations
            that are not cast to FP8; else all rounds cast them.
        max_context: prompt and completion together; None: config.max_position_embeddings.
        num_pages: pages of 64 tokens in the cache; None: enough for max_batch sequences of max_context, which for a long
            context is much: 163840 tokens of 671b take 11.7 GB a sequence.
        max_prefill_tokens: a forward pass over prompts takes at most so many tokens, which bounds its memory: several prompts
            together, or a piece of a longer one on top of those before, whose keys and values are made of the cache again, so
            many at a time. At least 1, and the number of MTP modules that draft.
        kv_cache_dtype: of the cache, MTP's included. None: that of the weights, in bf16 2 * (kv_lora_rank + qk_rope_head_dim)
            bytes a token and layer, 1152 in the released model. "fp8": 656 bytes, for models of its kv_lora_rank (512) and
            qk_rope_head_dim (64): latents in e4m3 with a power-of-two scale for every 128, the rotated part in bf16. Later
            pieces of a long prompt then see rounded keys, so the output depends a little on where it is cut.
        cuda_graphs: replay decode rounds as CUDA graphs, a graph for 1, 2, 4, 8, ... sequences; None: where that can be.
            Weights may be changed in place between calls of `generate`, and replaced.
        batch_invariant: on a Hopper GPU a token of a bf16 model of the released one's kv_lora_rank and qk_rope_head_dim
            (512, 64), in either precision, gets the same bits whatever is decoded beside it, other sequences or drafts, as
            long as a round has at most 64 tokens and all experts are here (a prompt's depend on what is prefilled with it;
            weights dequantised for more than 64 tokens are another exception). So speculation gives the greedy tokens of
            plain decoding. False lets FP8 products of few rows (of engines whose rounds may have more than 64 tokens) and
            attention to few long sequences divide their sums, which is faster.

    Raises:
        ValueError: speculative without MTP, CUDA graphs for anything but a bf16 model with all its experts on a Hopper GPU
            (elsewhere references ask the device), a kv_cache_dtype that there is not or not for such latents, or sizes that
            cannot work.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        *,
        tokenizer: Tokenizer | str | Path | None = None,
        speculative: bool | None = None,
        max_batch: int = 32,
        max_context: int | None = None,
        num_pages: int | None = None,
        max_prefill_tokens: int = 16384,
        kv_cache_dtype: str | None = None,
        cuda_graphs: bool | None = None,
        batch_invariant: bool = True,
    ) -> None:
        check_kv_cache_dtype(kv_cache_dtype)
        config = model.config
        weight = model.embed.weight
        native = weight.dtype == torch.bfloat16 and why_no_kernels(weight.device) is None
        capturable = native
        moes = [module for module in model.modules() if isinstance(module, MoE)]
        if any(moe.buffer.transport != "local" for moe in moes):  # the host reads how many rows come
            if cuda_graphs:
                raise ValueError("cuda_graphs=True needs all experts on one rank, but this model's are split")
            capturable = False
        if cuda_graphs and not capturable:
            found = f"{weight.dtype} on {weight.device}".removeprefix("torch.")
            raise ValueError(f"cuda_graphs=True needs a bfloat16 model on a Hopper GPU, got {found}")
        if speculative and not len(model.mtp):
            raise ValueError("speculative=True needs an MTP module, but this model's checkpoint has none")
        limit = config.max_position_embeddings
        context = limit if max_context is None else max_context
        if not isinstance(context, Integral) or not 2 <= context <= limit:
            raise ValueError(f"max_context must be an int from 2 to max_position_embeddings {limit}, got {context!r}")
        _check_int("max_batch", max_batch, 1)
        self.tokenizer = _tokenizer(model, tokenizer)
        self.stats = Stats()
        self._config, self._context, self._max_batch = config, context, max_batch
        self._depth = 0 if speculative is False else len(model.mtp)
        self._eos = _ids(config.eos_token_id) | _ids((model.generation_config or {}).get("eos_token_id"))
        _check_int("max_prefill_tokens", max_prefill_tokens, max(self._depth, 1))
        num_pages = 1 + max_batch * pages_for(context + self._depth) if num_pages is None else num_pages
        _check_int("num_pages", num_pages, 2)
        self._scheduler = Scheduler(PagePool(num_pages), max_batch=max_batch, max_prefill_tokens=max_prefill_tokens)
        # The table is wide enough for a round behind the one that fills the context: see _step.
        sizes = {
            "max_batch": max_batch,
            "num_pages": num_pages,
            "max_pages": pages_for(context + 2 * self._depth + 1),
            "max_context": context,
            "max_prefill_tokens": max_prefill_tokens,
        }
        graphs = capturable if cuda_graphs is None else cuda_graphs
        options = {"kv_cache_dtype": kv_cache_dtype, "cuda_graphs": graphs}
        self._decoder = Decoder(model, depth=self._depth, **sizes, **options)
        self._min_width = MIN_WIDTH if graphs else 1
        # The references of decoding would take a token at a time, and ask the device.
        decodes = native and (config.kv_lora_rank, config.qk_rope_head_dim) == (LATENT, ROPE)
        self._batch_invariant = bool(batch_invariant and decodes)
        self._ahead = weight.is_cuda  # whether a round is launched before the host has looked at the one before
        self._under_way: _Round | None = None
        self._busy = threading.Lock()

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_token: OnToken | None = None,
    ) -> list[Completion]:
        """Completions of all prompts, in their order. One call at a time: threads have an engine each.

        Args:
            prompts: texts or lists of token ids.
            params: one for all prompts, or one a prompt.
            on_token: called as on_token(index of the prompt, new token ids, piece of text) as soon as tokens are there; pieces
                hold whole characters and joined give the completion's text ("" without a tokenizer).

        Raises:
            ValueError: before anything runs, for a prompt that is empty, does not fit or has tokens outside the vocabulary, for
                stop_token_ids outside it, and where the engine is generating already; and later, when logits are not finite.
        """
        requests = self._requests(prompts, params)
        if not self._busy.acquire(blocking=False):
            raise ValueError(
                "this engine is generating already: give it all prompts in one call, or make another engine"
            )
        try:
            self._scheduler.waiting.extend(requests)
            self._decoder.check_weights()
            with torch.no_grad(), batch_invariance(self._batch_invariant):
                while self._scheduler.waiting or self._scheduler.running:
                    self._step(on_token)
        finally:
            self._under_way = None
            try:
                self._decoder.release(0, self._max_batch)
            finally:
                self._scheduler.clear()
                self._busy.release()
        return [self._completion(r) for r in requests]

    # ---- requests ----
    def _requests(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list of texts or of token ids, got one text")
        prompts = list(prompts)
        each = _one_each(params, len(prompts))
        return [self._request(i, prompt, p) for i, (prompt, p) in enumerate(zip(prompts, each, strict=True))]

    def _request(self, index: int, prompt: str | Sequence[int], params: SamplingParams) -> Request:
        vocab, context = self._config.vocab_size, self._context
        unknown = next((t for t in params.stop_token_ids if t >= vocab), None)
        if unknown is not None:
            raise ValueError(f"prompt {index}: stop_token_ids must be from 0 to {vocab - 1}, got {unknown}")
        if self.tokenizer is None and (isinstance(prompt, str) or params.stop):
            raise ValueError(f"prompt {index}: texts and stop strings need a tokenizer, got none")
        try:
            ids = encode(self.tokenizer, prompt) if isinstance(prompt, str) else list(map(operator.index, prompt))
        except TypeError:
            raise _no_prompt(index, prompt) from None
        if not ids:
            raise ValueError(f"prompt {index}: expected at least one token, got none")
        if min(ids) < 0 or max(ids) >= vocab:
            outside = next(t for t in ids if not 0 <= t < vocab)
            raise ValueError(f"prompt {index}: expected tokens from 0 to {vocab - 1}, got {outside}")
        if len(ids) >= context:
            raise ValueError(
                f"prompt {index}: expected at most {context - 1} tokens (context of {context}), got {len(ids)}"
            )
        max_tokens = min(params.max_tokens, context - len(ids))
        reserve = len(ids) + max_tokens + self._depth
        capacity = self._scheduler.pool.capacity
        if pages_for(reserve) > capacity:
            raise ValueError(f"prompt {index}: needs {pages_for(reserve)} cache pages, the engine has {capacity}")
        text = None if self.tokenizer is None else TextStream(self.tokenizer, params.stop)
        return Request(index, ids, params, noise_key(params.seed), max_tokens, reserve, text)

    def _completion(self, request: Request) -> Completion:
        assert request.finish_reason is not None
        text = request.text.text if request.text else ""
        drafts = request.num_drafted, request.num_accepted
        logprobs = request.logprobs if request.params.logprobs else None
        return Completion(request.output, text, request.finish_reason, *drafts, logprobs)

    # ---- steps ----
    def _step(self, on_token: OnToken | None) -> None:
        """Prefills what can join the batch, or else decodes one round.

        On a GPU the host looks at a round while the next one runs, which needs nothing that the host knows. A sequence that
        has ended takes part in one round too many: it gives tokens that nobody takes, in cache pages that are still its own
        or nobody's.
        """
        start = time.perf_counter()
        if self._scheduler.has_room():
            self._settle(on_token)  # rows move when sequences end
            self._prefill(on_token)
            self.stats.prefill_seconds += time.perf_counter() - start
            return
        if self._ahead and self._under_way is not None:
            following = self._launch() if self._under_way.more_to_come() else None
            self._settle(on_token)
            self._under_way = following
        else:
            self._under_way = self._launch()
            if not self._ahead:
                self._settle(on_token)
        self.stats.decode_seconds += time.perf_counter() - start

    def _prefill(self, on_token: OnToken | None) -> None:
        first = len(self._scheduler.running)
        requests = self._scheduler.admit()
        self._decoder.assign(
            first, [r.pages for r in requests], [r.params for r in requests], [r.key for r in requests]
        )
        wanted = _wants_logprobs(requests)
        new, logprobs = self._decoder.prefill(first, [r.prompt for r in requests], _mode(requests), wanted)
        self.stats.prefills += 1
        self.stats.prompt_tokens += sum(len(r.prompt) for r in requests)
        scores = [None] * len(requests) if logprobs is None else logprobs[:, None].tolist()
        for request, token, score in zip(requests, new.tolist(), scores, strict=True):
            self._take(request, [token], score, on_token)
        self._retire()

    def _launch(self) -> _Round:
        """Starts a round of all running sequences, whose newest tokens may be those of the round under way."""
        requests, steps = list(self._scheduler.running), 1 + self._depth
        rows, unseen = len(requests), steps if self._under_way is not None else 0
        width = pages_for(max(r.cached for r in requests) + unseen + steps)
        if self._ahead:  # few distinct shapes, so that graphs of rounds can be kept
            rows = min(1 << (rows - 1).bit_length(), self._max_batch)
            width = min(max(1 << (width - 1).bit_length(), self._min_width), self._decoder.block_table.shape[1])
        return _Round(requests, self._decoder.launch(rows, width, _mode(requests), _wants_logprobs(requests)))

    def _settle(self, on_token: OnToken | None) -> None:
        """Takes the tokens of the round under way, if there is one."""
        if self._under_way is None:
            return
        done, self._under_way = self._under_way, None
        rows, scores = done.pending.wait()
        live = [r for r, request in enumerate(done.requests) if request.finish_reason is None]
        self.stats.steps += bool(live)
        for r in live:
            request, (*tokens, accepted) = done.requests[r], rows[r]
            taken = self._take(request, tokens[: accepted + 1], scores and scores[r], on_token)
            kept = min(accepted, taken)  # where the completion ended among them
            request.num_drafted += self._depth
            request.num_accepted += kept
            self.stats.drafted += self._depth
            self.stats.accepted += kept
        self._retire()

    def _retire(self) -> None:
        before = len(self._scheduler.running)
        for source, target in self._scheduler.retire():
            self._decoder.move(source, target)
        if len(self._scheduler.running) < before:
            self._decoder.release(len(self._scheduler.running), before)

    def _take(self, request: Request, tokens: list[int], logprobs: list[float] | None, on_token: OnToken | None) -> int:
        """Adds a step's tokens to a completion up to where it ends, and passes them on; returns how many."""
        stream = request.text if on_token is not None or request.params.stop else None
        taken = 0
        for token in tokens:
            if token == NO_TOKEN:
                at = len(request.prompt) + len(request.output)
                raise ValueError(
                    f"prompt {request.index}: expected finite logits of token {at}, got NaN or infinity: the weights hold "
                    "what is not finite, or activations overflow"
                )
            taken += 1
            request.output.append(token)
            if stream is not None:
                stream.push([token])
            ends = token in request.params.stop_token_ids or (token in self._eos and not request.params.ignore_eos)
            if ends or (stream is not None and stream.stopped):
                request.finish_reason = "stop"
            elif len(request.output) == request.max_tokens:
                request.finish_reason = "length"
            if request.finish_reason is not None:
                break
        self.stats.generated_tokens += taken
        if request.params.logprobs:
            request.logprobs += logprobs[:taken]
        finished = request.finish_reason is not None
        if finished and stream is None and request.text is not None:
            request.text.push(request.output)
        piece = request.text.take(final=finished) if request.text is not None and (stream or finished) else ""
        if on_token is not None:
            on_token(request.index, tokens[:taken], piece)
        return taken


def _tokenizer(model: DeepSeekV3, tokenizer: Tokenizer | str | Path | None) -> Tokenizer | None:
    tokenizer = getattr(model, "tokenizer_path", None) if tokenizer is None else tokenizer
    return load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer


def _check_int(name: str, value: object, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")


def _ids(tokens: object) -> frozenset[int]:
    """The token ids of an entry of a config: a number, a list of them, or none."""
    return frozenset(tokens if isinstance(tokens, list) else [] if tokens is None else [tokens])


def _one_each(params: SamplingParams | Iterable[SamplingParams] | None, prompts: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * prompts
    each = list(params) if isinstance(params, Iterable) and not isinstance(params, str | Mapping) else [params]
    if len(each) != prompts or not all(isinstance(p, SamplingParams) for p in each):
        found = ", ".join(sorted({type(p).__name__ for p in each})) or "none"
        raise ValueError(f"expected one SamplingParams or one a prompt ({prompts}), got {len(each)} of {found}")
    return each


def _mode(requests: list[Request]) -> int:
    if all(r.params.greedy for r in requests):
        return GREEDY
    return FILTERED if any(r.params.filtered for r in requests) else PLAIN


def _wants_logprobs(requests: list[Request]) -> bool:
    return any(r.params.logprobs for r in requests)


def _no_prompt(index: int, prompt: object) -> ValueError:
    return ValueError(f"prompt {index}: expected a text or token ids, got {reprlib.repr(prompt)}")


def generate(
    model: DeepSeekV3,
    prompts: Iterable[str] | Iterable[Sequence[int]],
    params: SamplingParams | Iterable[SamplingParams] | None = None,
    *,
    on_token: OnToken | None = None,
    **options: Any,
) -> list[Completion]:
    """Completions of all prompts by an engine just for them; see `engine_for` and Engine.generate for arguments and errors."""
    engine, prompts, params = engine_for(model, prompts, params, **options)
    return engine.generate(prompts, params, on_token=on_token)


def engine_for(
    model: DeepSeekV3,
    prompts: Iterable[str] | Iterable[Sequence[int]],
    params: SamplingParams | Iterable[SamplingParams] | None = None,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    max_batch: int = 32,
    max_context: int | None = None,
    **options: Any,
) -> tuple[Engine, list[list[int]], list[SamplingParams]]:
    """An engine whose cache is as large as these prompts can fill at a time, the prompts as token ids, the parameters of each.
    Without max_context it is that of the longest, which has a say in the kernels.

    Other options are those of Engine; num_pages, where it is given, is too. Raises ValueError as Engine and its generate do.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of texts or of token ids, got one text")
    tokenizer = _tokenizer(model, tokenizer)
    prompts = [encode(tokenizer, p) if tokenizer is not None and isinstance(p, str) else p for p in prompts]
    for index, prompt in enumerate(prompts):
        try:
            len(prompt)
        except TypeError:
            raise _no_prompt(index, prompt) from None
    each = _one_each(params, len(prompts))
    _check_int("max_batch", max_batch, 1)
    max_batch = min(max_batch, max(len(prompts), 1))
    limit, depth = model.config.max_position_embeddings, len(model.mtp)
    if max_context is None:  # as little as they need: what a sequence may reach chooses kernels
        needed = max((len(p) + q.max_tokens for p, q in zip(prompts, each, strict=True)), default=2)
        max_context = min(max(needed, 2), limit)
    context = max_context if isinstance(max_context, Integral) else limit
    pages = [pages_for(min(len(p) + q.max_tokens, context) + depth) for p, q in zip(prompts, each, strict=True)]
    sizes = {"num_pages": 2 + sum(sorted(pages, reverse=True)[:max_batch]), **options}
    return Engine(model, tokenizer=tokenizer, max_batch=max_batch, max_context=max_context, **sizes), prompts, each
