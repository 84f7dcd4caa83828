"""`kv_transfer_params` on its way to the engine and back, and what the answers say of the transfer."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from kv.moves import LOAD_FAILED
from scheduler.types import FinishReason
from tests.jaxserve.server.catalogue import CHAT, COMPLETIONS, FORGED
from tests.jaxserve.server.fake_engine import REMOTE, TERMS, FakeEngine

Ask = Callable[..., httpx.Response]

ROUTES = [
    (COMPLETIONS, {"model": "fake", "prompt": "hi", "max_tokens": 3}),
    (CHAT, {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}),
]
both_routes = pytest.mark.parametrize(("path", "body"), ROUTES)

DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""What vLLM's toy proxy sends to the prefill engine."""

PREFILL = FORGED | {"mac": "good"}


@pytest.fixture
def engine() -> FakeEngine:
    engine = FakeEngine()
    engine.moves = True
    return engine


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@both_routes
def test_a_lease_is_asked_for_and_its_terms_come_back(
    ask: Ask, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    reply = ask("POST", path, json=body | {"kv_transfer_params": DECODE, "cache_salt": "tenant"})
    assert reply.json()["kv_transfer_params"] == TERMS
    (request,) = engine.seen
    assert request.lease and request.remote is None
    assert engine.opened == [(DECODE, request.prompt_token_ids, "tenant")]


@both_routes
def test_a_stream_ends_with_the_terms(ask: Ask, path: str, body: dict[str, Any]) -> None:
    asked = body | {
        "kv_transfer_params": DECODE,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    parts = chunks(ask("POST", path, json=asked))
    with_terms = [part for part in parts if "kv_transfer_params" in part]
    assert [part["kv_transfer_params"] for part in with_terms] == [TERMS]
    assert with_terms[0]["choices"][0]["finish_reason"] == "length"
    assert with_terms[0] is parts[-2]


@both_routes
@pytest.mark.parametrize("params", [None, {}])
def test_nothing_asked_is_nothing_answered(
    ask: Ask, engine: FakeEngine, path: str, body: dict[str, Any], params: object
) -> None:
    whole = ask("POST", path, json=body | {"kv_transfer_params": params})
    assert whole.status_code == 200
    assert "kv_transfer_params" not in whole.json()
    assert all(
        "kv_transfer_params" not in part for part in chunks(ask("POST", path, json=body | {"stream": True}))
    )
    assert engine.opened == []
    assert [(request.lease, request.remote) for request in engine.seen] == [(False, None)] * 2


@both_routes
@pytest.mark.parametrize("n", [1, 3])
def test_a_peers_pages_reach_the_engine_and_usage_says_where_tokens_came_from(
    ask: Ask, engine: FakeEngine, path: str, body: dict[str, Any], n: int
) -> None:
    """`cached_tokens` is the peer's number; the three sources are ours and sum to the prompt."""
    asked = body | {"kv_transfer_params": PREFILL, "n": n}
    reply = ask("POST", path, json=asked).json()
    (request,) = engine.seen
    assert request.remote == REMOTE and not request.lease
    assert "kv_transfer_params" not in reply
    tokens = len(request.prompt_token_ids)
    expected = {
        "cached_tokens": REMOTE.cached_tokens,
        "local_compute": 0,
        "local_cache_hit": tokens // 2,
        "external_kv_transfer": tokens - tokens // 2,
    }
    assert reply["usage"]["prompt_tokens_details"] == expected
    streamed = asked | {"stream": True, "stream_options": {"include_usage": True}}
    assert chunks(ask("POST", path, json=streamed))[-1]["usage"] == reply["usage"]


@both_routes
def test_a_forged_source_is_refused_in_one_line(
    ask: Ask, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    reply = ask("POST", path, json=body | {"kv_transfer_params": FORGED})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == "kv_transfer_params"
    assert error["message"] == "`kv_transfer_params` is refused: not sealed by?a peer"
    assert engine.seen == []


@both_routes
def test_an_engine_without_a_connector_names_the_flag(
    ask: Ask, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    engine.moves = False
    reply = ask("POST", path, json=body | {"kv_transfer_params": DECODE})
    assert reply.status_code == 400
    assert "--kv-transfer-config" in reply.json()["error"]["message"]


@both_routes
def test_a_lease_is_for_one_sequence(ask: Ask, engine: FakeEngine, path: str, body: dict[str, Any]) -> None:
    reply = ask("POST", path, json=body | {"kv_transfer_params": DECODE, "n": 2})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "n")
    assert engine.seen == []


def test_parameters_go_with_one_prompt(ask: Ask, engine: FakeEngine) -> None:
    path, body = ROUTES[0]
    reply = ask("POST", path, json=body | {"kv_transfer_params": PREFILL, "prompt": ["a", "b"]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "kv_transfer_params")
    assert engine.opened == []
    assert ask("POST", path, json=body | {"kv_transfer_params": PREFILL, "prompt": ["a"]}).status_code == 200


@both_routes
@pytest.mark.parametrize("stream", [False, True])
def test_a_load_that_failed_is_told(
    ask: Ask, engine: FakeEngine, path: str, body: dict[str, Any], stream: bool
) -> None:
    engine.finish, engine.message = FinishReason.ERROR, LOAD_FAILED
    reply = ask("POST", path, json=body | {"kv_transfer_params": PREFILL, "stream": stream})
    assert reply.status_code == 500
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "kv_load_failed")
    assert "kv_load_failure_policy" in error["message"]
