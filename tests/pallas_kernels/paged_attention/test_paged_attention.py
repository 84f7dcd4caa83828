"""Both backends against the twin, and what must not change the result at all."""

from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.paged_attention import BACKENDS, ragged_paged_attention
from tests.pallas_kernels.twin import Batch, Shape, make_batch, poison, twin

SCALE = 0.17
STATIC = ("kv_dtype", "scale", "sliding_window", "soft_cap", "uniform", "backend")
attend = jax.jit(ragged_paged_attention, static_argnames=STATIC)

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
SHAPES = {
    "plain": Shape(),
    "smollm2": Shape(heads=9, kv_heads=3),
    "multi-query-d80": Shape(heads=5, kv_heads=1, head_dim=80, page_size=8),
    "every-head-its-own-d96": Shape(heads=3, kv_heads=3, head_dim=96, page_size=32),
    "d128-big-pages": Shape(heads=4, kv_heads=1, head_dim=128, page_size=128, columns=8, pages=32),
    "d256": Shape(heads=2, kv_heads=1, head_dim=256, page_size=64, columns=8, pages=48),
    "bfloat16": Shape(heads=9, kv_heads=3, kv_dtype="bfloat16", q_dtype="bfloat16"),
    "float16": Shape(heads=6, kv_heads=2, kv_dtype="float16", q_dtype="float16"),
    "bfloat16-kv-float32-q": Shape(kv_dtype="bfloat16"),
}
RULES = {
    "full": {},
    "window": {"sliding_window": 37},
    "window-1": {"sliding_window": 1},
    "cap": {"soft_cap": 3.0},
    "sinks": {"sinks": True},
    "all": {"sliding_window": 70, "soft_cap": 5.0, "sinks": True},
}
CASES = [("plain", rule) for rule in RULES] + [(shape, "full") for shape in SHAPES if shape != "plain"]
CASES += [("smollm2", "all"), ("bfloat16", "all"), ("multi-query-d80", "window")]


def rule_of(shape: Shape, rule: str) -> dict:
    """Keyword arguments of a call; sinks around the scores' own size."""
    chosen = dict(RULES[rule])
    if chosen.pop("sinks", False):
        chosen["sinks"] = np.linspace(-2.0, 3.0, shape.heads).astype(np.float32)
    return {"scale": SCALE, **chosen}


def run(batch: Batch, rule: dict, backend: str) -> np.ndarray:
    return np.asarray(attend(*batch.arguments, kv_dtype=batch.shape.kv_dtype, backend=backend, **rule))


def check(batch: Batch, rule: dict, backend: str, *, uniform: bool = False) -> None:
    """Every number within the tolerance of its type, relative to the larger of 1 and itself."""
    result = run(batch, {**rule, "uniform": uniform}, backend)
    assert result.dtype == batch.q.dtype
    tolerance = TOLERANCE[batch.shape.q_dtype]
    np.testing.assert_allclose(result.astype(np.float64), twin(batch, **rule), rtol=tolerance, atol=tolerance)
    assert not result[int(batch.cu_q_lens[-1]) :].any()


@st.composite
def row_lens(draw: st.DrawFn, shape: Shape, decodes_only: bool = False) -> list[tuple[int, int]]:
    """`(q_len, kv_len)` of up to `rows` rows that fit the shape's tokens, table and pages."""
    page = shape.page_size
    most = min(shape.columns, (shape.pages - 1) // shape.rows) * page
    edges = [0, 1, page - 1, page, page + 1, 2 * page, 127, 128, 129]
    earlier = st.sampled_from(edges) | st.integers(0, 400)
    now = st.just(1) if decodes_only else st.sampled_from([1, 1, 2, *edges]) | st.integers(1, shape.tokens)
    lens: list[tuple[int, int]] = []
    left = shape.tokens
    for _ in range(draw(st.integers(1, shape.rows))):
        q_len = min(draw(now), left, most)
        left -= q_len
        lens.append((q_len, min(q_len + draw(earlier), most) if q_len else 0))
    return lens


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "rule"), CASES)
@settings(deadline=None, max_examples=6)
@given(data=st.data())
def test_mixed_rows_agree_with_the_twin(shape: str, rule: str, backend: str, data: st.DataObject) -> None:
    chosen = SHAPES[shape]
    lens = data.draw(row_lens(chosen))
    batch = make_batch(chosen, lens, data.draw(st.integers(0, 99)), share=data.draw(st.booleans()))
    check(batch, rule_of(chosen, rule), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "rule"), [("smollm2", "full"), ("bfloat16", "full"), ("plain", "all")])
