from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3 import SamplingParams
from dsv3.inference.cache import PAGE, PagePool, pages_for
from dsv3.inference.scheduler import Request, Scheduler


def _request(index: int, tokens: int = 10, reserve: int = 20) -> Request:
    return Request(index, [1] * tokens, SamplingParams(), 0, reserve - tokens, reserve, None)


def _scheduler(pages: int, *, max_batch: int = 4, max_prefill_tokens: int = 1000) -> Scheduler:
    return Scheduler(PagePool(pages + 1), max_batch=max_batch, max_prefill_tokens=max_prefill_tokens)


def test_pages_for():
    assert [pages_for(n) for n in (1, PAGE, PAGE + 1)] == [1, 1, 2]


def test_pool_gives_every_page_but_the_first_once():
    pool = PagePool(6)
    first, second = pool.allocate(2), pool.allocate(3)
    assert sorted(first + second) == [1, 2, 3, 4, 5]
    assert pool.allocate(1) is None
    pool.free(first)
    assert pool.allocate(3) is None
    assert sorted(pool.allocate(2)) == sorted(first)


def test_pool_needs_two_pages():
    with pytest.raises(ValueError, match="at least 2 pages, got 1"):
        PagePool(1)


def test_requests_join_in_order_up_to_the_batch():
    scheduler = _scheduler(100)
    requests = [_request(i) for i in range(6)]
    scheduler.waiting.extend(requests)
    assert scheduler.admit() == requests[:4]
    assert scheduler.admit() == []
    assert [len(r.pages) for r in requests] == [1, 1, 1, 1, 0, 0]


def test_a_large_request_is_not_overtaken():
    scheduler = _scheduler(3)
    requests = [_request(0, 10, 2 * PAGE), _request(1, 10, 2 * PAGE), _request(2)]
    scheduler.waiting.extend(requests)
    assert scheduler.admit() == requests[:1]
    assert scheduler.admit() == []
    requests[0].finish_reason = "stop"
    scheduler.retire()
    assert scheduler.admit() == requests[1:]


def test_prefill_tokens_are_limited_but_one_prompt_always_runs():
    scheduler = _scheduler(100, max_prefill_tokens=50)
    requests = [_request(0, 60, 61), _request(1, 30, 31), _request(2, 20, 21), _request(3, 1, 2)]
    scheduler.waiting.extend(requests)
    assert [len(scheduler.admit()) for _ in range(4)] == [1, 2, 1, 0]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), max_size=20), st.randoms())
def test_rows_follow_their_requests_and_pages_return(sizes, random):
    """Moves applied to an array of rows keep row r equal to running[r]; no page is held twice; in the end all are free."""
    scheduler = _scheduler(8, max_prefill_tokens=300)
    scheduler.waiting.extend(_request(i, n, n + m) for i, (n, m) in enumerate(sizes))
    rows: dict[int, int] = {}
    finished = []
    while scheduler.waiting or scheduler.running:
        first = len(scheduler.running)
        for row, request in enumerate(scheduler.admit(), start=first):
            rows[row] = request.index
        assert scheduler.running
        held = [page for r in scheduler.running for page in r.pages]
        assert len(set(held)) == len(held)
        assert 0 not in held
        assert len(held) + scheduler.pool.num_free == 8
        for request in random.sample(scheduler.running, random.randint(1, len(scheduler.running))):
            request.finish_reason = "length"
            finished.append(request.index)
        for source, target in scheduler.retire():
            rows[target] = rows.pop(source)
        assert [rows[row] for row in range(len(scheduler.running))] == [r.index for r in scheduler.running]
    assert sorted(finished) == list(range(len(sizes)))
    assert scheduler.pool.num_free == 8


def test_clear_frees_everything():
    scheduler = _scheduler(4)
    scheduler.waiting.extend(_request(i) for i in range(9))
    scheduler.admit()
    scheduler.clear()
    assert scheduler.pool.num_free == 4
    assert not scheduler.waiting
    assert not scheduler.running
