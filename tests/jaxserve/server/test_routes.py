"""The small routes, keys, request ids and errors of the edge."""

from collections.abc import Callable

import httpx
import pytest
from starlette.routing import Route

from jaxserve.server import ServerOptions, create_app
from jaxserve.server.edge import PUBLIC_PATHS
from tests.jaxserve.server.catalogue import CHAT, COMPLETIONS
from tests.jaxserve.server.fake_engine import FakeEngine

Ask = Callable[..., httpx.Response]

KEYED = ServerOptions(api_keys=("first-key", "second-key"))
RUN = ServerOptions(admin_key="admin-key")
BOTH = ServerOptions(api_keys=("first-key", "second-key"), admin_key="admin-key")
AS_ADMIN = {"Authorization": "Bearer admin-key"}
PROMPT = {"model": "fake", "prompt": "hi"}


def test_models(ask: Ask) -> None:
    cards = ask("GET", "/v1/models").json()
    assert [card["id"] for card in cards["data"]] == ["fake", "alias/with-slash"]
    assert cards["data"][0]["max_model_len"] == 2048
    assert ask("GET", "/v1/models/alias/with-slash").json()["root"] == "fake"
    missing = ask("GET", "/v1/models/nope")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_health_and_readiness(ask: Ask, engine: FakeEngine) -> None:
    def codes() -> list[int]:
        return [ask("GET", path).status_code for path in ("/health", "/ping", "/ready")]

    assert codes() == [200, 200, 200]
    engine.is_stalled = True
    assert codes() == [200, 200, 503]
    engine.is_stalled, engine.alive = False, False
    assert codes() == [503, 503, 503]


def test_small_answers(ask: Ask, engine: FakeEngine) -> None:
    assert ask("GET", "/version").json() == {"version": ServerOptions().version}
    assert ask("GET", "/load").json() == {"server_load": 0}
    metrics = ask("GET", "/metrics")
    assert (metrics.text, metrics.headers["content-type"][:10]) == ("fake_running 0\n", "text/plain")
    assert ask("POST", "/reset_prefix_cache").json() == {"success": True}
    assert engine.resets == 1
    assert ask("POST", "/reset_prefix_cache?reset_external=true").json() == {"success": True}
    assert engine.resets == 11


def test_the_census_of_pages(ask: Ask, engine: FakeEngine) -> None:
    assert ask("GET", "/debug/pages", RUN, headers=AS_ADMIN).json() == {
        "current": True,
        "total": 48,
        "pages": {"free": 40, "idle": 2, "in_use": 6},
        "in_moves": {"loading": 2, "storing": 1, "leased": 2, "quarantined": 1},
        "leases": 2,
        "requests": {"live": 0, "running": 1, "waiting": 5},
        "host_tiers": {"SimpleCPUOffloadConnector": {"slots": 192, "used": 9, "pinned": 4, "storing": 1}},
    }
    engine.alive = False
    stopped = ask("GET", "/debug/pages", RUN, headers=AS_ADMIN)
    assert stopped.status_code == 200 and stopped.json()["current"] is False
    assert ask("POST", "/debug/pages", RUN, headers=AS_ADMIN).status_code == 405


@pytest.mark.parametrize("key", ["", "Bearer", "Bearer ", "Bearer wrong", "Bearer first-key", "admin-key"])
@pytest.mark.parametrize("options", [RUN, BOTH], ids=["admin", "both"])
def test_the_census_of_pages_needs_the_admin_key(ask: Ask, options: ServerOptions, key: str) -> None:
    for method in ("GET", "POST", "HEAD"):
        refused = ask(method, "/debug/pages", options, headers={"Authorization": key})
        assert refused.status_code == 401
    assert ask("GET", "/debug/pages", options).json()["error"]["message"] == (
        "The admin key is missing or wrong."
    )
    assert ask("GET", "/debug/pages", options, headers=AS_ADMIN).status_code == 200


@pytest.mark.parametrize("options", [ServerOptions(), KEYED], ids=["open", "keyed"])
@pytest.mark.parametrize("key", ["", "Bearer", "Bearer ", "Bearer None", "Bearer first-key"])
def test_without_an_admin_key_nobody_sees_the_census(ask: Ask, options: ServerOptions, key: str) -> None:
    refused = ask("GET", "/debug/pages", options, headers={"Authorization": key})
    error = refused.json()["error"]
    assert (refused.status_code, error["type"], error["code"]) == (403, "permission_error", "no_admin_key")
    assert "--admin-api-key" in error["message"]


@pytest.mark.parametrize(
    "path", ["/debug/pages/", "/debug/", "/debug/nope", "/%64ebug/pages", "/debug%2Fpages"]
)
def test_paths_near_the_census_need_the_admin_key_too(ask: Ask, path: str) -> None:
    assert ask("GET", path).status_code == 403
    assert ask("GET", path, BOTH, headers={"Authorization": "Bearer first-key"}).status_code == 401


def test_the_admin_key_is_no_clients_key(ask: Ask) -> None:
    assert ask("GET", "/v1/models", BOTH, headers=AS_ADMIN).status_code == 401
    assert ask("GET", "/v1/models", RUN).status_code == 200


