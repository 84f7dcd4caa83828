"""What lies beside the weights: sampling defaults that are good, odd or senseless."""

import json

import pytest

from jaxserve import ConfigError
from jaxserve.assemble import sampling_defaults
from jaxserve.weights.source import ModelSource


def source(tmp_path, text: str | None, kind="hf") -> ModelSource:
    if text is not None:
        (tmp_path / "generation_config.json").write_text(text)
    return ModelSource(kind=kind, path=tmp_path, name="x")


def test_known_numbers_become_defaults_and_the_rest_is_left(tmp_path):
    text = json.dumps(
        {
            "temperature": 0.6,
            "top_p": 0.9,
            "top_k": 20,
            "max_new_tokens": 64,
            "do_sample": True,
            "eos_token_id": [1],
        }
    )
    assert sampling_defaults(source(tmp_path, text)) == {
        "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_tokens": 64,
    }  # fmt: skip


@pytest.mark.parametrize("text", ['{"top_p": 0}', '{"temperature": -1}', "{", "[]", '{"max_new_tokens": 0}'])
def test_a_senseless_file_is_named(tmp_path, text):
    with pytest.raises(ConfigError, match="generation_config"):
        sampling_defaults(source(tmp_path, text))


def test_without_a_file_there_are_none(tmp_path):
    assert sampling_defaults(source(tmp_path, None)) == {}
    assert sampling_defaults(source(tmp_path, '{"top_p": 0.5}', kind="gguf")) == {}
