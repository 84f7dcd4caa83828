"""A plan's rows survive packing, upload and unpacking: compared with loops over rows."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.batch import Bucket, choose, decode_buckets, mixed_buckets, pack, packed_size, unpack
from scheduler.types import Rows

PAGE, MAX_PAGES, DUMMY_SLOT = 4, 8, 6


def rows_of(shapes: list[tuple[int, int]]) -> Rows:
    """Rows of (start, length) with distinct pages."""
    starts = np.array([start for start, _ in shapes], np.int32)
    lens = np.array([count for _, count in shapes], np.int32)
    used = int((-(-(starts + lens) // PAGE)).max(initial=0))
    table = np.zeros((len(shapes), used), np.int32)
    for row in range(len(shapes)):
        held = -(-int(starts[row] + lens[row]) // PAGE)
        table[row, :held] = 1 + row * MAX_PAGES + np.arange(held)
    return Rows(
        slots=np.arange(len(shapes), dtype=np.int32)[::-1].copy(),
        starts=starts,
        lens=lens,
        samples=np.arange(len(shapes)) % 2 == 0,
        num_outputs=np.arange(len(shapes), dtype=np.int32) * 3,
        tokens=np.arange(100, 100 + int(lens.sum()), dtype=np.int32),
        page_tables=(table,),
    )


shapes = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_unpack_gives_what_the_rows_say(shape):
    rows, bucket = rows_of(shape), Bucket(tokens=64, rows=6)
    packed = pack(rows, bucket, max_pages=MAX_PAGES, dummy_slot=DUMMY_SLOT)
    assert packed.shape == (packed_size(bucket, MAX_PAGES),)
    batch = jax.tree.map(np.asarray, unpack(packed, bucket, max_pages=MAX_PAGES, page_size=PAGE))
    place = 0
    for row, (start, count) in enumerate(shape):
        assert batch.cu_q_lens[row] == place
        assert batch.kv_lens[row] == start + count
        assert batch.last_tokens[row] == place + count - 1
        for offset in range(count):
            position = start + offset
            assert batch.tokens[place] == 100 + place
            assert batch.positions[place] == position
            assert batch.token_pages[place] == rows.page_tables[0][row, position // PAGE]
            assert batch.token_offsets[place] == position % PAGE
            place += 1
    live = len(shape)
    assert (batch.cu_q_lens[live:] == place).all()
    assert (batch.token_pages[place:] == 0).all(), "padding tokens write the dummy page"
    assert (batch.slots[live:] == DUMMY_SLOT).all() and not batch.samples[live:].any()
    assert (batch.kv_lens[live:] == 0).all() and (batch.page_table[live:] == 0).all()
    assert batch.slots[:live].tolist() == rows.slots.tolist()
    assert batch.samples[:live].tolist() == rows.samples.tolist()
    assert batch.num_outputs[:live].tolist() == rows.num_outputs.tolist()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 70), st.integers(1, 600), st.data())
def test_every_possible_step_has_a_bucket(seqs, budget, data):
    budget = max(seqs, budget)
    buckets = decode_buckets(seqs) + mixed_buckets(budget, seqs)
    assert len(buckets) == len(set(buckets)) and len(buckets) < 24
    live = data.draw(st.integers(1, seqs))
    extra = data.draw(st.integers(0, budget - live))
    lens = np.ones(live, np.int32)
    lens[-1] += extra
    rows = rows_of([(0, 1)] * live)
    total = int(lens.sum())
    step = Rows(
        slots=rows.slots, starts=rows.starts, lens=lens, samples=rows.samples, num_outputs=rows.num_outputs,
        tokens=np.zeros(total, np.int32), page_tables=rows.page_tables,
    )  # fmt: skip
    bucket = choose(buckets, step)
    assert bucket.tokens >= total and bucket.rows >= live
    assert bucket.tokens > bucket.rows or total == live, "a shape of decodes only cannot hold a chunk"


def test_rows_that_fit_nothing_are_refused():
    rows = rows_of([(0, 9)])
    with pytest.raises(ValueError, match="no bucket"):
        choose([Bucket(tokens=4, rows=4)], rows)
    with pytest.raises(ValueError, match="do not fit"):
        pack(rows, Bucket(tokens=8, rows=1), max_pages=MAX_PAGES, dummy_slot=0)
