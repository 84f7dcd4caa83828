"""What the page digest must notice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.digest import DIGEST_BYTES, digest_rows

PAGE_BYTES = 256


def page(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (1, PAGE_BYTES), dtype=np.uint8)


def slow(row: np.ndarray) -> bytes:
    """The definition, word by word, in integers of any size."""
    mask = (1 << 64) - 1
    first = 0
    for index, word in enumerate(row.view("<u4").tolist(), 1):
        state = index * 0x9E3779B97F4A7C15 & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        first += word * ((state ^ state >> 31) | 1)
    second = sum(row.view("<u8").tolist())
    return (first & mask).to_bytes(8, "little") + (second & mask).to_bytes(8, "little")


@given(seed=st.integers(0, 1000))
def test_it_is_what_the_definition_says(seed: int) -> None:
    rows = page(seed)
    assert digest_rows(rows) == [slow(rows[0])]
    assert len(digest_rows(rows)[0]) == DIGEST_BYTES


@given(seed=st.integers(0, 100), bit=st.integers(0, PAGE_BYTES * 8 - 1))
def test_every_flipped_bit_shows(seed: int, bit: int) -> None:
    rows = page(seed)
    before = digest_rows(rows)
    rows[0, bit // 8] ^= 1 << bit % 8
    assert digest_rows(rows) != before


@given(seed=st.integers(0, 100), bits=st.sets(st.integers(0, PAGE_BYTES * 8 - 1), min_size=2, max_size=6))
def test_several_flipped_bits_show(seed: int, bits: set[int]) -> None:
    rows = page(seed)
    before = digest_rows(rows)
    for bit in bits:
        rows[0, bit // 8] ^= 1 << bit % 8
    assert digest_rows(rows) != before


def test_two_flipped_signs_show() -> None:
    """Top bits are what a sum modulo 2^64 of whole words would lose in pairs."""
    for first in range(0, PAGE_BYTES // 8):
        for second in range(first):
            rows = page(1)
            before = digest_rows(rows)
            rows[0, first * 8 + 7] ^= 0x80
            rows[0, second * 8 + 7] ^= 0x80
            assert digest_rows(rows) != before


@given(
    seed=st.integers(0, 100),
    first=st.integers(0, PAGE_BYTES // 2 - 1),
    second=st.integers(0, PAGE_BYTES // 2 - 1),
)
def test_swapped_elements_show(seed: int, first: int, second: int) -> None:
    rows = page(seed)
    words = rows[0].view(np.uint16)
    if words[first] == words[second]:
        return
    before = digest_rows(rows)
    words[[first, second]] = words[[second, first]]
    assert digest_rows(rows) != before


@given(seed=st.integers(0, 100), split=st.integers(1, PAGE_BYTES - 1))
def test_a_mix_of_two_pages_and_a_zeroed_rest_show(seed: int, split: int) -> None:
    old, new = page(seed), page(seed + 1)
    mix, cut = old.copy(), old.copy()
    mix[0, split:] = new[0, split:]
    cut[0, split:] = 0
    digests = digest_rows(np.concatenate([old, new, mix, cut]))
    assert len({*digests, *digest_rows(np.zeros_like(old))}) == 5 or (
        # Random bytes may end as the other page does, or with zeros.
        np.array_equal(mix, old) or np.array_equal(cut, old) or np.array_equal(mix, cut)
    )


def test_rows_of_another_kind_are_refused() -> None:
    for rows in (np.zeros((1, 12), np.uint8), np.zeros((1, 8), np.uint16), np.zeros(8, np.uint8)):
        with pytest.raises(ValueError, match="pages must be"):
            digest_rows(rows)
