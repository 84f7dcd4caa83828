"""Tiny models of every architecture, the same weights wherever they are made: NumPy only, no files kept.

Used by make_goldens.py, which asks transformers about them, and by the tests, which ask us.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

PROMPT_TOKENS = 48
NEW_TOKENS = 32

_SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}

CONFIGS: Mapping[str, dict[str, Any]] = {
    # Llama 3's rope scaling, bounds chosen so that all three of its bands are used; grouped queries.
    "llama": _SIZES
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    # Linear scaling, biases everywhere that HF's attention_bias puts them, tied head.
    "llama-linear": _SIZES
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    # A window shorter than the prompt, a head size that is not hidden_size / heads.
    "mistral": _SIZES
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "rope_theta": 10000.0,
        "sliding_window": 12,
        "head_dim": 16,
    },
    "qwen2": _SIZES
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "sliding_window": 16,
        "tie_word_embeddings": True,
    },
    # The newer way to write the rope, and normalised queries and keys.
    "qwen3": _SIZES
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "head_dim": 32,
        "attention_bias": False,
    },
}


def prompt(name: str) -> list[int]:
    """The token ids that the golden of `name` begins with."""
    rng = np.random.default_rng(sum(name.encode()))
    return [int(token) for token in rng.integers(0, _SIZES["vocab_size"], PROMPT_TOKENS)]


def tensors(name: str) -> dict[str, np.ndarray]:
    """The float32 tensors of `name` by Hugging Face name, in a fixed order from one seed."""
    config = CONFIGS[name]
    rng = np.random.default_rng(1000 + sum(name.encode()))
    width, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    size = config.get("head_dim", width // config["num_attention_heads"])
    q_rows, kv_rows = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    kind = config["model_type"]

    def matrix(rows: int, columns: int) -> np.ndarray:
        # Wide enough that attention is far from uniform and logits far from equal.
        return (rng.standard_normal((rows, columns)) * 1.5 * columns**-0.5).astype(np.float32)

    def vector(length: int, mean: float) -> np.ndarray:
        return (mean + 0.3 * rng.standard_normal(length)).astype(np.float32)

    found = {"model.embed_tokens.weight": matrix(vocab, width) * np.float32(4)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        found[f"{prefix}.input_layernorm.weight"] = vector(width, 1.0)
        for part, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            found[f"{prefix}.self_attn.{part}_proj.weight"] = matrix(rows, width)
            if kind == "qwen2" or config.get("attention_bias"):
                found[f"{prefix}.self_attn.{part}_proj.bias"] = vector(rows, 0.0)
        found[f"{prefix}.self_attn.o_proj.weight"] = matrix(width, q_rows)
        if config.get("attention_bias"):
            found[f"{prefix}.self_attn.o_proj.bias"] = vector(width, 0.0)
        if kind == "qwen3":
            found[f"{prefix}.self_attn.q_norm.weight"] = vector(size, 1.0)
            found[f"{prefix}.self_attn.k_norm.weight"] = vector(size, 1.0)
        found[f"{prefix}.post_attention_layernorm.weight"] = vector(width, 1.0)
        for part in ("gate", "up"):
            found[f"{prefix}.mlp.{part}_proj.weight"] = matrix(inner, width)
        found[f"{prefix}.mlp.down_proj.weight"] = matrix(width, inner)
    found["model.norm.weight"] = vector(width, 1.0)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = matrix(vocab, width)
    return found


def write_folder(name: str, folder: Path) -> None:
    """Write `name` as a Hugging Face folder without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    save_file(tensors(name), folder / "model.safetensors", metadata={"format": "pt"})
