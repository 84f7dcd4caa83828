"""Streamed text against the text of all ids."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.text import Detokenizer, Tokenizer
from tests.jaxserve.text.corpus import NASTY

CUTS = st.lists(st.integers(1, 5), min_size=1, max_size=8)
SMOLLM_IDS = st.lists(st.one_of(st.integers(0, 300), st.integers(0, 49151)), max_size=60)
SPM_IDS = st.lists(st.integers(0, 325), max_size=60)


def pushes(ids: list[int], cuts: list[int]) -> list[list[int]]:
    chunks, i, n = [], 0, 0
    while i < len(ids):
        size = cuts[n % len(cuts)]
        chunks.append(ids[i : i + size])
        i, n = i + size, n + 1
    return chunks


def check_stream(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool) -> None:
    whole = tokenizer.decode(ids, skip)
    stream = Detokenizer(tokenizer, skip_special_tokens=skip)
    text = ""
    for chunk in pushes(ids, cuts):
        text += stream.push(chunk)
        assert whole.startswith(text)
    assert text + stream.flush() == whole


@settings(deadline=None, max_examples=400)
@given(ids=SMOLLM_IDS, cuts=CUTS, skip=st.booleans())
def test_byte_level_stream_equals_decode(
    smollm2: Tokenizer, ids: list[int], cuts: list[int], skip: bool
) -> None:
    check_stream(smollm2, ids, cuts, skip)


@settings(deadline=None, max_examples=400)
@given(ids=SPM_IDS, cuts=CUTS, skip=st.booleans())
def test_sentencepiece_stream_equals_decode(
    tiny_spm: Tokenizer, ids: list[int], cuts: list[int], skip: bool
) -> None:
    check_stream(tiny_spm, ids, cuts, skip)


@settings(deadline=None, max_examples=200)
@given(prompt=SMOLLM_IDS, ids=SMOLLM_IDS, skip=st.booleans())
def test_after_a_prompt_the_stream_goes_on_where_its_text_ends(
    smollm2: Tokenizer, prompt: list[int], ids: list[int], skip: bool
) -> None:
    before = Detokenizer(smollm2, skip_special_tokens=skip).push(prompt)
    stream = Detokenizer(smollm2, prompt=prompt, skip_special_tokens=skip)
    assert before + stream.push(ids) + stream.flush() == smollm2.decode(prompt + ids, skip)


@settings(deadline=None, max_examples=200)
@given(prompt=SPM_IDS, ids=SPM_IDS, skip=st.booleans())
def test_after_a_sentencepiece_prompt(
    tiny_spm: Tokenizer, prompt: list[int], ids: list[int], skip: bool
) -> None:
    before = Detokenizer(tiny_spm, skip_special_tokens=skip).push(prompt)
    stream = Detokenizer(tiny_spm, prompt=prompt, skip_special_tokens=skip)
    assert before + stream.push(ids) + stream.flush() == tiny_spm.decode(prompt + ids, skip)


@pytest.mark.parametrize("name", NASTY)
def test_real_text_one_token_at_a_time(smollm2: Tokenizer, name: str) -> None:
    check_stream(smollm2, smollm2.encode(NASTY[name]), [1], skip=False)


def test_a_character_waits_for_its_last_byte(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("\U0001f999")
    stream = Detokenizer(smollm2)
    assert [stream.push([i]) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.push(ids[-1:]) == "\U0001f999"
    assert stream.push(ids[:1]) == ""
    assert stream.flush() == "\ufffd"


def test_the_first_space_is_dropped_only_at_the_start_of_the_text(tiny_spm: Tokenizer) -> None:
    hello = tiny_spm.encode("hello", add_special_tokens=False)
    assert Detokenizer(tiny_spm).push(hello) == "hello"
    assert Detokenizer(tiny_spm, prompt=[1]).push(hello) == "hello"
    assert Detokenizer(tiny_spm, prompt=[1], skip_special_tokens=False).push(hello) == " hello"
    assert Detokenizer(tiny_spm, prompt=hello).push(hello) == " hello"


def test_cost_per_token_does_not_grow(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("streams of text " * 20_000)
    stream = Detokenizer(smollm2, prompt=ids)
    begin = time.perf_counter()
    count = sum(len(stream.push([i])) for i in ids)
    assert count == 16 * 20_000
    assert time.perf_counter() - begin < 2.0