def test_tokenize_and_back(ask: Ask) -> None:
    reply = ask("POST", "/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert reply == {
        "count": 3,
        "max_model_len": 2048,
        "tokens": [104, 195, 169],
        "token_strs": ["h", "�", "�"],
    }
    assert ask("POST", "/detokenize", json={"tokens": reply["tokens"], "model": "fake"}).json() == {
        "prompt": "hé"
    }
    chat = {"model": "fake", "messages": [{"role": "user", "content": "a"}]}
    assert ask("POST", "/tokenize", json=chat).json()["count"] == len("user: a\nassistant:")
    closed = chat | {"add_generation_prompt": False, "return_token_strs": False}
    assert ask("POST", "/tokenize", json=closed).json()["count"] == len("user: a\n")
    assert ask("POST", "/tokenize", json={"prompt": ""}).json()["count"] == 0
    assert ask("POST", "/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def routes_of(engine: FakeEngine) -> list[Route]:
    routes = [route for route in create_app(engine, KEYED).routes if isinstance(route, Route)]
    assert len(routes) == len(create_app(engine, KEYED).routes)
    return routes


def test_every_route_but_the_public_ones_needs_a_key(ask: Ask, engine: FakeEngine) -> None:
    for route in routes_of(engine):
        path = route.path.replace("{name:path}", "fake")
        for method in route.methods or ():
            code = ask(method, path, BOTH).status_code
            assert (code == 401) == (route.path not in PUBLIC_PATHS), (method, path, code)
    assert {route.path for route in routes_of(engine)} > PUBLIC_PATHS


@pytest.mark.parametrize(
    "path",
    [
        "/nope",
        "/health/",
        "//health",
        "/HEALTH",
        "/health%2f",
        "/v1%2fmodels",
        "/%76%31/models",
    ],
)
def test_paths_near_public_ones_need_a_key_too(ask: Ask, path: str) -> None:
    assert ask("GET", path, KEYED).status_code == 401


def test_an_encoded_public_path_is_the_route_it_names(ask: Ask) -> None:
    assert ask("GET", "/%68ealth", KEYED).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "")],
        [("Authorization", "Bearer")],
        [("Authorization", "Bearer ")],
        [("Authorization", "Bearer wrong")],
        [("Authorization", "Bearer first-key second-key")],
        [("Authorization", "Basic first-key")],
        [("Authorization", "first-key")],
        [("Authorization", "Bearer first-key"), ("Authorization", "Bearer first-key")],
        [("Authorization", "Bearer " + "é" * 100)],
        [("X-Api-Key", "first-key")],
    ],
    ids=str,
)
def test_wrong_keys_all_look_the_same(ask: Ask, headers: list[tuple[str, str]]) -> None:
    encoded = [(name.encode(), value.encode()) for name, value in headers]
    response = ask("GET", "/v1/models", KEYED, headers=encoded)
    assert response.status_code == 401
    assert response.json() == {
        "error": {
            "message": "The API key is missing or wrong.",
            "type": "authentication_error",
            "param": None,
            "code": "invalid_api_key",
        }
    }


@pytest.mark.parametrize("key", ["first-key", "second-key"])
def test_right_keys(ask: Ask, key: str) -> None:
    headers = {"Authorization": f"bearer {key}"}
    assert ask("GET", "/v1/models", KEYED, headers=headers).status_code == 200
    assert ask("POST", COMPLETIONS, KEYED, headers=headers, json=PROMPT).status_code == 200


def test_without_keys_any_header_will_do(ask: Ask) -> None:
    assert ask("GET", "/v1/models", headers={"Authorization": "Bearer anything"}).status_code == 200


def test_keys_do_not_show() -> None:
    assert "first-key" not in repr(BOTH) and "admin-key" not in repr(BOTH)


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-123", "abc-123"), ("a b", "a b"), ("a\tb", "a?b"), ("x" * 200, "x" * 128)],
)
def test_request_ids_are_kept(ask: Ask, given: str, kept: str) -> None:
    headers = {"X-Request-Id": given}
    assert ask("GET", "/health", headers=headers).headers["x-request-id"] == kept
    assert ask("GET", "/nope", headers=headers).headers["x-request-id"] == kept
    assert ask("POST", COMPLETIONS, headers=headers, json=PROMPT).headers["x-request-id"] == kept


def test_request_ids_are_made(ask: Ask) -> None:
    made = {
        ask("GET", "/health", headers=headers).headers["x-request-id"]
        for headers in ({}, {}, {"X-Request-Id": ""})
    }
    assert len(made) == 3 and all(len(value) == 32 for value in made)


def test_unknown_paths_and_methods(ask: Ask) -> None:
    missing = ask("GET", "/nope")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert ask("GET", "/v1/completions/").status_code == 404
    for method in ("GET", "DELETE", "TRACE", "OPTIONS", "PUT"):
        response = ask(method, CHAT)
        assert (response.status_code, response.headers["allow"]) == (405, "POST")
        assert response.json()["error"]["code"] == "method_not_allowed"
    assert set(ask("POST", "/health").headers["allow"].split(", ")) == {"GET", "HEAD"}
    assert ask("HEAD", "/health").status_code == 200


def test_too_many_headers(ask: Ask) -> None:
    for headers in ({f"h{i}": "x" for i in range(101)}, {"h": "x" * 40_000}):
        response = ask("GET", "/health", headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (431, "headers_too_large")


def test_a_fault_of_ours_shows_nothing_and_is_logged_with_its_id(
    ask: Ask, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(accept: str) -> tuple[bytes, str]:
        raise RuntimeError("secret at 0x7f00")

    monkeypatch.setattr(engine, "metrics_text", broken)
    response = ask("GET", "/metrics", headers={"X-Request-Id": "find-me"})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"
    assert any("find-me" in record.getMessage() for record in caplog.records)
    assert ask("GET", "/health").status_code == 200
