"""Continuous batching: requests wait in order, join the running batch while rows and pages last, and leave when done."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from dsv3.inference.cache import PagePool, pages_for
from dsv3.inference.sampling import SamplingParams
from dsv3.inference.text import TextStream


@dataclass(eq=False)
class Request:
    """One prompt on its way. `max_tokens` is what parameters and context allow; `reserve` tokens of cache are held for it."""

    index: int
    prompt: list[int]
    params: SamplingParams
    key: int
    max_tokens: int
    reserve: int
    text: TextStream | None
    pages: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of the output, where they are asked for
    finish_reason: str | None = None
    num_drafted: int = 0
    num_accepted: int = 0

    @property
    def cached(self) -> int:
        """Tokens in the main cache: all but the newest."""
        return len(self.prompt) + len(self.output) - 1


class Scheduler:
    """First come, first served. A request's pages are all taken when it joins, so a running one never waits for memory.

    Rows 0 to len(running) - 1 of the device's state belong to `running`, in this order.
    """

    def __init__(self, pool: PagePool, *, max_batch: int, max_prefill_tokens: int) -> None:
        self.pool = pool
        self.max_batch = max_batch
        self.max_prefill_tokens = max_prefill_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def has_room(self) -> bool:
        """Whether `admit` would find a request to move."""
        if not self.waiting or len(self.running) >= self.max_batch:
            return False
        return pages_for(self.waiting[0].reserve) <= self.pool.num_free

    def admit(self) -> list[Request]:
        """Moves requests from the head of the queue to the end of `running`; they are prefilled together."""
        joined: list[Request] = []
        tokens = 0
        while self.waiting and len(self.running) < self.max_batch:
            request = self.waiting[0]
            if joined and tokens + len(request.prompt) > self.max_prefill_tokens:
                break
            pages = self.pool.allocate(pages_for(request.reserve))
            if pages is None:
                break
            request.pages = pages
            tokens += len(request.prompt)
            self.running.append(self.waiting.popleft())
            joined.append(request)
        return joined

    def retire(self) -> list[tuple[int, int]]:
        """Drops finished requests from `running`. Returns the moves (from row, to row) that close the gaps, in order."""
        moves = []
        for row in reversed(range(len(self.running))):
            if self.running[row].finish_reason is None:
                continue
            self._release(self.running[row])
            last = self.running.pop()
            if row < len(self.running):
                self.running[row] = last
                moves.append((len(self.running), row))
        return moves

    def clear(self) -> None:
        """Drops everything."""
        for request in self.running:
            self._release(request)
        self.running.clear()
        self.waiting.clear()

    def _release(self, request: Request) -> None:
        self.pool.free(request.pages)
        request.pages = []
