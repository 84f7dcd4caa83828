"""SentencePiece vocabularies, and files that are wrong."""

from pathlib import Path

import pytest
from gguf import GGUFWriter, TokenType
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.text import Tokenizer
from tests.jaxserve.text.corpus import NASTY
from tests.jaxserve.text.slow_bpe import SlowSentencePiece, byte_characters
from tests.jaxserve.text.tiny_spm import tiny_vocab, write_tiny_spm

SPM_TEXT = st.text(alphabet="helo wrdaint\u4f60\u597d\u0301\u00e9\n \U0001f600\u2581<s>/", max_size=40)


def slow_spm(prefix: bool) -> SlowSentencePiece:
    vocab = tiny_vocab()
    return SlowSentencePiece(
        vocab.pieces, vocab.scores, special=("<unk>", "<s>", "</s>", "<tool>"), prefix=prefix
    )


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("name", [name for name in NASTY if name not in ("code", "runs")])
def test_sentencepiece_ids_equal_the_slow_twin(tmp_path: Path, prefix: bool, name: str) -> None:
    tokenizer = Tokenizer.from_gguf(write_tiny_spm(tmp_path / "tiny.gguf", add_space_prefix=prefix))
    text = NASTY[name]
    ids = slow_spm(prefix).encode(text)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.encode(text) == [1, *ids]


@settings(deadline=None, max_examples=300)
@given(text=SPM_TEXT)
def test_sentencepiece_ids_of_any_text(tiny_spm: Tokenizer, text: str) -> None:
    assert tiny_spm.encode(text, add_special_tokens=False) == slow_spm(prefix=True).encode(text)


def test_sentencepiece_facts(tiny_spm: Tokenizer, tmp_path: Path) -> None:
    assert tiny_spm.special_ids == frozenset({0, 1, 2})
    assert tiny_spm.eos_token_ids == (2,)
    assert tiny_spm.decode(tiny_spm.encode("hello world")) == "hello world"
    assert tiny_spm.decode(tiny_spm.encode("  hello")) == "  hello"
    assert tiny_spm.decode(tiny_spm.encode("<s>hello"), skip_special_tokens=False) == "<s><s> hello"
    assert tiny_spm.token(tiny_spm.encode("hello")[1]) == " hello"
    assert tiny_spm.token_bytes(3 + 0xE4) == b"\xe4"
    assert tiny_spm.decode([3 + 0xF0, 3 + 0x9F, 3 + 0x98, 3 + 0x80, 3 + 0xFF]) == "\U0001f600\ufffd"
    wrapped = Tokenizer.from_gguf(write_tiny_spm(tmp_path / "eos.gguf", add_bos=False, add_eos=True))
    assert wrapped.encode("hello")[-1] == 2
    assert wrapped.encode("hello", add_special_tokens=False)[-1] != 2


def write_bytes_vocab(path: Path, **changes: object) -> Path:
    """A byte-level vocabulary of 256 bytes, one merge and two control tokens, with some keys changed."""
    pieces = [*byte_characters().values(), "ab", "<bos>", "<eot>"]
    keys = {
        "model": "gpt2", "pre": "gpt-2", "pieces": pieces, "merges": ["a b"], "bos": 257,
        "eos": 258, "eot": 258, "types": [TokenType.NORMAL] * 257 + [TokenType.CONTROL] * 2,
    } | changes  # fmt: skip
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(keys["model"])
    if keys["pre"] is not None:
        writer.add_tokenizer_pre(keys["pre"])
    if keys["pieces"] is not None:
        writer.add_token_list(keys["pieces"])
    writer.add_token_merges(keys["merges"])
    writer.add_token_types(keys["types"])
    writer.add_bos_token_id(keys["bos"])
    writer.add_eos_token_id(keys["eos"])
    writer.add_eot_token_id(keys["eot"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


WORDS = {
    "gpt-2": ["a", "  ", " 123", " I", "'m", "\n ", " xDON", "'", "T", " \r", "\n", "e", "\u0301"],
    "smollm": ["a", "   ", "1", "2", "3", " I", "'m", "\n ", " xDON", "'", "T", " \r", "\n", "e", "\u0301"],
    "llama-bpe": ["a", "  ", " ", "123", " I", "'m", "\n", " ", " xDON", "'T", " \r\n", "e", "\u0301"],
    "qwen2": ["a", "  ", " ", "1", "2", "3", " I", "'m", "\n", " ", " xDON", "'T", " \r\n", "\u00e9"],
    "tekken": ["a", "  ", " ", "1", "2", "3", " I", "'m", "\n", " ", " x", "DON", "'T", " \r\n", "e\u0301"],
}


@pytest.mark.parametrize("name", WORDS)
def test_words_of_each_pretokenizer(tmp_path: Path, name: str) -> None:
    tokenizer = Tokenizer.from_gguf(write_bytes_vocab(tmp_path / "v.gguf", pre=name))
    backend = tokenizer._vocab.backend
    text = "a   123 I'm\n  xDON'T \r\ne\u0301"
    normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
    words = [normal[begin:end] for _, (begin, end) in backend.pre_tokenizer.pre_tokenize_str(normal)]
    assert words == WORDS[name]


def test_begin_tokens_and_ends_of_an_answer(tmp_path: Path) -> None:
    plain = Tokenizer.from_gguf(write_bytes_vocab(tmp_path / "gpt.gguf", eos=257))
    assert plain.encode("ab") == [256]
    assert plain.eos_token_ids == (257, 258)
    llama3 = Tokenizer.from_gguf(write_bytes_vocab(tmp_path / "llama.gguf", pre="llama-bpe"))
    assert llama3.encode("ab") == [257, 256]
    assert llama3.encode("ab", add_special_tokens=False) == [256]
    assert llama3.eos_token_ids == (258,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "klingon"}, "pre-tokenizer 'klingon' is not supported"),
        ({"model": "bert"}, "tokenizer model 'bert' is not supported"),
        ({"pieces": None}, "no vocabulary"),
        ({"types": [TokenType.NORMAL]}, "259 tokens but 1 token types"),
        ({"merges": ["a q z"]}, "outside the vocabulary"),
        ({"merges": ["ab"]}, "outside the vocabulary"),
        ({"eos": 999}, "eos_token_id is 999"),
        ({"pieces": [*byte_characters().values(), "ab", "<eot>", "<eot>"]}, "same token twice"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_gguf(write_bytes_vocab(tmp_path / "v.gguf", **changes))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Tokenizer.from_gguf(tmp_path / "none.gguf")
