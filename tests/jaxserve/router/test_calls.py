"""What P and D are asked, for any body."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.router.calls import (
    ASK_TO_KEEP,
    COUNTS,
    DECODE_ONLY,
    PARAMS,
    decode_body,
    prefill_body,
    read_call,
    transfer_params,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NUMBERS = st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
COUNT = st.none() | st.integers(0, 2**63 - 1)
KNOWN = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": COUNT,
        "max_completion_tokens": COUNT,
        "min_tokens": COUNT,
        "n": COUNT,
        "stream": st.booleans(),
        "logprobs": VALUES,
        "echo": VALUES,
        "prompt": VALUES,
    },
)
OTHERS = TEXT.filter(lambda key: key not in {*COUNTS, "stream", "stream_options", PARAMS})
"""Fields of which nothing is asked."""
BODIES = st.builds(
    lambda other, known: {**other, **known}, st.dictionaries(OTHERS, VALUES, max_size=4), KNOWN
)


@given(body=BODIES, params=st.dictionaries(TEXT, VALUES, min_size=1, max_size=3))
def test_p_sees_the_clients_fields_but_those_of_the_answer_and_d_sees_all(
    body: dict[str, Any], params: dict[str, Any]
) -> None:
    call = read_call(json.dumps(body).encode())
    asked = json.loads(prefill_body(call))
    assert asked[PARAMS] == ASK_TO_KEEP
    assert (asked["max_tokens"], asked["stream"]) == (1, False)
    assert not DECODE_ONLY & set(asked)
    changed = {PARAMS, "max_tokens", "max_completion_tokens", "n", "stream"}
    kept = {key: value for key, value in body.items() if key not in DECODE_ONLY | changed}
    assert {key: value for key, value in asked.items() if key not in changed} == kept
    assert {asked.get(key) for key in ("max_completion_tokens", "n")} <= {None, 1}
    assert json.loads(decode_body(call, params)) == {**body, PARAMS: params}
    assert decode_body(call, None) == call.raw


@given(params=st.dictionaries(TEXT, VALUES, max_size=3))
def test_ps_parameters_are_taken_as_they_are(params: dict[str, Any]) -> None:
    answer = json.dumps({"choices": [], PARAMS: params}).encode()
    assert transfer_params(answer) == (params or None)


@pytest.mark.parametrize("answer", [b"", b"[]", b"1", b'{"kv_transfer_params": [1]}', b"\xff", b"[" * 10**6])
def test_an_answer_that_is_none_is_refused(answer: bytes) -> None:
    with pytest.raises(ValueError):
        transfer_params(answer)
