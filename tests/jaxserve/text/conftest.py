"""The two vocabularies of these tests: the default model's, and a tiny SentencePiece one."""

from pathlib import Path

import pytest
from gguf import GGUFReader

from jaxserve.text import Tokenizer
from tests.jaxserve.text.tiny_spm import write_tiny_spm


@pytest.fixture(scope="session")
def smollm2_reader(smollm2_path: Path) -> GGUFReader:
    return GGUFReader(smollm2_path)


@pytest.fixture(scope="session")
def smollm2(smollm2_reader: GGUFReader) -> Tokenizer:
    return Tokenizer.from_gguf(smollm2_reader)


@pytest.fixture(scope="session")
def tiny_spm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_gguf(write_tiny_spm(tmp_path_factory.mktemp("spm") / "tiny.gguf"))
