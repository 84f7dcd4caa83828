"""Tokenizer files of a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from jaxserve.text import Tokenizer
from tests.jaxserve.text.corpus import NASTY


@pytest.fixture
def folder(tiny_spm: Tokenizer, tmp_path: Path) -> Path:
    tiny_spm.save(tmp_path)
    return tmp_path


def change(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    value = {key: item for key, item in (value | changes).items() if item is not None}
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.mark.parametrize("name", ["smollm2", "tiny_spm"])
def test_saving_keeps_everything(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    saved: Tokenizer = request.getfixturevalue(name)
    saved.save(tmp_path / "new" / "folder")
    read = Tokenizer.from_hf_folder(tmp_path / "new" / "folder")
    for text in NASTY.values():
        assert read.encode(text) == saved.encode(text)
    assert [read.token_bytes(i) for i in range(read.vocab_size)] == [
        saved.token_bytes(i) for i in range(saved.vocab_size)
    ]
    for fact in (
        "bos_token_id",
        "eos_token_ids",
        "chat_template",
        "special_ids",
        "special_tokens",
        "vocab_size",
    ):
        assert getattr(read, fact) == getattr(saved, fact), fact
    assert read.decode(read.encode(" hello")) == saved.decode(saved.encode(" hello"))


def test_ends_of_an_answer_come_from_three_files(folder: Path) -> None:
    change(folder / "generation_config.json", eos_token_id=[2, 5])
    assert Tokenizer.from_hf_folder(folder).eos_token_ids == (2, 5)
    change(folder / "generation_config.json", eos_token_id=7)
    assert Tokenizer.from_hf_folder(folder).eos_token_ids == (2, 7)
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", eos_token_id=[9])
    assert Tokenizer.from_hf_folder(folder).eos_token_ids == (2, 9)
    change(folder / "tokenizer_config.json", eos_token=None, eos_token_ids=None)
    assert Tokenizer.from_hf_folder(folder).eos_token_ids == (9,)


def test_special_tokens_as_text_or_object_and_from_the_map(folder: Path) -> None:
    change(folder / "tokenizer_config.json", bos_token={"content": "<s>", "lstrip": False}, unk_token=None)
    change(folder / "special_tokens_map.json", unk_token={"content": "<unk>"}, bos_token="</s>")
    read = Tokenizer.from_hf_folder(folder)
    assert read.bos_token_id == 1
    assert dict(read.special_tokens) == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_tokens_that_only_the_configuration_has(folder: Path, tiny_spm: Tokenizer) -> None:
    n = tiny_spm.vocab_size
    extra = {
        str(n): {"content": "<extra>", "special": True},
        str(n + 1): {"content": "word up", "special": False, "normalized": False},
    }
    change(folder / "tokenizer_config.json", added_tokens_decoder=extra, additional_special_tokens=["<tool>"])
    read = Tokenizer.from_hf_folder(folder)
    assert read.encode("<extra>word up<tool>", add_special_tokens=False) == [n, n + 1, n - 1]
    assert read.special_ids == tiny_spm.special_ids | {n, n - 1}
    assert read.decode([n, n + 1]) == "word up"
    extra[str(n + 7)] = {"content": "<gap>", "special": True}
    change(folder / "tokenizer_config.json", added_tokens_decoder=extra)
    with pytest.raises(ValueError, match="<gap>"):
        Tokenizer.from_hf_folder(folder)


def test_where_the_chat_template_comes_from(folder: Path) -> None:
    config = folder / "tokenizer_config.json"
    named = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    change(config, chat_template=named)
    assert Tokenizer.from_hf_folder(folder).chat_template == "D"
    change(config, chat_template=named[:1])
    assert Tokenizer.from_hf_folder(folder).chat_template == "R"
    change(config, chat_template=None)
    assert Tokenizer.from_hf_folder(folder).chat_template is None
    (folder / "chat_template.jinja").write_text("J\u4f60", encoding="utf-8")
    change(config, chat_template="C")
    assert Tokenizer.from_hf_folder(folder).chat_template == "J\u4f60"


def test_truncation_and_padding_in_the_file_are_ignored(folder: Path) -> None:
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=64, pad_id=0)
    backend.save(str(folder / "tokenizer.json"))
    read = Tokenizer.from_hf_folder(folder)
    assert len(read.encode("a b c d e")) > 3
    assert len(read.encode("a")) < 64


def test_wrong_folders_are_refused(folder: Path) -> None:
    change(folder / "tokenizer_config.json", added_tokens_decoder={"1": "x"})
    with pytest.raises(ValueError, match="malformed"):
        Tokenizer.from_hf_folder(folder)
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="JSON object"):
        Tokenizer.from_hf_folder(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        Tokenizer.from_hf_folder(folder)
    (folder / "tokenizer_config.json").unlink()
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="WordPiece is not supported"):
        Tokenizer.from_hf_folder(folder)
    (folder / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(ValueError, match="not a tokenizer"):
        Tokenizer.from_hf_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_hf_folder(folder)
