"""The device side of generation: prefill, and decode rounds that draft with MTP, verify and accept without asking the host.

With D MTP modules, a round of a row whose cache holds n tokens (the newest token, number n, is not in it yet):

    verify   the model reads token n and the D drafts behind it in one step, S = 1 + D queries a row
    accept   a of the drafts stay and one token is added: tokens n+1 to n+1+a are new
    draft    module k reads (h_i of depth k, token i+k+1) at i = n+a, the last position whose h is final, and predicts token
             n+a+k+2. Its attention needs its own cache entries of all earlier positions, and those from n-D+1 on were made
             from drafts or not at all; so every module runs over the 2D positions n-D+1 to n+D. Entries past n+a are wrong,
             and the next round overwrites them before it reads them, as it does in the main cache.

All shapes depend only on the number of rows and the width of the block table, and the steps only on `mode` and
`logprobs`: on a GPU a round of each becomes a CUDA graph. Its result is copied to the host by the side, so that the next
round can be launched before the host has seen it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.graphs import Graphs, addresses
from dsv3.inference.cache import PAGE, allocate_cache
from dsv3.inference.sampling import ACCEPT, DRAFT, DRAW, SamplingParams, draw, probabilities, uniform
from dsv3.inference.speculative import accept_sampled
from dsv3.model import AttentionContext, DeepSeekV3
from dsv3.model.attention import MLA
from dsv3.model.layers import Linear
from dsv3.model.moe import Experts

# What a batch needs, cheapest first: best tokens only; drawing; drawing with top_p, top_k or min_p somewhere.
GREEDY, PLAIN, FILTERED = range(3)
# In place of a token that came of logits which are not finite, where the host reads it: the device goes on with some token.
NO_TOKEN = -1


class Pending:
    """The result of a round that may still be running."""

    def __init__(self, result: Tensor, logprobs: Tensor | None, done: torch.cuda.Event | None) -> None:
        self._result, self._logprobs, self._done = result, logprobs, done

    def wait(self) -> tuple[list[list[int]], list[list[float]] | None]:
        """Lists of D+2 numbers a row, as Decoder.round has them, and of D+1 log-probabilities where they were asked for; waits
        for the round. To be read before the round after the next."""
        if self._done is not None:
            self._done.synchronize()
        return self._result.tolist(), None if self._logprobs is None else self._logprobs.tolist()


class _Fetch:
    """Where the results of every second round are put aside, on the device and on the host, by a stream of its own: the way to
    the host takes longer than the next round may wait."""

    def __init__(self, *results: Tensor) -> None:
        self._aside = [torch.empty_like(t) for t in results]
        self._host = [torch.empty_like(t, device="cpu", pin_memory=True) for t in results]
        self._done: torch.cuda.Event | None = None

    def start(self, results: Sequence[Tensor | None], stream: torch.cuda.Stream) -> Pending:
        """Of the first rows of both results, the second one perhaps None."""
        current = torch.cuda.current_stream()
        if self._done is not None:
            current.wait_event(self._done)
        wanted = [
            (t, aside[: len(t)], host[: len(t)])
            for t, aside, host in zip(results, self._aside, self._host, strict=True)
            if t is not None
        ]
        for t, aside, _ in wanted:
            aside.copy_(t)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _, aside, host in wanted:
                host.copy_(aside, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        hosts = [host for _, _, host in wanted]
        return Pending(hosts[0], hosts[1] if len(hosts) > 1 else None, self._done)


class Decoder:
    """Cache and state of `max_batch` rows; row r is one sequence. State tensors keep their addresses.

    Args:
        model: the model; depth of speculation is `depth`, at most len(model.mtp), 0 for none.
        num_pages: of the cache, page 0 included, to which rows point where they have no page.
        max_pages: width of the block table.
        max_context: tokens of a sequence.
        max_prefill_tokens: what a forward pass of a prefill takes at most, of new tokens and again of cached ones at a time; at
            least 1, and `depth`.
        kv_cache_dtype: "fp8", or None for that of the weights.
        cuda_graphs: whether `launch` replays CUDA graphs.
    """

    @torch.inference_mode(False)  # state made by an engine in inference mode must serve it outside too
    def __init__(
        self,
        model: DeepSeekV3,
        *,
        depth: int,
        max_batch: int,
        num_pages: int,
        max_pages: int,
        max_context: int,
        max_prefill_tokens: int,
        kv_cache_dtype: str | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        config, weight = model.config, model.embed.weight
        assert 0 <= depth <= len(model.mtp)
        assert max_prefill_tokens >= max(depth, 1)
        self.model, self.depth = model, depth
        self.device, dtype = weight.device, weight.dtype
        layers, cache_dtype = config.num_hidden_layers + depth, kv_cache_dtype or dtype
        self.cache = allocate_cache(config, num_pages, layers=layers, device=self.device, dtype=cache_dtype)
        self._vocab, self._last_position = config.vocab_size, config.max_position_embeddings - 1
        self._max_context, self._max_prefill_tokens = max_context, max_prefill_tokens
        modules = len(model.mtp)
        self._max_tokens = max_batch * max(1 + modules, 2 * modules)  # of a step, were it with drafts

        def state(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(max_batch, *shape, dtype=dtype, device=self.device)

        past = max(depth - 1, 0)
        self.active = state()  # 1 where the row holds a sequence
        self.lengths = state()  # n, the tokens in the cache
        self.block_table = state(max_pages, dtype=torch.int32)
        self.tokens = state(1 + depth)  # token n and the drafts behind it
        self.draft_probs = state(
            depth, config.vocab_size, dtype=torch.float32
        )  # what drafts were drawn from; unused if greedy
        self.past_tokens = state(past)  # tokens n-D+2 to n
        self.past_h = state(past, config.hidden_size, dtype=dtype)  # h of positions n-D+1 to n-1
        self.key = state()  # of the noise
        self.temperature, self.top_p = state(dtype=torch.float32), state(dtype=torch.float32)
        self.top_k, self.min_p = state(), state(dtype=torch.float32)
        self._state = [t for t in vars(self).values() if isinstance(t, Tensor)]
        self._rows = torch.arange(max_batch, device=self.device)
        self._streams = torch.tensor([ACCEPT, DRAW], device=self.device)[:, None, None]
        self.result, self.logprobs = state(depth + 2), state(depth + 1, dtype=torch.float32)
        self._unfit = torch.zeros(
            config.vocab_size, dtype=torch.bool, device=self.device
        )  # tokens that are never drafted
        self._any_unfit = False
        self._graphs = Graphs() if cuda_graphs else None
        self._addresses: tuple[object, ...] = ()
        on_gpu = self.device.type == "cuda"
        # Of two rounds the host reads one while the other runs.
        self._fetches = [_Fetch(self.result, self.logprobs) for _ in range(2 if on_gpu else 0)]
        self._copying = torch.cuda.Stream(self.device) if on_gpu else None

    # ---- rows ----
    def assign(
        self, first: int, pages: Sequence[list[int]], params: Sequence[SamplingParams], keys: Sequence[int]
    ) -> None:
        """Gives the rows from `first` on their pages, sampling parameters and noise keys."""
        rows = slice(first, first + len(pages))
        width = self.block_table.shape[1]
        self.block_table[rows] = self._tensor([p + [0] * (width - len(p)) for p in pages], torch.int32)
        self.temperature[rows] = self._tensor([p.temperature for p in params], torch.float32)
        self.top_p[rows] = self._tensor([p.top_p for p in params], torch.float32)
        self.top_k[rows] = self._tensor([p.top_k for p in params])
        self.min_p[rows] = self._tensor([p.min_p for p in params], torch.float32)
        self.key[rows] = self._tensor(keys)
        self.active[rows] = 1

    def move(self, source: int, target: int) -> None:
        """Row `target` becomes the sequence of row `source`."""
        for tensor in self._state:
            tensor[target].copy_(tensor[source])

    def release(self, first: int, end: int) -> None:
        """Rows first to end - 1 become idle."""
        for tensor in (self.active, self.lengths, self.block_table):
            tensor[first:end].zero_()

    # ---- steps ----
    def check_weights(self) -> None:
        """To be called when weights may have changed since the last round: graphs that know their old places are dropped, and
        tokens whose embedding is not finite are not drafted. A draft may stand beside the newest token, and what is not
        finite reaches it, though the draft is not accepted."""
        for module in self.model.modules():
            # What rounds read that is made of weights is made here, outside of graphs.
            if isinstance(module, MLA):
                module.up_projections(self.model.embed.weight.dtype)
            elif isinstance(module, Linear):
                module.fp8_weight()
            elif isinstance(module, Experts):
                module.fp8_weights()
        if self.depth:
            self._unfit.copy_(self.model.embed.weight.sum(-1, dtype=torch.float32).isfinite().logical_not_())
            self._any_unfit = bool(self._unfit.any())
        if self._graphs is not None:
            now = *addresses(self.model), self._any_unfit
            if now != self._addresses:
                self._graphs.clear()
            self._addresses = now

    def prefill(
        self, first: int, prompts: Sequence[list[int]], mode: int, logprobs: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Runs prompts, packed, in the assigned rows from `first` on, and drafts. Returns the next tokens int64 [n], NO_TOKEN
        where a logit is not finite, and with `logprobs` their log-probabilities fp32 [n].

        They have at most max_prefill_tokens together, or it is one prompt, whose beginning is stored in pieces of so many.
        """
        rows = slice(first, first + len(prompts))
        begin = self._store_beginning(first, prompts[0]) if len(prompts) == 1 else 0
        tokens = self._tensor([token for p in prompts for token in p[begin:]])
        count = self._tensor([len(p) for p in prompts])
        last = (count - begin).cumsum(0) - 1
        ctx = self._prefill_context(first, [len(p) - begin for p in prompts], begin)

        h, _ = self.model.hidden(tokens, ctx, self.cache)
        logits = self.model.logits(h[last])
        new, _ = self._sample(logits, rows, count, DRAW, mode)
        self.lengths[rows] = count
        self.tokens[rows, 0] = new
        following = tokens.roll(-1).index_copy(0, last, new)
        if self.depth > 1:
            past = (last[:, None] + torch.arange(2 - self.depth, 1, device=self.device)).clamp(min=0)
            self.past_tokens[rows], self.past_h[rows] = following[past], h[past]
        for k in range(self.depth):
            h, _ = self.model.mtp[k](h, following, ctx, self.cache)
            draft, probs = self._sample(self.model.logits(h[last]), rows, count + 1 + k, DRAFT, mode)
            self._keep_draft(rows, k, draft, probs)
            following = following.roll(-1).index_copy(0, last, draft)
        scores = _logprobs(logits, new) if logprobs else None
        return new.masked_fill(~logits.isfinite().all(-1), NO_TOKEN), scores

    def _store_beginning(self, first: int, prompt: list[int]) -> int:
        """Stores tokens of row `first`'s prompt, for the model and its modules, until the rest is one piece. Returns how many.

        Modules read up to `depth` tokens behind a position, and the rest starts the drafting: it has `depth` tokens at least.
        """
        begin = 0
        while len(prompt) - begin > self._max_prefill_tokens:
            length = min(self._max_prefill_tokens, len(prompt) - self.depth - begin)
            tokens = self._tensor(prompt[begin : begin + length + self.depth])
            ctx = self._prefill_context(first, [length], begin)
            h, _ = self.model.hidden(tokens[:length], ctx, self.cache)
            for k in range(self.depth):
                h, _ = self.model.mtp[k](h, tokens[1 + k : 1 + k + length], ctx, self.cache)
            begin += length
        return begin

    def launch(self, batch: int, width: int, mode: int, logprobs: bool) -> Pending:
        """Like `round`, without waiting for it."""
        results = self.result[:batch], self.logprobs[:batch] if logprobs else None
        if self._copying is None:
            self.round(batch, width, mode, logprobs)
            return Pending(*results, None)
        with torch.cuda.device(self.device):  # captures and events are of the current one
            if self._graphs is None:
                self.round(batch, width, mode, logprobs)
            else:
                self._graphs.run((batch, width, mode, logprobs), lambda: self.round(batch, width, mode, logprobs))
            self._fetches.reverse()
            return self._fetches[0].start(results, self._copying)

    def round(self, batch: int, width: int, mode: int, logprobs: bool = False) -> Tensor:
        """One round of the first `batch` rows, looking at the first `width` pages of each.

        Returns `result` int64 [batch, D+2]: in each row D+1 tokens, then how many drafts were accepted, a; a + 1 tokens
        count, and are NO_TOKEN where their logits are not finite. With `logprobs` the tokens' log-probabilities are in
        `self.logprobs` fp32 [batch, D+1]. The next round overwrites both.
        """
        rows = slice(0, batch)
        n, result = self.lengths[rows], self.result[rows]
        before = n.clone() if self.depth else n
        ctx = self._context(n, 0, 1 + self.depth, width)
        h, _ = self.model.hidden(self.tokens[rows].flatten(), ctx, self.cache)
        logits = self.model.logits(h).view(batch, 1 + self.depth, self._vocab)
        if mode == GREEDY:
            ops.greedy_round(result, self.tokens[rows], n, logits, self.active[rows])
        else:
            new, accepted = self._accept(logits, rows, mode)
            torch.cat([new, accepted[:, None]], 1, out=result)
            self.tokens[rows, 0] = new.gather(1, accepted[:, None]).squeeze(1)
            n += (accepted + 1) * self.active[rows]
        if logprobs:
            self.logprobs[rows] = _logprobs(logits, result[:, :-1])
        if self.depth:
            h = h.view(batch, 1 + self.depth, -1)
            self._draft(h, result[:, :-1], result[:, -1], before, width, mode)
        # What is not finite in h makes no logit finite; what the head has was seen in the prefill, which looks at all.
        first = logits[..., 0]
        result[:, :-1].masked_fill_(first - first != 0, NO_TOKEN)  # two kernels; isfinite is five
        return result

    def _accept(self, logits: Tensor, rows: slice, mode: int) -> tuple[Tensor, Tensor]:
        """Tokens [B, D+1] drawn from logits [B, D+1, V], and how many drafts before them were accepted."""
        n, drafts = self.lengths[rows], self.tokens[rows, 1:]
        p = self._probabilities(logits, rows, mode)
        place = n[:, None] + torch.arange(1, 2 + self.depth, device=self.device)
        if not self.depth:
            return draw(p, uniform(self.key[rows, None], place, DRAW)), torch.zeros_like(n)
        u_accept, u_draw = uniform(self.key[rows, None], place, self._streams).unbind()
        return accept_sampled(p, self.draft_probs[rows], drafts, u_accept[:, :-1], u_draw)

    def _draft(self, h: Tensor, new: Tensor, accepted: Tensor, n: Tensor, width: int, mode: int) -> None:
        """Drafts behind the new tokens [B, D+1], whose h [B, D+1, H] the verification gave; n [B] as before it."""
        depth, batch = self.depth, h.shape[0]
        rows = slice(0, batch)
        ctx = self._context(n, 1 - depth, 2 * depth, width)
        h = torch.cat([self.past_h[rows], h], 1) if depth > 1 else h
        # following[:, j + k] is what module k reads at window position j: tokens n-D+2 on, drafts behind the accepted ones.
        following = torch.cat([self.past_tokens[rows], new, new.new_zeros(batch, depth)], 1)
        if depth > 1:
            past = accepted[:, None] + torch.arange(1, depth, device=self.device)
            self.past_tokens[rows] = following.gather(1, past)
            self.past_h[rows] = h[self._rows[rows, None], past]
        at = accepted + (depth - 1)
        h = h.flatten(0, 1)
        flat_at = self._rows[rows] * (2 * depth) + at
        for k in range(depth):
            h, _ = self.model.mtp[k](h, following[:, k : k + 2 * depth].flatten(), ctx, self.cache)
            draft, probs = self._sample(self.model.logits(h[flat_at]), rows, n + accepted + (k + 2), DRAFT, mode)
            self._keep_draft(rows, k, draft, probs)
            following.scatter_(1, (at + (k + 1))[:, None], draft[:, None])

    # ---- parts ----
    def _tensor(self, values: Sequence[object], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device)

    def _prefill_context(self, first: int, lengths: list[int], cached: int) -> AttentionContext:
        """New tokens of the rows from `first` on, `cached` tokens of each of which are stored."""
        table = self.block_table[first : first + len(lengths)]
        return AttentionContext.prefill(lengths, [cached] * len(lengths), table, PAGE, chunk=self._max_prefill_tokens)

    def _context(self, lengths: Tensor, first: int, steps: int, width: int) -> AttentionContext:
        """The `steps` positions of each row from lengths [B] + first on.

        The last may lie behind the context's end, where nothing counts any more, and the first before its beginning. Idle
        rows have length 0 and store nothing.
        """
        batch, attention = len(lengths), self.model.layers[0].attention
        table = self.block_table[:batch]
        settings = {"first": first, "steps": steps, "page": PAGE, "last_position": self._last_position}
        positions, slots, seq_lens = ops.decode_positions(lengths, self.active[:batch], table, **settings)
        table = table[:, :width]
        ctx = AttentionContext(
            positions,
            block_table=table,
            seq_lens=seq_lens,
            slot_mapping=slots,
            max_context=self._max_context,
            max_tokens=self._max_tokens,
        )
        few = batch * steps <= ops.FEW_TOKENS
        if few and attention.attends_few(steps, ctx, self.cache[0]):
            return ctx
        invariant = few and ops.is_batch_invariant()  # beyond, products in bf16 are not
        schedule = ops.mla_schedule(seq_lens, steps, attention.num_heads, batch_invariant=invariant)
        return dataclasses.replace(ctx, schedule=schedule)

    def _probabilities(self, logits: Tensor, rows: slice, mode: int) -> Tensor:
        """fp32 probabilities of logits [B, ..., V] of the rows."""
        shape = -1, *[1] * (logits.dim() - 2)
        settings = [t[rows].view(shape) for t in (self.temperature, self.top_p, self.top_k, self.min_p)]
        return probabilities(logits, *settings, filtered=mode == FILTERED)

    def _sample(
        self, logits: Tensor, rows: slice, place: Tensor, stream: int, mode: int
    ) -> tuple[Tensor, Tensor | None]:
        """A token a row from logits [B, V], for token number `place` [B]; and the distribution [B, V], None where greedy."""
        if stream == DRAFT and self._any_unfit:
            logits = logits.masked_fill(self._unfit, -torch.inf)
        if mode == GREEDY:
            return logits.argmax(-1), None
        p = self._probabilities(logits, rows, mode)
        return draw(p, uniform(self.key[rows], place, stream)), p

    def _keep_draft(self, rows: slice, k: int, draft: Tensor, probs: Tensor | None) -> None:
        # NOTE: a greedy row that meets a sampled one later has stale probabilities. They change nothing: its p is one-hot,
        # so a draft stays only where p is 1, and else max(p - q, 0) has at most the best token.
        self.tokens[rows, 1 + k] = draft
        if probs is not None:
            self.draft_probs[rows, k] = probs


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """fp32 log softmax(logits)[token] of logits [..., V] and tokens int64 [...]: as the model gives them, without temperature
    or filters."""
    logits = logits.float()
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)
