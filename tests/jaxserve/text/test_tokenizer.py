"""Ids against goldens, against a slow twin, and against the hash of the original's ids."""

import hashlib
import json
import threading
import time
from pathlib import Path

import pytest
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.text import Tokenizer
from tests.jaxserve.text.corpus import NASTY
from tests.jaxserve.text.slow_bpe import SlowByteBpe

GOLDENS = json.loads(
    (Path(__file__).parent / "goldens" / "smollm2_tokenizer.json").read_text(encoding="utf-8")
)

# SHA-256 of the ids that the original SmolLM tokenizer gives to the converters' check text: the value by
# which llama.cpp's conversion script recognises this tokenizer (convert_hf_to_gguf_update.py).
ORIGINAL_HASH = "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249"

# Control characters that occur so rarely that the vocabulary has no piece for them; the original drops them.
UNKNOWN_TO_SMOLLM = "\x04\x06\x13\x14\x16\x1d"

AWKWARD = st.text(
    alphabet=st.one_of(
        st.sampled_from(
            " \t\r\n'0123456789.,!?abcxyz\u00e9\u0301\u200d\u4f60\u2581\U0001f600\u3000\u2028<|>"
        ),
        st.characters(min_codepoint=1, max_codepoint=0x2FFF, exclude_categories=["Cn", "Cs"]),
    ),
    max_size=60,
)


@pytest.fixture(scope="module")
def slow(smollm2_reader: GGUFReader) -> SlowByteBpe:
    pieces = smollm2_reader.fields["tokenizer.ggml.tokens"].contents()
    merges = smollm2_reader.fields["tokenizer.ggml.merges"].contents()
    return SlowByteBpe(pieces, merges, special=pieces[:17])


@pytest.mark.golden
@pytest.mark.parametrize("name", NASTY)
def test_ids_equal_the_goldens(smollm2: Tokenizer, name: str) -> None:
    assert smollm2.encode(NASTY[name]) == GOLDENS["ids"][name]


def test_the_goldens_cover_the_corpus_and_show_the_digit_split() -> None:
    assert GOLDENS["ids"].keys() == NASTY.keys()
    assert "spaces before digits" in GOLDENS["differ_without_the_digit_split"]


@pytest.mark.parametrize("name", NASTY)
def test_ids_equal_the_slow_twin(smollm2: Tokenizer, slow: SlowByteBpe, name: str) -> None:
    assert smollm2.encode(NASTY[name]) == slow.encode(NASTY[name])


@settings(deadline=None, max_examples=300)
@given(text=AWKWARD)
def test_ids_of_any_text_equal_the_slow_twin(smollm2: Tokenizer, slow: SlowByteBpe, text: str) -> None:
    assert smollm2.encode(text) == slow.encode(text)


def test_ids_of_the_check_text_have_the_originals_hash(smollm2: Tokenizer) -> None:
    ids = smollm2.encode(NASTY["check text of converters"])
    assert hashlib.sha256(str(ids).encode()).hexdigest() == ORIGINAL_HASH


@pytest.mark.parametrize("name", NASTY)
def test_decoding_gives_the_text_back(smollm2: Tokenizer, name: str) -> None:
    without_pieces = str.maketrans("", "", UNKNOWN_TO_SMOLLM)
    whole = smollm2.decode(smollm2.encode(NASTY[name]), skip_special_tokens=False)
    assert whole == NASTY[name].translate(without_pieces)


@pytest.mark.parametrize(
    "unit",
    ["x", " ", "\n", "1", "a ", "'", "\u00e9", "\u0301", "\U0001f600", " \n", "<|im_start|>", "<|", "\r"],
)
def test_fifty_thousand_of_one_thing_take_under_a_second(smollm2: Tokenizer, unit: str) -> None:
    text = unit * (50_000 // len(unit))
    begin = time.perf_counter()
    ids = smollm2.encode(text)
    assert time.perf_counter() - begin < 1.0
    assert smollm2.decode(ids, skip_special_tokens=False) == text


def test_special_tokens(smollm2: Tokenizer) -> None:
    assert smollm2.special_ids == frozenset(range(17))
    assert smollm2.bos_token_id == 1
    assert smollm2.eos_token_ids == (2,)
    assert smollm2.vocab_size == 49152
    assert smollm2.special_tokens["eos_token"] == "<|im_end|>"
    assert smollm2.encode("<|im_start|>") == [1]
    assert smollm2.decode([1, 19556, 2]) == smollm2.decode([19556])
    assert smollm2.decode([1, 19556, 2], skip_special_tokens=False).startswith("<|im_start|>")
    assert smollm2.chat_template is not None
    assert "add_generation_prompt" in smollm2.chat_template


def test_tokens_as_text_and_bytes(smollm2: Tokenizer) -> None:
    ids = smollm2.encode(" Hello \U0001f999")
    assert b"".join(smollm2.token_bytes(i) for i in ids) == " Hello \U0001f999".encode()
    assert smollm2.token(ids[0]) == " Hello"
    assert smollm2.token(ids[-1]) == "\ufffd"
    assert smollm2.token(2) == "<|im_end|>"
    assert smollm2.token_bytes(-1) == smollm2.token_bytes(49152) == b""
    assert smollm2.decode([-1, 49152, ids[0]]) == " Hello"


def test_lone_surrogates_become_replacement_characters(smollm2: Tokenizer) -> None:
    assert smollm2.encode("a\ud83db\udc00") == smollm2.encode("a\ufffdb\ufffd")
    assert smollm2.encode("\ud83d\ude00") == smollm2.encode("\U0001f600")
    assert smollm2.decode(smollm2.encode("\ufeffa")) == "\ufeffa"


def test_threads_do_not_disturb_each_other(smollm2: Tokenizer) -> None:
    wrong: list[str] = []

    def work() -> None:
        wrong.extend(n for n, t in NASTY.items() for _ in range(3) if smollm2.encode(t) != GOLDENS["ids"][n])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@settings(deadline=None, max_examples=300)
@given(ids=st.lists(st.integers(0, 49151), max_size=40), skip=st.booleans())
def test_decoding_any_ids_equals_the_library(smollm2: Tokenizer, ids: list[int], skip: bool) -> None:
    assert smollm2.decode(ids, skip) == smollm2._vocab.backend.decode(ids, skip_special_tokens=skip)
