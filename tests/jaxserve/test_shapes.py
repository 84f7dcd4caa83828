"""The compile plan: it holds every shape that can be asked for, and says what padding costs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.batch import choose
from jaxserve.shapes import (
    LOGPROBS_SHAPE,
    buckets_of,
    compile_plan,
    histories,
    rows_shape,
    slot_shape,
    step_shape,
    waste_of,
)
from scheduler.types import Rows


def rows_of(lens: list[int]) -> Rows:
    count = len(lens)
    return Rows(
        slots=np.arange(count, dtype=np.int32),
        starts=np.zeros(count, np.int32),
        lens=np.array(lens, np.int32),
        samples=np.ones(count, bool),
        num_outputs=np.zeros(count, np.int32),
        tokens=np.zeros(sum(lens), np.int32),
        page_tables=(np.zeros((count, 1), np.int32),),
    )


sizes = st.tuples(st.integers(1, 40), st.integers(0, 120)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(sizes, st.data())
def test_every_batch_within_the_limits_has_a_shape_in_the_plan(size, data):
    seqs, tokens = size
    buckets = buckets_of(seqs, tokens)
    lens, left = [], tokens
    for row in range(data.draw(st.integers(1, seqs))):
        longest = left - (seqs - row - 1)
        lens.append(data.draw(st.integers(1, max(1, min(longest, 9)))))
        left -= lens[-1]
    plan = compile_plan(buckets, 100)
    bucket = choose(buckets, rows_of(lens))
    assert step_shape(bucket) in plan and step_shape(bucket).bucket == bucket
    assert rows_shape(bucket.tokens) in plan and LOGPROBS_SHAPE in plan


@given(sizes)
def test_a_deterministic_engine_has_one_shape_of_step_that_holds_every_batch(size):
    seqs, tokens = size
    [bucket] = buckets_of(seqs, tokens, deterministic=True)
    assert bucket.tokens >= tokens and bucket.rows >= seqs
    for lens in ([1], [1] * seqs, [tokens - seqs + 1, *[1] * (seqs - 1)]):
        assert choose([bucket], rows_of(lens)) == bucket
    assert step_shape(bucket) in compile_plan([bucket], 100)


@given(st.integers(1, 200_000), st.data())
def test_every_history_of_a_sequence_has_a_shape_in_the_plan(longest, data):
    plan = compile_plan(buckets_of(4, 32), longest)
    count = data.draw(st.integers(1, longest))
    shape = slot_shape(count, longest)
    assert shape in plan and shape.tokens >= count
    assert len(histories(longest)) <= 6, "few programs, whatever the model's context"
    assert histories(longest) == sorted(set(histories(longest)))


@pytest.mark.parametrize(("seqs", "tokens"), [(1, 8), (4, 16), (10, 40), (12, 130)])
def test_waste_is_that_of_the_batches_which_choose_the_bucket(seqs, tokens):
    """Compared with every batch that there is: so many rows, the first one as long as needed."""
    buckets = buckets_of(seqs, tokens)
    chosen: dict[object, set[int]] = {}
    for rows in range(1, seqs + 1):
        for first in range(1, tokens - rows + 2):
            batch = rows_of([first] + [1] * (rows - 1))
            chosen.setdefault(choose(buckets, batch), set()).add(len(batch.tokens))
    for bucket in buckets:
        if bucket not in chosen:
            continue
        wasted = waste_of(bucket, buckets)
        assert wasted.worst == pytest.approx(1 - min(chosen[bucket]) / bucket.tokens), bucket
        assert wasted.mean <= wasted.worst
    assert waste_of(buckets[0], buckets).worst == 0.5, "two rows where one would do"


def test_a_plan_names_each_shape_once():
    plan = compile_plan(buckets_of(64, 512), 8192)
    assert len(set(plan)) == len(plan)
    assert [shape.kind for shape in plan].count("decode") == 6
