"""Tiny models as GGUF files, written by the `gguf` package the way llama.cpp's converter lays them out."""

import math
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from jaxserve.weights.gguf_checkpoint import hf_name
from tests.goldens import tiny

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def write_gguf(
    name: str, path: Path, *, kind: GGMLQuantizationType = GGMLQuantizationType.F32, dimension: bool = True
) -> Path:
    """Write the tiny model `name`; matrices as `kind`, vectors as float32."""
    config = tiny.CONFIGS[name]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim", config["hidden_size"] // heads)
    rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"]}
    scaling = config.get("rope_scaling") or {}
    writer = GGUFWriter(path, ARCHITECTURES[config["model_type"]])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    if dimension:
        writer.add_rope_dimension_count(size)
    writer.add_bos_token_id(1)
    writer.add_token_list([f"t{index}" for index in range(config["vocab_size"])])
    if scaling.get("type") == "linear":
        writer.add_string(f"{config['model_type']}.rope.scaling.type", "linear")
        writer.add_float32(f"{config['model_type']}.rope.scaling.factor", scaling["factor"])
    if scaling.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(rope["rope_theta"], size, scaling))
    for ours, values in gguf_tensors(name).items():
        if values.ndim == 2:
            writer.add_tensor(ours, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(ours, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(name: str) -> dict[str, np.ndarray]:
    """The tiny model's tensors under GGUF's names, q and k rows interleaved where the architecture asks."""
    config = tiny.CONFIGS[name]
    found = tiny.tensors(name)
    names = [f"{stem}.weight" for stem in ("token_embd", "output_norm", "output")]
    for layer in range(config["num_hidden_layers"]):
        for part in ("attn_norm", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down", "attn_output"):
            names += [f"blk.{layer}.{part}.weight", f"blk.{layer}.{part}.bias"]
        for part in ("attn_q", "attn_k", "attn_v", "attn_q_norm", "attn_k_norm"):
            names += [f"blk.{layer}.{part}.weight", f"blk.{layer}.{part}.bias"]
    tensors = {ours: found.pop(hf_name(ours)) for ours in names if hf_name(ours) in found}
    assert not found, f"no GGUF name for {sorted(found)}"
    if ARCHITECTURES[config["model_type"]] != "llama":
        return tensors
    counts = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for ours in tensors:
        heads = counts.get(ours.split(".")[-2])
        if heads:
            tensors[ours] = interleaved(tensors[ours], heads)
    return tensors


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order: per head first half and second half alternate."""
    size = len(rows) // heads
    order = [head * size + half * (size // 2) + pair for head, pair, half in _places(heads, size // 2)]
    return np.ascontiguousarray(rows[order])


def _places(heads: int, pairs: int) -> list[tuple[int, int, int]]:
    return [(head, pair, half) for head in range(heads) for pair in range(pairs) for half in range(2)]


def llama3_divisors(theta: float, size: int, scaling: dict[str, float]) -> np.ndarray:
    """The tensor by which a GGUF file says Llama 3's rope scaling: float32 `[size / 2]`."""
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    length = scaling["original_max_position_embeddings"]
    divisors = []
    for index in range(0, size, 2):
        wavelength = 2 * math.pi * theta ** (index / size)
        if wavelength < length / high:
            divisors.append(1.0)
        elif wavelength > length / low:
            divisors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)
