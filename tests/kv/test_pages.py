"""The pool's bookkeeping against a twin that keeps each page's state as a word."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kv.pages import Pages
from kv.types import KvSpec, PageGroup

NUM_PAGES = 7


class PagesMachine(RuleBasedStateMachine):
    """Takes, shares, releases and caches pages at random; the twin is a dict of holders and an LRU list."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages(NUM_PAGES)
        self.holders: dict[int, int] = {}
        self.cached: set[int] = set()
        self.order: list[int] = []
        self.generation = np.zeros(NUM_PAGES, int)

    @property
    def idle(self) -> list[int]:
        return [page for page in self.order if page not in self.holders]

    @property
    def free(self) -> set[int]:
        return set(range(1, NUM_PAGES)) - set(self.holders) - set(self.idle)

    @rule(count=st.integers(1, 4))
    def take(self, count: int) -> None:
        if count > len(self.free) + len(self.idle):
            with pytest.raises(ValueError, match="available"):
                self.pages.take(count)
            return
        free = self.free
        taken, evicted = self.pages.take(count)
        from_idle = max(0, count - len(free))
        assert evicted == self.idle[:from_idle], "the least recently used idle pages go first"
        assert len(set(taken)) == count and set(taken) - set(evicted) <= free
        self.order = [page for page in self.order if page not in evicted]
        self.cached -= set(evicted)
        for page in taken:
            self.holders[page] = 1
            self.generation[page] += 1

    @precondition(lambda self: self.holders or self.idle)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted({*self.holders, *self.idle})))
        self.pages.share(page)
        self.holders[page] = self.holders.get(page, 0) + 1
        if page in self.order:
            self.order.remove(page)

    @precondition(lambda self: self.holders or self.idle)
    @rule(data=st.data())
    def borrow(self, data: st.DataObject) -> None:
        """Whoever only copies an idle page does not change when it will be evicted."""
        page = data.draw(st.sampled_from(sorted({*self.holders, *self.idle})))
        self.pages.borrow(page)
        self.holders[page] = self.holders.get(page, 0) + 1

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.holders)))
        self.pages.release(page)
        self.holders[page] -= 1
        if not self.holders[page]:
            del self.holders[page]
            if page in self.cached and page not in self.order:
                self.order.append(page)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def cache(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.holders)))
        self.pages.mark_cached(page)
        self.cached.add(page)

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def uncache(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.cached)))
        self.pages.unmark_cached(page)
        self.cached.discard(page)
        if page in self.order:
            self.order.remove(page)

    @rule()
    def wrong_calls_are_refused(self) -> None:
        for page in (0, *self.free):
            for call in (self.pages.share, self.pages.borrow, self.pages.release, self.pages.mark_cached):
                with pytest.raises(ValueError, match="page"):
                    call(page)

    @invariant()
    def agrees(self) -> None:
        self.pages.check()
        assert (self.pages.in_use, self.pages.idle, self.pages.free) == (
            len(self.holders), len(self.idle), len(self.free),
        )  # fmt: skip
        assert list(self.pages.idle_pages()) == self.idle
        assert self.pages.available == len(self.idle) + len(self.free)
        assert self.pages.refs.tolist() == [self.holders.get(page, 0) for page in range(NUM_PAGES)]
        assert self.pages.generation.tolist() == self.generation.tolist()


TestPages = PagesMachine.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_pool_without_a_page_to_give_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        Pages(1)


def test_a_spec_knows_its_pages_and_refuses_what_cannot_share_a_pool():
    full = PageGroup(name="full", layers=(0, 2), kv_heads=3, head_dim=64)
    window = PageGroup(name="window", layers=(1, 3), kv_heads=3, head_dim=64, sliding_window=128)
    spec = KvSpec(groups=(full, window), page_size=16, dtype="bfloat16")
    assert spec.page_shape == (2, 2, 3, 16, 64)
    assert spec.page_bytes == 2 * 2 * 3 * 16 * 64 * 2
    with pytest.raises(ValueError, match="power of two"):
        KvSpec(groups=(full,), page_size=12, dtype="float32")
    with pytest.raises(ValueError, match="equal bytes"):
        KvSpec(
            groups=(full, PageGroup(name="odd", layers=(1,), kv_heads=3, head_dim=64)),
            page_size=16, dtype="float32",
        )  # fmt: skip
    with pytest.raises(ValueError, match="at least one"):
        KvSpec(groups=(), page_size=16, dtype="float32")
