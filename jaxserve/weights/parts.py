"""How the tensors of a checkpoint, under Hugging Face's names, become our fused parameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jaxserve.model.config import ModelConfig
from jaxserve.weights.errors import WeightsError

_TILE = 64
Fill = Callable[[np.ndarray, Sequence[np.ndarray]], None]
"""`fill(out, tensors)` writes a parameter from its tensors, casting to out's dtype."""


class Checkpoint(Protocol):
    """Tensors by Hugging Face name."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, without reading any."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor in a floating dtype; may be a view of a file."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One parameter of ours.

    Attributes:
        sources: names and shapes of the tensors it is made of.
        fill: makes it.
    """

    sources: tuple[tuple[str, tuple[int, ...]], ...]
    fill: Fill


def parts(config: ModelConfig) -> dict[str, Part]:
    """Parameter name (the dotted path in the model's state) to how it is made."""
    width = config.hidden_size
    table = (config.vocab_size, width)
    found = {
        "embedding": _same("model.embed_tokens.weight", table),
        "norm.scale": _same("model.norm.weight", (width,)),
    }
    if not config.tie_word_embeddings:
        found["head"] = _same("lm_head.weight", table)
    for layer in range(config.num_layers):
        found |= {f"layers.{layer}.{name}": part for name, part in _layer_parts(config, layer).items()}
    return found


def check_names(checkpoint: Checkpoint, wanted: Mapping[str, Part], *, tied: bool) -> None:
    """Compare a checkpoint's table with what the config needs, before any tensor is read.

    Raises:
        WeightsError: a tensor is missing, has another shape, or is not known; names it.
    """
    expected = dict(source for part in wanted.values() for source in part.sources)
    shapes = checkpoint.shapes
    for name, shape in expected.items():
        if name not in shapes:
            raise WeightsError(f"{checkpoint.name}: tensor {name} is missing")
        if shapes[name] != shape:
            raise WeightsError(
                f"{checkpoint.name}: tensor {name} has shape {shapes[name]}, the config needs {shape}"
            )
    for name in shapes:
        # Llama 2 era files hold the rotation frequencies, which the config determines; some tied ones a head.
        ignored = name.endswith(".rotary_emb.inv_freq") or (tied and name == "lm_head.weight")
        if name not in expected and not ignored:
            raise WeightsError(f"{checkpoint.name}: tensor {name[:200]} is not part of this architecture")


def _layer_parts(config: ModelConfig, layer: int) -> dict[str, Part]:
    width, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    q_rows, kv_rows = config.num_heads * size, config.num_kv_heads * size
    prefix = f"model.layers.{layer}"
    attention = f"{prefix}.self_attn"
    rows = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}

    def fill_qkv(out: np.ndarray, tensors: Sequence[np.ndarray]) -> None:
        fuse_qkv(out, tensors, config)

    projections = tuple((f"{attention}.{name}.weight", (count, width)) for name, count in rows.items())
    gate_up = tuple((f"{prefix}.mlp.{name}.weight", (inner, width)) for name in ("gate_proj", "up_proj"))
    found = {
        "attention_norm.scale": _same(f"{prefix}.input_layernorm.weight", (width,)),
        "mlp_norm.scale": _same(f"{prefix}.post_attention_layernorm.weight", (width,)),
        "attention.wqkv": Part(sources=projections, fill=fill_qkv),
        "attention.wo": _transposed(f"{attention}.o_proj.weight", (width, q_rows)),
        "mlp.gate_up": Part(sources=gate_up, fill=fill_gate_up),
        "mlp.down": _transposed(f"{prefix}.mlp.down_proj.weight", (width, inner)),
    }
    if config.qkv_bias:
        sources = tuple((f"{attention}.{name}.bias", (count,)) for name, count in rows.items())
        found["attention.bias"] = Part(sources=sources, fill=fill_qkv)
    if config.out_bias:
        found["attention.out_bias"] = _same(f"{attention}.o_proj.bias", (width,))
    if config.qk_norm:
        found["attention.q_norm.scale"] = _same(f"{attention}.q_norm.weight", (size,))
        found["attention.k_norm.scale"] = _same(f"{attention}.k_norm.weight", (size,))
    return found


def _same(name: str, shape: tuple[int, ...]) -> Part:
    return Part(sources=((name, shape),), fill=fill_same)


def _transposed(name: str, shape: tuple[int, ...]) -> Part:
    return Part(sources=((name, shape),), fill=fill_transposed)


def fill_same(out: np.ndarray, tensors: Sequence[np.ndarray]) -> None:
    """The tensor as it is."""
    out[...] = tensors[0]


def fill_transposed(out: np.ndarray, tensors: Sequence[np.ndarray]) -> None:
    """`[rows, columns]` to `[columns, rows]`, columns split as `out` has them."""
    transpose_into(out.reshape(-1, out.shape[-1]), tensors[0])


def fill_gate_up(out: np.ndarray, tensors: Sequence[np.ndarray]) -> None:
    """Gate and up, each `[F, E]`, to `[E, 2, F]`."""
    for index, tensor in enumerate(tensors):
        transpose_into(out[:, index], tensor)


def fuse_qkv(out: np.ndarray, tensors: Sequence[np.ndarray], config: ModelConfig) -> None:
    """q `[H * D, E]`, k and v `[K * D, E]` to `[E, K, G + 2, D]`; biases, without E, to `[K, G + 2, D]`."""
    size, groups = config.head_dim, config.queries_per_kv
    # A bias is a matrix of one column.
    columns = out.reshape(-1, config.num_kv_heads, (groups + 2) * size)
    starts = (0, groups * size, (groups + 1) * size, (groups + 2) * size)
    for start, stop, tensor in zip(starts, starts[1:], tensors, strict=False):
        heads = tensor.reshape(config.num_kv_heads, stop - start, -1)
        for head, rows in enumerate(heads):
            transpose_into(columns[:, head, start:stop], rows)


def transpose_into(out: np.ndarray, rows: np.ndarray) -> None:
    """Write `rows.T` into `out`, cast to its dtype, tile by tile: NumPy alone takes twice as long."""
    bits = np.dtype(f"u{out.itemsize}")
    target = out.view(bits)
    for row in range(0, rows.shape[0], _TILE):
        band = rows[row : row + _TILE].astype(out.dtype, copy=False).view(bits)
        for column in range(0, rows.shape[1], _TILE):
            target[column : column + _TILE, row : row + _TILE] = band[:, column : column + _TILE].T
