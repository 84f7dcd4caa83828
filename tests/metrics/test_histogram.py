import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics import buckets
from metrics.histogram import Histogram

SMALL = settings(deadline=None, max_examples=80)
BOUNDS = (0.01, 0.1, 1.0, 2.5, 10.0)
# Bounds themselves are drawn often: an observation that equals a bound belongs below it.
values = st.one_of(st.sampled_from(BOUNDS), st.floats(0, 50), st.integers(0, 50))


def slow_twin(bounds: tuple[float, ...], observed: Sequence[float]) -> Histogram:
    """Counts by looking through all bounds, sums by exact fractions."""
    counts = [0] * (len(bounds) + 1)
    total = 0
    for value in observed:
        place = 0
        while place < len(bounds) and value > bounds[place]:
            place += 1
        counts[place] += 1
        # One float product, then exact rounding: the same number that the fast paths round.
        nano = Fraction(value) * 10**9 if isinstance(value, int) else Fraction(value * 1e9)
        total += round(nano)
    return Histogram(bounds=bounds, counts=tuple(counts), sum_nano=total)


def fold(observed: Sequence[float]) -> Histogram:
    histogram = Histogram.empty(BOUNDS)
    for value in observed:
        histogram = histogram.observe(value)
    return histogram


histograms = st.lists(values, max_size=12).map(fold)


@SMALL
@given(observed=st.lists(values, max_size=40))
def test_observing_one_by_one_is_the_slow_twin(observed: list[float]) -> None:
    assert fold(observed) == slow_twin(BOUNDS, observed)
    assert fold(observed).count == len(observed)
    assert math.isclose(fold(observed).sum, math.fsum(observed), abs_tol=1e-7)


@SMALL
@given(first=st.lists(values, max_size=5), observed=st.lists(st.floats(0, 50), max_size=300))
def test_observing_many_floats_is_observing_each(first: list[float], observed: list[float]) -> None:
    assert fold(first).observe_many(np.array(observed, np.float64)) == fold(first + observed)


@SMALL
@given(observed=st.lists(st.integers(0, 2**31 - 1), max_size=40), dtype=st.sampled_from(["i4", "i8", "u8"]))
def test_observing_many_integers_is_observing_each(observed: list[int], dtype: str) -> None:
    assert Histogram.empty(BOUNDS).observe_many(np.array(observed, dtype)) == fold(observed)


@SMALL
@given(observed=st.lists(st.floats(0, 50, width=32), max_size=40))
def test_observing_many_short_floats_is_observing_each(observed: list[float]) -> None:
    assert Histogram.empty(BOUNDS).observe_many(np.array(observed, np.float32)) == fold(observed)


def test_huge_sums_do_not_wrap_around() -> None:
    observed = [1e12, 3e15, 7.5]
    assert Histogram.empty(BOUNDS).observe_many(np.array(observed)) == slow_twin(BOUNDS, observed)
    wide = np.full(4, 2**62, np.int64)
    assert Histogram.empty(BOUNDS).observe_many(wide).sum_nano == 2**64 * 10**9


@SMALL
@given(a=histograms, b=histograms, c=histograms)
def test_merge_is_associative_and_commutative_with_an_identity(
    a: Histogram, b: Histogram, c: Histogram
) -> None:
    empty = Histogram.empty(BOUNDS)
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(b) == b.merge(a)
    assert a.merge(empty) == a == empty.merge(a)


@SMALL
@given(observed=st.lists(values, max_size=20), data=st.data())
def test_the_order_of_observations_does_not_matter(observed: list[float], data: st.DataObject) -> None:
    assert fold(data.draw(st.permutations(observed))) == fold(observed)


@SMALL
@given(left=st.lists(values, max_size=20), right=st.lists(values, max_size=20))
def test_merging_is_observing_both(left: list[float], right: list[float]) -> None:
    assert fold(left).merge(fold(right)) == fold(left + right)


@pytest.mark.parametrize("bad", [-1, -1e-12, math.nan, math.inf, -math.inf])
def test_what_is_no_observation_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="cannot observe"):
        Histogram.empty(BOUNDS).observe(bad)
    with pytest.raises(ValueError, match="cannot observe"):
        Histogram.empty(BOUNDS).observe_many(np.array([0.5, bad, 0.5]))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="bounds differ"):
        Histogram.empty(BOUNDS).merge(Histogram.empty(BOUNDS[:-1]))
    with pytest.raises(ValueError, match="do not fit"):
        Histogram(bounds=BOUNDS, counts=(0,) * len(BOUNDS), sum_nano=0)
    for bounds in ((1.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="rise strictly"):
            Histogram.empty(bounds)
    with pytest.raises(ValueError, match="finite"):
        Histogram.empty((1.0, math.inf))


def test_no_value_is_no_observation() -> None:
    assert fold([1.0]).observe_many(np.empty(0)) == fold([1.0])


@pytest.mark.parametrize(
    ("max_model_len", "expected"),
    [
        (1, [1]),
        (9, [1, 2, 5]),
        (10, [1, 2, 5, 10]),
        (2048, [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]),
        (5000, [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]),
    ],
)
def test_request_token_bounds_go_up_to_the_longest_sequence(max_model_len: int, expected: list[int]) -> None:
    assert buckets.request_tokens(max_model_len) == tuple(expected)


def test_there_is_no_sequence_without_tokens() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        buckets.request_tokens(0)
