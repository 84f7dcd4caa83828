"""The model's parts against slow, plain NumPy, and how it is built and split."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.model.config import FactorRope, LinearRope, Llama3Rope, ModelConfig
from jaxserve.model.hf_config import config_from_hf
from jaxserve.model.rope import angles, inverse_frequencies, rotate
from jaxserve.model.transformer import Transformer, abstract_model, dense_attend, random_model
from tests.goldens import tiny

SETTINGS = settings(deadline=None, max_examples=12)


def config_of(**changes: object) -> ModelConfig:
    values = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
    }
    return ModelConfig(**values | changes)  # type: ignore[arg-type]


def plain_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None) -> np.ndarray:
    """One query and head at a time."""
    out = np.zeros_like(q)
    tokens, heads, size = q.shape
    for token in range(tokens):
        low = 0 if window is None else max(0, token - window + 1)
        for head in range(heads):
            shared = head // (heads // k.shape[1])
            scores = k[low : token + 1, shared] @ q[token, head] / math.sqrt(size)
            weights = np.exp(scores - scores.max())
            out[token, head] = weights / weights.sum() @ v[low : token + 1, shared]
    return out


@SETTINGS
@given(
    tokens=st.integers(1, 9),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    window=st.none() | st.integers(1, 10),
    seed=st.integers(0, 99),
)
def test_dense_attend(tokens: int, kv_heads: int, groups: int, window: int | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((tokens, kv_heads * groups, 4), np.float32)
    k, v = rng.standard_normal((2, tokens, kv_heads, 4), np.float32)
    out, kv = dense_attend(*map(jnp.asarray, (q, k, v)), "mine", 0, sliding_window=window)
    assert kv == "mine"
    np.testing.assert_allclose(out, plain_attention(q, k, v, window), atol=2e-6)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        LinearRope(factor=3.0),
        FactorRope(factors=(1.0, 2.0, 3.0, 4.0)),
        Llama3Rope(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
        ),
    ],
)
def test_frequencies_follow_the_written_rule(scaling: object) -> None:
    config = config_of(rope_scaling=scaling, rope_theta=500.0)
    for index, found in enumerate(inverse_frequencies(config)):
        plain = 500.0 ** (-2 * index / 8)
        match scaling:
            case LinearRope(factor=factor):
                plain /= factor
            case FactorRope(factors=factors):
                plain /= factors[index]
            case Llama3Rope():
                wavelength = 2 * math.pi / plain
                if wavelength > 64 / 1.0:
                    plain /= 8
                elif wavelength > 64 / 4.0:
                    smooth = (64 / wavelength - 1) / 3
                    plain = (1 - smooth) * plain / 8 + smooth * plain
        assert found == pytest.approx(plain, rel=1e-6)


def test_rotation_turns_pairs_of_halves() -> None:
    config = config_of()
    x = np.random.default_rng(0).standard_normal((5, 3, 8)).astype(np.float32)
    positions = np.array([0, 1, 7, 1000, 8191])
    frequencies = inverse_frequencies(config)
    turned = np.asarray(rotate(jnp.asarray(x), *angles(frequencies, jnp.asarray(positions))))
    for token, position in enumerate(positions):
        for pair, frequency in enumerate(frequencies):
            both = x[token, :, pair] + 1j * x[token, :, pair + 4]
            both = both * np.exp(1j * float(position) * float(frequency))
            found = turned[token, :, pair] + 1j * turned[token, :, pair + 4]
            np.testing.assert_allclose(found, both, atol=2e-3)


def test_positions_alone_place_a_token() -> None:
    """Two sequences laid end to end give what each gives alone; the model itself knows no rows."""
    graphdef, state = random_model(config_of(), seed=1, dtype="float32")
    first, second = jnp.array([3, 4, 5]), jnp.array([6, 7])

    def attend_pieces(q, k, v, kv, layer):
        one, _ = dense_attend(q[:3], k[:3], v[:3], kv, layer)
        two, _ = dense_attend(q[3:], k[3:], v[3:], kv, layer)
        return jnp.concatenate([one, two]), kv

    model = nnx.merge(graphdef, state)
    positions = jnp.array([0, 1, 2, 0, 1])
    together, _ = model.hidden(jnp.concatenate([first, second]), positions, None, attend_pieces)
    alone = [model.hidden(part, jnp.arange(len(part)), None, dense_attend)[0] for part in (first, second)]
    np.testing.assert_allclose(together, jnp.concatenate(alone), atol=1e-5)


def test_attend_gets_each_layer_s_number_and_the_callers_value() -> None:
    graphdef, state = random_model(config_of(num_layers=3), seed=0, dtype="bfloat16")
    shapes = []

    def attend(q, k, v, kv, layer):
        shapes.append((q.shape, k.shape, v.shape, q.dtype, layer.dtype))
        out, _ = dense_attend(q, k, v, None, layer)
        return out, (*kv, layer)

    hidden, kv = nnx.merge(graphdef, state).hidden(jnp.arange(5), jnp.arange(5), (), attend)
    assert kv == (0, 1, 2)
    assert set(shapes) == {((5, 4, 8), (5, 2, 8), (5, 2, 8), jnp.dtype("bfloat16"), jnp.dtype("int32"))}
    assert (hidden.shape, hidden.dtype) == ((5, 16), jnp.bfloat16)
    logits = nnx.merge(graphdef, state).logits(hidden[-1:])
    assert (logits.shape, logits.dtype) == ((1, 50), jnp.float32)


def test_equal_layers_are_traced_once() -> None:
    graphdef, state = random_model(config_of(num_layers=5), seed=0, dtype="float32")
    traced = []

    def attend(q, k, v, kv, layer):
        traced.append(layer)
        return dense_attend(q, k, v, kv, layer)

    def step(state, tokens):
        return nnx.merge(graphdef, state).hidden(tokens, jnp.arange(4), None, attend)[0]

    program = jax.jit(step).lower(state, jnp.arange(4))
    assert len(traced) == 1
    assert program.compile().as_text().count(" call(") == 0, "the calls are inlined"


def test_rows_of_logits_are_independent() -> None:
    graphdef, state = random_model(config_of(), seed=2, dtype="float32")
    model = nnx.merge(graphdef, state)
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((6, 16)), jnp.float32)
    np.testing.assert_allclose(model.logits(hidden)[2:4], model.logits(hidden[2:4]), atol=1e-6)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_building_abstractly_allocates_nothing(name: str) -> None:
    config = config_from_hf(tiny.CONFIGS[name])
    graphdef, state = abstract_model(config, dtype="bfloat16")
    leaves = jax.tree.leaves(state)
    assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
    again, _ = abstract_model(config, dtype="bfloat16")
    assert graphdef == again and hash(graphdef) == hash(again)


def test_split_once_then_plain_jit_traces_once() -> None:
    config = config_of()
    graphdef, state = random_model(config, seed=0, dtype="float32")
    traces = []

    @jax.jit
    def step(state: nnx.State, tokens: jax.Array) -> jax.Array:
        traces.append(1)
        model = nnx.merge(graphdef, state)
        hidden, _ = model.hidden(tokens, jnp.arange(len(tokens)), None, dense_attend)
        return model.logits(hidden)

    first = step(state, jnp.arange(4))
    step(state, jnp.arange(4) + 1)
    assert len(traces) == 1
    eager = nnx.merge(graphdef, state)
    hidden, _ = eager.hidden(jnp.arange(4), jnp.arange(4), None, dense_attend)
    np.testing.assert_allclose(first, eager.logits(hidden), atol=1e-5)


def test_fused_layout() -> None:
    """Head h of the fused projection is query h % G of KV head h // G, then that head's key and value."""
    config = config_of(num_layers=1, qkv_bias=True)
    model = Transformer(config, dtype=jnp.dtype("float32"))
    assert model.layers[0].attention.wqkv.shape == (16, 2, 4, 8)
    assert model.layers[0].attention.bias.shape == (2, 4, 8)
    assert model.layers[0].attention.wo.shape == (4, 8, 16)
    assert model.layers[0].mlp.gate_up.shape == (16, 2, 24)
    labels = jnp.arange(8.0).reshape(2, 4)[:, :, None] * jnp.ones(8)
    model.layers[0].attention.bias.set_value(labels)

    def attend(q, k, v, kv, layer):
        return q, [q, k, v]

    # At position 0 the rotation is the identity; weights are zero, so that the bias alone is left.
    _, seen = model.hidden(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32), None, attend)
    q, k, v = (np.asarray(x)[0, :, 0].tolist() for x in seen)
    assert (q, k, v) == ([0, 1, 4, 5], [2, 6], [3, 7])


def test_random_weights_are_reproducible() -> None:
    config = config_from_hf(tiny.CONFIGS["qwen3"])
    _, one = random_model(config, seed=5, dtype="float32")
    _, two = random_model(config, seed=5, dtype="float32")
    _, other = random_model(config, seed=6, dtype="float32")
    same = [bool(jnp.array_equal(a, b)) for a, b in zip(*map(jax.tree.leaves, (one, two)), strict=True)]
    assert all(same)
    assert not jnp.array_equal(jax.tree.leaves(one)[0], jax.tree.leaves(other)[0])


def test_a_window_hides_what_is_behind_it() -> None:
    graphdef, state = random_model(config_of(num_layers=1), seed=3, dtype="float32")
    model = nnx.merge(graphdef, state)
    attend = functools.partial(dense_attend, sliding_window=3)
    one, _ = model.hidden(jnp.array([1, 2, 3, 4, 5, 6]), jnp.arange(6), None, attend)
    two, _ = model.hidden(jnp.array([9, 9, 9, 4, 5, 6]), jnp.arange(6), None, attend)
    np.testing.assert_allclose(one[5], two[5], atol=1e-6)
    assert not np.allclose(one[4], two[4], atol=1e-3)
