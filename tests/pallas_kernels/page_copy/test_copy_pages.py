"""Pages are copied whole, and read before any is written."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.page_copy import copy_pages

PAGES, PAIRS = 9, 5


@settings(deadline=None, max_examples=30)
@given(
    src=st.lists(st.integers(1, PAGES - 1), min_size=PAIRS, max_size=PAIRS),
    dst=st.lists(st.integers(1, PAGES - 1), max_size=PAIRS, unique=True),
)
def test_copies_are_read_before_any_is_written(src: list[int], dst: list[int]) -> None:
    before = np.random.default_rng(0).integers(0, 2**16, (PAGES, 2, 2, 1, 4, 8), np.uint16)
    pairs = list(zip(src, dst, strict=False))
    padded = np.array([*pairs, *[(0, 0)] * (PAIRS - len(pairs))], np.int32)
    after = copy_pages(jnp.asarray(before), jnp.asarray(padded[:, 0]), jnp.asarray(padded[:, 1]))
    expected = before.copy()
    for source, target in pairs:
        expected[target] = before[source]
    np.testing.assert_array_equal(after, expected)


def test_pairs_of_different_counts_are_refused() -> None:
    pages = jnp.zeros((PAGES, 2), jnp.uint16)
    with pytest.raises(ValueError, match="src and dst must be"):
        copy_pages(pages, jnp.zeros(2, jnp.int32), jnp.zeros(3, jnp.int32))
