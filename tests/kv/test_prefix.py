"""Names of pages, and the longest prefix that all groups serve, against a twin that tries every length."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv.prefix import PrefixCache, extend, root, window_pages
from kv.types import DUMMY_PAGE

PAGE = 4


def test_names_are_fixed_for_ever_and_differ_by_everything_that_matters():
    tokens = np.arange(12, dtype=np.int32)
    origin = root("weights/float32", "salt")
    names = extend(origin, tokens, PAGE)
    assert len(names) == 3 and len(set(names)) == 3 and all(len(name) == 32 for name in names)
    assert extend(origin, tokens, PAGE) == names, "no hash seed, no address, no clock"
    assert origin.hex().startswith("8c8618f5ded3a6ef")
    assert extend(names[0], tokens[4:], PAGE) == names[1:], "a chain goes on from any link"
    others = [
        root("weights/float32", "other"),
        root("other", "salt"),
        root("weights/float32", "salt", private="r"),
    ]
    others += [root("weights/float32s", "alt"), root("", "weights/float32salt")]
    assert len({origin, *others}) == 6
    for other in others:
        assert not set(extend(other, tokens, PAGE)) & set(names)
    changed = tokens.copy()
    changed[0] += 1
    assert not set(extend(origin, changed, PAGE)) & set(names), "a first token changes every name after it"


@given(st.integers(0, 30))
def test_only_whole_pages_have_names(count):
    assert len(extend(root("", ""), np.zeros(count, np.int32), PAGE)) == count // PAGE


def slow_match(names, known, windows):
    """The longest length for which every group holds what a query right after the prefix sees."""
    for length in range(len(names), -1, -1):
        for group, window in enumerate(windows):
            first = 0 if window is None else max(0, length * PAGE - window + 1) // PAGE
            if any(names[index] not in known[group] for index in range(first, length)):
                break
        else:
            return length
    raise AssertionError("the empty prefix always fits")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([None, 1, 2, 4, 5, 6, 9, 13, 40]), min_size=1, max_size=3),
    st.integers(0, 9),
    st.data(),
)
def test_match_finds_the_longest_prefix_of_all_groups(windows, count, data):
    names = [bytes([index]) * 32 for index in range(count)]
    cache, known, page = PrefixCache(len(windows)), [{} for _ in windows], 1
    for group in range(len(windows)):
        for index in range(count):
            if data.draw(st.integers(0, 5)):
                assert cache.insert(group, names[index], page)
                known[group][names[index]] = page
                page += 1
    found = cache.match(names, windows, PAGE)
    length = slow_match(names, known, windows)
    assert [len(pages) for pages in found] == [length] * len(windows)
    for group, window in enumerate(windows):
        first = 0 if window is None else max(0, length - window_pages(window, PAGE))
        wanted = [known[group][name] for name in names[first:length]]
        assert found[group] == [DUMMY_PAGE] * first + wanted


def test_the_first_page_of_a_name_stays_and_eviction_forgets_only_its_own():
    cache = PrefixCache(2)
    assert cache.insert(0, b"a", 1)
    assert not cache.insert(0, b"a", 2), "the same content computed twice: the first page stays"
    assert not cache.insert(1, b"b", 1), "a page has one name"
    assert cache.insert(1, b"a", 3), "groups are apart"
    cache.evict(1)
    assert cache.match([b"a"], [None, None], PAGE) == [[], []]
    assert cache.insert(0, b"a", 2)
    assert cache.match([b"a"], [None, None], PAGE) == [[2], [3]]
    with pytest.raises(KeyError):
        cache.evict(9)
    assert sorted(cache.clear()) == [2, 3] and len(cache) == 0
