"""Configs from config.json and back; hostile numbers."""

import json
import logging
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.model.config import FactorRope, LinearRope, Llama3Rope, ModelConfig
from jaxserve.model.hf_config import config_from_hf, config_to_hf
from tests.goldens import tiny

SETTINGS = settings(deadline=None, max_examples=200)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_hf_round_trip(name: str) -> None:
    config = config_from_hf(tiny.CONFIGS[name])
    written = json.loads(json.dumps(config_to_hf(config, dtype="float32")))
    assert config_from_hf(written) == config


def test_factor_rope_round_trip() -> None:
    config = config_from_hf(tiny.CONFIGS["llama"] | {"rope_scaling": None})
    scaled = ModelConfig(
        **{field: getattr(config, field) for field in config.__slots__}
        | {"rope_scaling": FactorRope(factors=(1.0, 1.1, 2.0, 8.0))}
    )
    assert config_from_hf(json.loads(json.dumps(config_to_hf(scaled, dtype="float32")))) == scaled


def test_what_each_architecture_means() -> None:
    configs = {name: config_from_hf(values) for name, values in tiny.CONFIGS.items()}
    assert configs["llama"].rope_scaling == Llama3Rope(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    )
    assert configs["llama-linear"].rope_scaling == LinearRope(factor=4.0)
    assert configs["llama-linear"].qkv_bias and configs["llama-linear"].out_bias
    assert configs["mistral"].sliding_window == 12
    assert configs["mistral"].head_dim == 16
    assert configs["qwen2"].sliding_window is None
    assert configs["qwen2"].qkv_bias and not configs["qwen2"].out_bias
    assert configs["qwen3"].qk_norm and configs["qwen3"].rope_theta == 1e6
    assert configs["qwen3"].queries_per_kv == 4


def test_head_dim_null_or_absent() -> None:
    values = tiny.CONFIGS["llama"]
    assert config_from_hf(values | {"head_dim": None}) == config_from_hf(values)
    assert config_from_hf(values).head_dim == 8


def test_mistral_without_a_window() -> None:
    assert config_from_hf(tiny.CONFIGS["mistral"] | {"sliding_window": None}).sliding_window is None


def test_end_tokens_may_be_one_or_many() -> None:
    values = tiny.CONFIGS["llama"]
    assert config_from_hf(values | {"eos_token_id": 7}).eos_token_ids == (7,)
    assert config_from_hf(values | {"eos_token_id": [7, 9]}).eos_token_ids == (7, 9)
    assert config_from_hf(values | {"eos_token_id": None}).eos_token_ids == ()


def test_auto_map_is_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    values = tiny.CONFIGS["llama"]
    with caplog.at_level(logging.WARNING):
        config = config_from_hf(values | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}})
    assert config == config_from_hf(values)
    assert "auto_map" in caplog.text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": -8}, "num_attention_heads"),
        ({"num_key_value_heads": 0}, "num_kv_heads"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"vocab_size": 1e12}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"vocab_size": "320"}, "vocab_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 10**5000}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_layers|num_hidden_layers"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"head_dim": 7}, "head_dim"),
        ({"head_dim": 2.5}, "head_dim"),
        ({"eos_token_id": 320}, "eos_token_id"),
        ({"eos_token_id": ["x"]}, "eos_token_id"),
        ({"eos_token_id": {}}, "eos_token_id"),
        ({"bos_token_id": -1}, "bos_token_id"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": ["linear"], "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_parameters": "x"}, "rope_scaling"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"layer_types": [{}]}, "layer_types"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None, "model_type": "gpt2"}, "architectures"),
        ({"architectures": [{}]}, "architecture"),
    ],
)
def test_bad_values_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as refused:
        config_from_hf(tiny.CONFIGS["llama"] | change)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


def test_a_window_in_some_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="use_sliding_window"):
        config_from_hf(tiny.CONFIGS["qwen2"] | {"use_sliding_window": True})


@pytest.mark.parametrize("missing", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_missing_fields_are_named(missing: str) -> None:
    values = {key: value for key, value in tiny.CONFIGS["llama"].items() if key != missing}
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        config_from_hf(values)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@SETTINGS
@given(name=st.sampled_from(sorted(tiny.CONFIGS)), data=st.data())
def test_any_json_gives_a_config_or_a_value_error(name: str, data: st.DataObject) -> None:
    keys = [*sorted(tiny.CONFIGS[name]), "rope_parameters", "layer_types", "head_dim", "auto_map"]
    key = data.draw(st.sampled_from(keys))
    values = tiny.CONFIGS[name] | {key: data.draw(JSON)}
    try:
        config = config_from_hf(values)
    except ValueError as error:
        assert str(error)
    else:
        assert config_from_hf(config_to_hf(config, dtype="float32")) == config
