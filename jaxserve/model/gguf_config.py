"""The metadata of a GGUF file, read as a model's config. Keys are those of llama.cpp's GGUF specification."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxserve.model.config import (
    FactorRope,
    LinearRope,
    ModelConfig,
    RopeScaling,
    check_real,
    check_whole,
    shown,
)

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def config_from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rope_factors: tuple[float, ...] | None = None,
) -> ModelConfig:
    """Read a GGUF file's metadata. Mistral comes as architecture `llama`.

    Args:
        metadata: key to value.
        shapes: tensor name to shape, outermost dimension first.
        rope_factors: content of the tensor `rope_freqs.weight`, where the file has it (Llama 3.x).

    Raises:
        ValueError: an architecture or a feature that is not supported, or a bad value; names the key.
    """
    kind = metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ValueError(f"general.architecture {shown(kind)} is not supported; supported: {known}")
    for key, value in metadata.items():
        if key.startswith(f"{kind}.") and not isinstance(value, int | float | str):
            raise ValueError(f"{key}: a list, such as one value per layer, is not supported")
    if metadata.get(f"{kind}.expert_count"):
        raise ValueError(f"{kind}.expert_count: mixtures of experts are not supported")
    hidden_size = _whole(metadata, f"{kind}.embedding_length", ModelConfig.MAX_WIDTH)
    num_heads = _whole(metadata, f"{kind}.attention.head_count", ModelConfig.MAX_HEADS)
    head_dim = metadata.get(f"{kind}.attention.key_length", hidden_size // num_heads)
    for key in (f"{kind}.attention.value_length", f"{kind}.rope.dimension_count"):
        if metadata.get(key, head_dim) != head_dim:
            raise ValueError(f"{key} must equal the head size {shown(head_dim)}, got {shown(metadata[key])}")
    embedding = shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise ValueError("tensor token_embd.weight is missing or no matrix")
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    theta = metadata.get(f"{kind}.rope.freq_base", 10_000.0)
    return ModelConfig(
        architecture=_ARCHITECTURES[kind],
        vocab_size=embedding[0],
        hidden_size=hidden_size,
        intermediate_size=_whole(metadata, f"{kind}.feed_forward_length", ModelConfig.MAX_WIDTH),
        num_layers=_whole(metadata, f"{kind}.block_count", ModelConfig.MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=metadata.get(f"{kind}.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=_eps(metadata, f"{kind}.attention.layer_norm_rms_epsilon"),
        rope_theta=_as_written(check_real(f"{kind}.rope.freq_base", theta, low=1.0, high=1e15)),
        rope_scaling=_rope_scaling(metadata, kind, rope_factors),
        tie_word_embeddings="output.weight" not in shapes,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        out_bias="blk.0.attn_output.bias" in shapes,
        qk_norm=kind == "qwen3",
        sliding_window=metadata.get(f"{kind}.attention.sliding_window"),
        max_position_embeddings=_whole(metadata, f"{kind}.context_length", ModelConfig.MAX_POSITIONS),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(token for token in ends if type(token) is int)),
    )


def _rope_scaling(
    metadata: Mapping[str, Any], kind: str, rope_factors: tuple[float, ...] | None
) -> RopeScaling | None:
    if rope_factors is not None:
        return FactorRope(factors=rope_factors)
    method = metadata.get(f"{kind}.rope.scaling.type", "none")
    if method == "linear":
        factor = metadata.get(f"{kind}.rope.scaling.factor")
        return LinearRope(factor=check_real(f"{kind}.rope.scaling.factor", factor, low=1e-6, high=1e6))
    if method != "none":
        raise ValueError(f"{kind}.rope.scaling.type {shown(method)} is not supported")
    # Files from before the key above existed.
    legacy = metadata.get(f"{kind}.rope.scale_linear")
    if legacy is None:
        return None
    return LinearRope(factor=check_real(f"{kind}.rope.scale_linear", legacy, low=1e-6, high=1e6))


def _eps(metadata: Mapping[str, Any], key: str) -> float:
    return _as_written(check_real(key, metadata.get(key), low=0.0, high=1.0))


def _as_written(value: float) -> float:
    """The number whose float32 the file holds: 1e-05, not 9.999999747378752e-06, as in config.json."""
    return float(str(np.float32(value)))


def _whole(metadata: Mapping[str, Any], key: str, high: int) -> int:
    if key not in metadata:
        raise ValueError(f"{key} is missing")
    return check_whole(key, metadata[key], high=high)
