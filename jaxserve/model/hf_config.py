"""Hugging Face's config.json, read and written.

Names, defaults and meanings are those of the transformers configuration classes of each architecture.
"""

import logging
from collections.abc import Mapping
from typing import Any

from jaxserve.model.config import (
    FactorRope,
    LinearRope,
    Llama3Rope,
    ModelConfig,
    RopeScaling,
    check_architecture,
    check_real,
    check_whole,
    shown,
)

_log = logging.getLogger(__name__)

_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# What the configuration class of each architecture takes where config.json is silent.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "MistralForCausalLM": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "Qwen2ForCausalLM": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "Qwen3ForCausalLM": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Read a parsed config.json.

    Raises:
        ValueError: an architecture or a feature that is not supported, or a bad value; names the field.
    """
    architecture = _architecture(config)
    if "auto_map" in config:
        _log.warning("config.json names code of its own (auto_map): ignored, it is never run")
    values = {**_DEFAULTS[architecture], **config}
    _refuse_unsupported(architecture, values)
    hidden_size = _whole(values, "hidden_size", ModelConfig.MAX_WIDTH)
    num_heads = _whole(values, "num_attention_heads", ModelConfig.MAX_HEADS)
    num_kv_heads = values.get("num_key_value_heads")
    head_dim = values.get("head_dim")
    theta, scaling = _rope(values)
    attention_bias = bool(_flag(values, "attention_bias"))
    sliding_window = values.get("sliding_window") if architecture == "MistralForCausalLM" else None
    return ModelConfig(
        architecture=architecture,
        vocab_size=_whole(values, "vocab_size", ModelConfig.MAX_VOCAB),
        hidden_size=hidden_size,
        intermediate_size=_whole(values, "intermediate_size", ModelConfig.MAX_WIDTH),
        num_layers=_whole(values, "num_hidden_layers", ModelConfig.MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=hidden_size // num_heads if head_dim is None else head_dim,
        rms_norm_eps=check_real("rms_norm_eps", values.get("rms_norm_eps", 1e-6), low=0.0, high=1.0),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=_flag(values, "tie_word_embeddings"),
        qkv_bias=architecture == "Qwen2ForCausalLM" or attention_bias,
        out_bias=architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") and attention_bias,
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_window=sliding_window,
        max_position_embeddings=_whole(values, "max_position_embeddings", ModelConfig.MAX_POSITIONS),
        bos_token_id=_first(values.get("bos_token_id")),
        eos_token_ids=_token_ids(values.get("eos_token_id")),
    )


def config_to_hf(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """The config.json of `config`; `config_from_hf` gives the same config back.

    Only the rope type "factors" (`FactorRope`, from GGUF files) is ours alone.
    """
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    match config.rope_scaling:
        case None:
            pass
        case LinearRope(factor=factor):
            rope |= {"rope_type": "linear", "factor": factor}
        case Llama3Rope() as scaling:
            rope |= {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
            }
        case FactorRope(factors=factors):
            rope |= {"rope_type": "factors", "factors": list(factors)}
    values = {
        "architectures": [config.architecture],
        "model_type": _MODEL_TYPES[config.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "dtype": dtype,
    }
    if config.architecture != "Qwen2ForCausalLM":
        values["attention_bias"] = config.qkv_bias
    if config.architecture == "MistralForCausalLM":
        values["sliding_window"] = config.sliding_window
    return values


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if isinstance(names, list) and len(names) == 1:
        check_architecture(names[0])
        return names[0]
    for architecture, model_type in _MODEL_TYPES.items():
        if names is None and config.get("model_type") == model_type:
            return architecture
    raise ValueError(f"architectures must name one architecture, got {shown(names)}")


def _refuse_unsupported(architecture: str, values: Mapping[str, Any]) -> None:
    """Raise ValueError for features that change the result and that this code does not compute."""
    if values.get("quantization_config") is not None:
        raise ValueError("quantization_config: quantised safetensors are not supported (GGUF files are)")
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act must be 'silu', got {shown(values['hidden_act'])}")
    if _flag(values, "mlp_bias"):
        raise ValueError("mlp_bias: a bias in the MLP is not supported")
    if architecture != "MistralForCausalLM" and _flag(values, "use_sliding_window"):
        raise ValueError("use_sliding_window: a sliding window in some layers only is not supported")
    layer_types = values.get("layer_types")
    # A Mistral's layers are all alike, windowed where it has a window, whatever this list says.
    if architecture != "MistralForCausalLM" and layer_types and not _all_full(layer_types):
        raise ValueError(f"layer_types: only full_attention is supported, got {shown(layer_types)}")
    for place in (values, _rope_parameters(values)):
        if place.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ValueError(f"partial_rotary_factor must be 1, got {shown(place['partial_rotary_factor'])}")


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (newer) or from `rope_theta` and `rope_scaling`."""
    parameters = _rope_parameters(values)
    theta = parameters.get("rope_theta", values.get("rope_theta", 10_000.0))
    check_real("rope_theta", theta, low=1.0, high=1e15)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind == "linear":
        return float(theta), LinearRope(factor=_real(parameters, "factor"))
    if kind == "llama3":
        length = parameters.get("original_max_position_embeddings", values["max_position_embeddings"])
        return float(theta), Llama3Rope(
            factor=_real(parameters, "factor"),
            low_freq_factor=_real(parameters, "low_freq_factor"),
            high_freq_factor=_real(parameters, "high_freq_factor"),
            original_max_position_embeddings=length,
        )
    if kind == "factors":
        factors = parameters.get("factors")
        if not isinstance(factors, list):
            raise ValueError(f"rope_scaling.factors must be a list, got {shown(factors)}")
        return float(theta), FactorRope(factors=tuple(factors))
    raise ValueError(
        f"rope_scaling: rope_type {shown(kind)} is not supported (default, linear and llama3 are)"
    )


def _rope_parameters(values: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = values.get("rope_parameters")
    if parameters is None:
        parameters = values.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"rope_scaling must be an object, got {shown(parameters)}")
    return parameters


def _all_full(layer_types: Any) -> bool:
    return isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types)


def _real(parameters: Mapping[str, Any], name: str) -> float:
    return check_real(f"rope_scaling.{name}", parameters.get(name), low=1e-6, high=1e6)


def _whole(values: Mapping[str, Any], name: str, high: int) -> int:
    if name not in values:
        raise ValueError(f"{name} is missing from config.json")
    return check_whole(name, values[name], high=high)


def _flag(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name, False)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {shown(value)}")
    return value


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _first(value: Any) -> int | None:
    if isinstance(value, list):
        return value[0] if value else None
    return value
