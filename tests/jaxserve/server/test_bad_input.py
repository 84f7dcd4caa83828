"""Every bad request of the catalogue, and that nobody else notices."""

import asyncio

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.api import chat, completions
from jaxserve.server import ServerOptions, create_app
from tests.jaxserve.server.catalogue import CHAT, COMPLETIONS, Bad, catalogue
from tests.jaxserve.server.fake_engine import FakeEngine

GOOD = {"model": "fake", "prompt": "hi", "max_tokens": 3}
ERROR_FIELDS = {"message", "type", "param", "code"}
MAX_ERROR_BYTES = 4096
CASES = catalogue("fake", FakeEngine.vocab_size, FakeEngine.max_model_len)


def check_error(response: httpx.Response, bad: Bad) -> None:
    """The answer is the expected error, small, and whole."""
    assert response.status_code == bad.status, response.text
    error = response.json()["error"]
    assert set(error) == ERROR_FIELDS
    assert error["type"] == "invalid_request_error"
    assert error["param"] == bad.param, error
    assert bad.code in (None, error["code"])
    assert len(response.content) <= MAX_ERROR_BYTES
    assert response.headers["x-request-id"]


def test_the_catalogue_is_whole() -> None:
    names = [bad.name for bad in CASES]
    assert len(names) == len(set(names)) > 400


def test_each_is_refused_by_name_and_the_next_request_works(engine: FakeEngine) -> None:
    async def all_of_them() -> list[str]:
        failures: list[str] = []
        transport = httpx.ASGITransport(create_app(engine, ServerOptions()))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            for bad in CASES:
                response = await client.post(bad.path, content=bad.body, headers=bad.headers)
                seen = len(engine.seen)
                after = await client.post(COMPLETIONS, json=GOOD)
                try:
                    check_error(response, bad)
                    assert after.status_code == 200
                    assert len(engine.seen) == seen + 1
                except AssertionError as failure:
                    failures.append(f"{bad.name}: {failure}")
        return failures

    assert asyncio.run(all_of_them()) == []
    assert all(request.prompt_token_ids == (104, 105) for request in engine.seen)


ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=4), below, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(sorted(completions.KNOWN | chat.KNOWN | {"tokens", "return_token_strs", "nonsense"}))
VALID = {
    COMPLETIONS: GOOD,
    CHAT: {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [104]},
}


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(VALID)), st.dictionaries(FIELDS, ANY_JSON, max_size=4), st.booleans())
def test_no_json_makes_a_server_error(path: str, changes: dict[str, object], from_valid: bool) -> None:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(FakeEngine(), ServerOptions()))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post(path, json=(VALID[path] if from_valid else {}) | changes)

    response = asyncio.run(once())
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        assert set(response.json()["error"]) == ERROR_FIELDS
        assert len(response.content) <= MAX_ERROR_BYTES


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(VALID)), st.binary(max_size=100))
def test_no_bytes_make_a_server_error(path: str, body: bytes) -> None:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(FakeEngine(), ServerOptions()))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post(path, content=body, headers={"content-type": "application/json"})

    assert asyncio.run(once()).status_code in (200, 400, 404)


@pytest.mark.parametrize("unknown", [{"a_new_field": "secret"}, {"x\n" * 50: 1}])
def test_unknown_keys_are_ignored_with_one_line(
    engine: FakeEngine, unknown: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    async def three() -> list[int]:
        transport = httpx.ASGITransport(create_app(engine, ServerOptions()))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return [(await client.post(COMPLETIONS, json=GOOD | unknown)).status_code for _ in range(3)]

    with caplog.at_level("WARNING", logger="jaxserve"):
        assert asyncio.run(three()) == [200, 200, 200]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "secret" not in lines[0] and "\n" not in lines[0]