@settings(deadline=None, max_examples=6)
@given(data=st.data())
def test_a_bucket_of_decodes_agrees_with_the_twin(
    shape: str, rule: str, backend: str, data: st.DataObject
) -> None:
    chosen = replace(SHAPES[shape], rows=8, tokens=8)
    lens = data.draw(row_lens(chosen, decodes_only=True))
    batch = make_batch(chosen, lens, data.draw(st.integers(0, 99)), share=data.draw(st.booleans()))
    check(batch, rule_of(chosen, rule), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lens", [[], [(0, 0), (0, 0)], [(0, 0), (3, 20), (0, 0), (1, 5)]])
def test_empty_rows_anywhere(lens: list[tuple[int, int]], backend: str) -> None:
    check(make_batch(SHAPES["plain"], lens or [(0, 0)]), rule_of(SHAPES["plain"], "full"), backend)


MIXED = [(1, 200), (1, 16), (40, 40), (1, 1), (90, 290), (2, 17)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["full", "window", "all"])
@pytest.mark.parametrize("shape", ["plain", "bfloat16", "multi-query-d80"])
def test_what_nobody_owns_may_be_nan(shape: str, rule: str, backend: str) -> None:
    chosen = SHAPES[shape]
    batch = make_batch(chosen, MIXED, 5)
    keywords = rule_of(chosen, rule)
    clean = run(batch, keywords, backend)
    assert np.isfinite(clean.astype(np.float32)).all()
    poisoned = poison(batch, keywords.get("sliding_window"))
    np.testing.assert_array_equal(run(poisoned, keywords, backend), clean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decode_in_its_own_bucket_may_stand_among_nan(backend: str) -> None:
    chosen = replace(SHAPES["smollm2"], rows=4, tokens=4)
    batch = make_batch(chosen, [(1, 300), (1, 17), (1, 16)], 6)
    keywords = rule_of(chosen, "full")
    np.testing.assert_array_equal(run(poison(batch), keywords, backend), run(batch, keywords, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_is_bitwise_the_same_whatever_the_others_are(backend: str) -> None:
    chosen = SHAPES["smollm2"]
    ours = [(1, 150), (50, 130)]
    alone = make_batch(chosen, ours, 7)
    among = make_batch(chosen, [*ours, (1, 500), (70, 470), (1, 3)], 7)
    keywords = rule_of(chosen, "full")
    pages = np.array(among.kv_pages)
    for row, count in enumerate((10, 9)):
        pages[among.page_table[row, :count]] = np.asarray(alone.kv_pages)[alone.page_table[row, :count]]
    among = replace(among, kv_pages=jnp.asarray(pages), layer=alone.layer, q=alone.q)
    np.testing.assert_array_equal(run(among, keywords, backend)[:51], run(alone, keywords, backend)[:51])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "rule"), [("smollm2", "full"), ("bfloat16", "all"), ("multi-query-d80", "window")]
)
@settings(deadline=None, max_examples=6)
@given(data=st.data())
def test_uniform_rows_agree_with_the_twin(shape: str, rule: str, backend: str, data: st.DataObject) -> None:
    chosen = SHAPES[shape]
    batch = make_batch(chosen, data.draw(row_lens(chosen)), data.draw(st.integers(0, 99)))
    check(batch, rule_of(chosen, rule), backend, uniform=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["full", "all"])
@pytest.mark.parametrize("shape", ["smollm2", "bfloat16", "float16"])
@settings(deadline=None, max_examples=6)
@given(data=st.data())
def test_uniformly_a_token_is_bitwise_the_same_in_any_chunk_and_company(
    shape: str, rule: str, backend: str, data: st.DataObject
) -> None:
    """A sequence computed at once, in chunks that are drawn, and token by token, each among strangers."""
    chosen, length, computed = SHAPES[shape], 60, 70
    keywords = {**rule_of(chosen, rule), "uniform": True}
    whole = make_batch(chosen, [(length, computed + length)], 3)
    wanted = run(whole, keywords, backend)[:length]
    cuts = data.draw(st.lists(st.integers(1, length - 1), unique=True, max_size=3).map(sorted))
    strangers = data.draw(row_lens(replace(chosen, rows=4, tokens=80)))
    place = data.draw(st.integers(0, len(strangers)))
    for start, end in pairwise([0, *cuts, length]):
        lens = [*strangers[:place], (end - start, computed + end), *strangers[place:]]
        batch = make_batch(chosen, lens, 4)
        first = int(batch.cu_q_lens[place])
        pages, count = np.array(batch.kv_pages), -(-(computed + end) // chosen.page_size)
        pages[batch.page_table[place, :count]] = np.asarray(whole.kv_pages)[whole.page_table[0, :count]]
        q = batch.q.at[first : first + end - start].set(whole.q[start:end])
        batch = replace(batch, q=q, kv_pages=jnp.asarray(pages), layer=whole.layer)
        result = run(batch, keywords, backend)[first : first + end - start]
        np.testing.assert_array_equal(result, wanted[start:end])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [1, 64, 65])
def test_the_last_column_of_the_page_table_is_read_right(columns: int, backend: str) -> None:
    chosen = replace(SHAPES["plain"], columns=columns)
    kv_len = min(columns, 25) * chosen.page_size
    check(make_batch(chosen, [(1, kv_len), (16, kv_len)]), rule_of(chosen, "full"), backend)


def test_no_tokens_give_no_tokens() -> None:
    batch = make_batch(replace(SHAPES["plain"], tokens=0), [(0, 0)])
    assert run(batch, rule_of(batch.shape, "full"), "xla").shape == (0, 4, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_dtype": "int8"}, "kv_dtype must be one of"),
        ({"kv_dtype": "bfloat16"}, "kv_pages must be uint16"),
        ({"backend": "cudnn"}, "backend must be one of"),
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ({"sinks": np.zeros(3, np.float32)}, r"sinks must be \[4\]"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, message: str) -> None:
    batch = make_batch(SHAPES["plain"], [(1, 5)])
    with pytest.raises(ValueError, match=message):
        ragged_paged_attention(*batch.arguments, **{"kv_dtype": "float32", "scale": SCALE, **changes})


@pytest.mark.parametrize("wrong", [0, 2, 3, 4])
def test_arrays_of_the_wrong_shape_are_refused(wrong: int) -> None:
    arguments = list(make_batch(SHAPES["plain"], [(1, 5)]).arguments)
    arguments[wrong] = arguments[wrong][..., :-1]
    if wrong == 2:
        arguments[wrong] = arguments[wrong][:-1]
    with pytest.raises(ValueError, match=r"do not fit|must be"):
        ragged_paged_attention(*arguments, kv_dtype="float32", scale=SCALE)
