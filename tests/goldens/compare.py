"""Reading goldens, and how far logits may be from them."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.model.transformer import dense_attend
from jaxserve.weights.load import Loaded

HERE = Path(__file__).parent
TILE_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far a model is from a golden.

    Attributes:
        logits: largest absolute difference of any stored logit or log sum exp.
        wrong: (step, gap) of each new token whose argmax is another than the golden's, given the golden's
            tokens before it; gap is by how much the golden's own choice led.
    """

    logits: float
    wrong: tuple[tuple[int, float], ...]


@functools.cache
def goldens(file: str) -> dict[str, Any]:
    """The goldens of one file, "default_model" or "tiny_models", by name."""
    return json.loads((HERE / f"{file}.json").read_text())


def distance(model: Loaded, golden: dict[str, Any]) -> Distance:
    """Run prompt and continuation at once with dense attention and compare.

    That every argmax given the golden's tokens is the golden's next token says, by induction, that the greedy
    text is the golden's.
    """
    tokens = golden["prompt"] + golden["continuation"]
    positions = [row["position"] for row in golden["rows"]]
    first = len(golden["prompt"]) - 1
    steps = list(range(first, len(tokens) - 1))
    logits = dense_logits(model, tokens, positions + steps)
    differences = [0.0]
    for row, ours in zip(golden["rows"], logits[: len(positions)], strict=True):
        sampled = ours[:: len(ours) // len(row["sampled"])][: len(row["sampled"])]
        differences.append(float(np.abs(sampled - np.array(row["sampled"])).max()))
        differences.append(float(np.abs(ours[row["top_ids"]] - np.array(row["top_values"])).max()))
        differences.append(abs(float(np.logaddexp.reduce(ours.astype(np.float64))) - row["logsumexp"]))
    chosen = logits[len(positions) :].argmax(axis=-1)
    wrong = tuple(
        (step, golden["top2_gaps"][step])
        for step, token in enumerate(golden["continuation"])
        if chosen[step] != token
    )
    return Distance(logits=max(differences), wrong=wrong)


def dense_logits(model: Loaded, tokens: list[int], rows: list[int]) -> np.ndarray:
    """Logits float32 `[rows, V]` after the tokens at the given positions.

    Lengths are padded, so that few programs are compiled: what follows a token does not change it.
    """
    padded = -(-len(tokens) // TILE_TOKENS) * TILE_TOKENS
    padded_rows = -(-len(rows) // TILE_TOKENS) * TILE_TOKENS
    feed = jnp.asarray(tokens + [0] * (padded - len(tokens)), jnp.int32)
    picked = jnp.asarray(rows + [0] * (padded_rows - len(rows)), jnp.int32)
    return np.asarray(_forward(model.graphdef, model.state, feed, picked))[: len(rows)]


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef: nnx.GraphDef, state: nnx.State, tokens: jax.Array, rows: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, state)
    attend = functools.partial(dense_attend, sliding_window=model.config.sliding_window)
    hidden, _ = model.hidden(tokens, jnp.arange(len(tokens)), None, attend)
    return model.logits(hidden[rows])
