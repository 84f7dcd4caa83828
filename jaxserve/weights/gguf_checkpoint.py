"""A GGUF file seen as a Hugging Face checkpoint: names mapped, rows put back in order."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxserve.model.config import ModelConfig
from jaxserve.model.gguf_config import config_from_gguf
from jaxserve.weights.errors import WeightsError
from jaxserve.weights.gguf_file import GgufFile

ROPE_FACTORS = "rope_freqs.weight"
_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GgufCheckpoint:
    """See parts.Checkpoint.

    Attributes:
        file: the open file.
        config: its config.
        names: Hugging Face name to GGUF name.
    """

    file: GgufFile
    config: ModelConfig
    names: Mapping[str, str]

    @property
    def name(self) -> str:
        """The file's path."""
        return str(self.file.path)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by Hugging Face name."""
        return {name: self.file.tensors[ours].shape for name, ours in self.names.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32, rows in Hugging Face's order."""
        values = self.file.read(self.names[name])
        if self.file.metadata["general.architecture"] != "llama":
            return values
        if ".q_proj." in name:
            return half_split(values, self.config.num_heads)
        if ".k_proj." in name:
            return half_split(values, self.config.num_kv_heads)
        return values


def gguf_checkpoint(file: GgufFile) -> GgufCheckpoint:
    """Read the config of an open file and map its tensor names.

    Raises:
        WeightsError: the config is bad or not supported.
    """
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    factors = None
    if ROPE_FACTORS in shapes:
        if len(shapes[ROPE_FACTORS]) != 1 or shapes[ROPE_FACTORS][0] > ModelConfig.MAX_WIDTH:
            raise WeightsError(f"{file.path}: tensor {ROPE_FACTORS} has shape {shapes[ROPE_FACTORS]}")
        factors = tuple(file.read(ROPE_FACTORS).tolist())
    try:
        config = config_from_gguf(file.metadata, shapes, rope_factors=factors)
    except ValueError as error:
        raise WeightsError(f"{file.path}: {error}") from error
    names = {hf_name(name): name for name in shapes if name != ROPE_FACTORS}
    return GgufCheckpoint(file=file, config=config, names=names)


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; unknown names are returned as they are."""
    stem, _, suffix = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{suffix}"
    match = re.fullmatch(r"blk\.(0|[1-9][0-9]{0,4})\.([a-z_]+)", stem)
    if match is None or match[2] not in _LAYER:
        return name
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{suffix}"


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo the row order that GGUF files of architecture `llama` give q and k.

    llama.cpp rotates neighbouring elements, Hugging Face element i with i + D/2: within each head, the file
    holds rows 0, D/2, 1, D/2 + 1, ...
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
