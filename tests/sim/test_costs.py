"""Costs of steps: what a bucket costs is what its points say, and more work never costs less."""

import json
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.batch import Bucket
from jaxserve.sim.costs import (
    BucketCost,
    CostError,
    Point,
    TransferCost,
    Work,
    fit,
    fit_bucket,
    read_table,
    step_clock,
    work_of,
    write_table,
)
from scheduler.types import Rows
from tests.sim.tables import ROWS, TOKENS, table


def rows_of(*rows: tuple[int, int]) -> Rows:
    """Rows of (start, length)."""
    starts, lens = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    nothing = np.zeros(len(rows), np.int32)
    return Rows(
        slots=nothing,
        starts=starts,
        lens=lens,
        samples=nothing > 0,
        num_outputs=nothing,
        tokens=np.zeros(int(lens.sum()), np.int32),
        page_tables=(np.zeros((len(rows), 1), np.int32),),
    )


rows_strategy = st.lists(
    st.tuples(st.integers(0, 60), st.one_of(st.just(1), st.integers(1, 16))), min_size=1, max_size=ROWS
)


@given(rows_strategy)
def test_work_is_what_attention_sees(rows):
    """Counted token by token."""
    context = max((start + 1 for start, count in rows if count == 1), default=0)
    pairs = sum(
        position + 1 for start, count in rows if count > 1 for position in range(start, start + count)
    )
    assert work_of(rows_of(*rows)) == Work(context=context, pairs=pairs)


@given(rows_strategy, st.integers(0, ROWS - 1), st.integers(1, 40))
def test_a_longer_context_never_costs_less(rows, which, more):
    seconds = step_clock(table())
    which %= len(rows)
    longer = [(start + more * (row == which), count) for row, (start, count) in enumerate(rows)]
    assert seconds(rows_of(*longer)) >= seconds(rows_of(*rows))


def test_a_step_costs_its_bucket_its_attention_and_its_host():
    seconds = step_clock(table())
    decodes = 4e-3 + 20e-5 + 0.25 + 3 * 0.5
    assert seconds(rows_of((9, 1), (19, 1), (0, 1))) == pytest.approx(decodes)
    mixed = 32e-3 + 10e-5 + (3 + 4) * 1e-6 + 0.25 + 2 * 0.5
    assert seconds(rows_of((9, 1), (2, 2))) == pytest.approx(mixed)
    with pytest.raises(ValueError, match="no bucket"):
        seconds(rows_of((0, TOKENS + 1)))


@given(
    st.tuples(st.floats(1e-4, 1), st.floats(0, 1e-3), st.floats(0, 1e-5)),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 10**5)), min_size=1, max_size=12, unique=True),
)
def test_points_of_the_model_are_fitted(factors, work):
    cost = BucketCost(tokens=32, rows=8, base_s=factors[0], by_context_s=factors[1], by_pair_s=factors[2])
    points = [Point(work=w, seconds=cost.seconds(w)) for w in (Work(context=c, pairs=p) for c, p in work)]
    fitted = fit_bucket(Bucket(tokens=32, rows=8), points)
    assert fitted.worst_error < 1e-3
    assert min(fitted.base_s, fitted.by_context_s, fitted.by_pair_s) >= 0


@given(st.lists(st.tuples(st.integers(0, 100), st.floats(1e-3, 10)), min_size=1, max_size=10))
def test_no_fit_is_negative_or_worse_than_none(points):
    columns = [[1.0, float(x)] for x, _ in points]
    seconds = [y for _, y in points]
    factors = fit(columns, seconds)
    assert min(factors) >= 0
    errors = np.array(columns) @ np.array(factors) / np.array(seconds) - 1
    alone = fit([[1.0]] * len(points), seconds)[0]
    assert (errors**2).sum() <= ((alone / np.array(seconds) - 1) ** 2).sum() + 1e-9


def test_a_bucket_without_points_is_refused():
    with pytest.raises(ValueError, match="was not measured"):
        fit_bucket(Bucket(tokens=2, rows=2), [])


def test_a_transfer_has_a_fixed_part_and_a_rate():
    assert TransferCost(fixed_s=0.5, bytes_per_s=100, message_s=1).seconds(50) == 1.0


def test_a_table_survives_its_file(tmp_path):
    path = tmp_path / "costs.json"
    points = (Point(work=Work(context=3, pairs=0), seconds=0.5),)
    written = table()
    written = replace(
        written, buckets=(replace(written.buckets[0], points=points), *written.buckets[1:]), http=None
    )
    write_table(path, written)
    assert read_table(path) == written


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": "jaxserve-step-costs-0"}, "unknown format"),
        ({"host_s": -1}, "Expected `float` >= 0"),
        ({"host_s": "1"}, "Expected `float`, got `str`"),
        ({"buckets": []}, "no bucket holds a step of 64 tokens in 4 rows"),
        ({"machine": None}, "Expected `object`, got `null`"),
        ({"transfer": {"fixed_s": 0, "bytes_per_s": 0, "message_s": 0}}, "Expected `float` > 0"),
    ],
)
def test_a_bad_table_is_refused_in_one_line(tmp_path, change, complaint):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(msgspec.to_builtins(table()) | change))
    with pytest.raises(CostError, match=complaint) as caught:
        read_table(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_tables_are_refused(tmp_path):
    path = tmp_path / "costs.json"
    with pytest.raises(CostError, match="No such file"):
        read_table(path)
    for content in ("", "{", "[]", "\0", "[" * 5000):
        path.write_text(content)
        with pytest.raises(CostError, match="no table of step costs"):
            read_table(path)
    with pytest.raises(CostError, match="No such file"):
        write_table(tmp_path / "nowhere" / "costs.json", table())
    twice = table().buckets
    with pytest.raises(ValueError, match="appears twice"):
        replace(table(), buckets=(*twice, twice[0]))
