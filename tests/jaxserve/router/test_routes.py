"""The router's own routes, its bounds, and what a bad request meets before any server is asked."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxserve.config import ConfigError
from jaxserve.router import RouterOptions
from jaxserve.router.ask import MAX_BODY_BYTES
from jaxserve.router.counts import RouterStats, families
from jaxserve.server import ServerOptions
from tests.jaxserve.router.conftest import FakeServer, answer_with, decoded, prefilled, routing

ROOT = Path(__file__).resolve().parents[3]
Start = Callable[..., FakeServer]


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b'{"prompt": "\xff"}', None),
        (b'{"prompt": "a", "prompt": "b"}', "prompt"),
        (b'{"temperature": NaN}', "temperature"),
        (b'{"seed": 123456789012345678901234567890}', "seed"),
        (b"[" * 100_000, None),
        (b'{"max_tokens": 9223372036854775808}', "max_tokens"),
        (b'{"max_tokens": -1}', "max_tokens"),
        (b'{"max_tokens": "5"}', "max_tokens"),
        (b'{"n": 1.5}', "n"),
        (b'{"stream": 1}', "stream"),
        (b'{"stream_options": {}}', "stream_options"),
        (b'{"kv_transfer_params": {"do_remote_prefill": true}}', "kv_transfer_params"),
    ],
)
def test_a_bad_body_is_refused_before_any_server_is_asked(
    start: Start, raw: bytes, param: str | None
) -> None:
    p, d = start(prefilled), start(decoded)
    with routing([p.url], [d.url]) as router:
        response = router.client.post(
            "/v1/completions", content=raw, headers={"content-type": "application/json"}
        )
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        assert router.metrics()['requests_total{outcome="client_error"}'] == 1
    assert not p.asked and not d.asked


def test_bounds_of_the_edge_hold(start: Start) -> None:
    p, d = start(prefilled), start(decoded)
    with routing([p.url], [d.url]) as router:
        big = b'{"prompt": "' + b"a" * MAX_BODY_BYTES + b'"}'
        json_type = {"content-type": "application/json"}
        assert router.client.post("/tokenize", content=big, headers=json_type).status_code == 413
        assert router.client.post("/v1/completions", content=b"{}").status_code == 415
        assert router.client.get("/v1/completions").status_code == 405
        assert router.client.get("/nowhere").json()["error"]["code"] == "not_found"
        assert router.client.get("/health", headers={"a": "b" * 40_000}).status_code == 431
    assert not p.asked and not d.asked


def test_large_numbers_reach_both_servers_unchanged(start: Start) -> None:
    p, d = start(prefilled), start(decoded)
    raw = b'{"prompt": "a", "seed": -9223372036854775808, "x": 12345678901234567890, "y": 0.1, "z": 1e308}'
    with routing([p.url], [d.url]) as router:
        router.client.post("/v1/completions", content=raw, headers={"content-type": "application/json"})
    for asked in (*p.asked, *d.asked):
        assert {key: asked.body[key] for key in json.loads(raw)} == json.loads(raw)


def test_keys_are_asked_for(start: Start) -> None:
    p, d = start(prefilled), start(decoded)
    with routing([p.url], [d.url], ServerOptions(port=0, api_keys=("k",))) as router:
        refused = router.complete()
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert router.client.get("/health").status_code == 200
        router.client.headers["authorization"] = "Bearer k"
        assert router.complete().status_code == 200
    assert len(p.asked) == 1


def test_models_and_tokens_are_ds(start: Start) -> None:
    p, d = start(prefilled), start(answer_with(200, {"object": "list"}))
    with routing([p.url], [d.url]) as router:
        for path in ("/v1/models", "/v1/models/some/name%20x", "/v1/models/a%3Fb%23c"):
            assert router.client.get(path).json() == {"object": "list"}
        for path in ("/tokenize", "/detokenize"):
            assert router.client.post(path, json={"prompt": "a"}).json() == {"object": "list"}
    assert [asked.path for asked in d.asked] == [
        *("/v1/models", "/v1/models/some/name x", "/v1/models/a?b#c", "/tokenize", "/detokenize")
    ]
    assert d.asked[3].body == {"prompt": "a"}
    assert not p.asked


def test_no_path_leads_out_of_the_routes_that_are_passed_on(start: Start) -> None:
    p, d = start(prefilled), start(decoded)
    with routing([p.url], [d.url]) as router:
        for path in ("/v1/models/%2e%2e/%2e%2e/metrics", "/v1/models/..%2f..%2freset_prefix_cache"):
            assert router.client.get(path).status_code == 404
    assert not d.asked


def test_another_d_lists_the_models_when_one_is_gone(start: Start) -> None:
    p, first, second = start(prefilled), start(decoded), start(answer_with(200, {"object": "list"}))
    with routing([p.url], [first.url, second.url]) as router:
        first.stop()
        assert [router.client.get("/v1/models").status_code for _ in range(2)] == [200, 200]
        second.stop()
        assert router.client.get("/v1/models").status_code == 503


def test_health_needs_a_server_of_each_role(start: Start) -> None:
    p, d = start(prefilled), start(decoded)
    statuses = [503]

    async def health() -> int:
        return statuses[0]

    p.health = health
    with routing([p.url], [d.url], probe_interval_s=0.02) as router:
        assert router.client.get("/health").status_code == 503
        assert router.client.get("/healthcheck").json() == {
            "status": "degraded",
            "prefill_instances": 1,
            "decode_instances": 1,
            "prefill_healthy": 0,
            "decode_healthy": 1,
        }
        statuses[0] = 200
        while router.client.get("/ready").status_code != 200:
            pass
        assert router.client.get("/health").status_code == 200
        assert router.client.get("/healthcheck").json()["status"] == "ok"


def test_metrics_are_exact(start: Start) -> None:
    p, d = start(prefilled), start(decoded)
    with routing([p.url], [d.url]) as router:
        for _ in range(3):
            router.complete()
        router.complete(prompt_logprobs=1)
        router.complete(n=-1)
        assert router.metrics() == {
            'requests_total{outcome="ok"}': 4,
            'requests_total{outcome="client_error"}': 1,
            'direct_total{reason="prompt_logprobs"}': 1,
            f'backend_up{{role="prefill",url="{p.url}"}}': 1,
            f'backend_up{{role="decode",url="{d.url}"}}': 1,
            "prefill_seconds_count": 3,
            "decode_first_byte_seconds_count": 4,
            "decode_seconds_count": 4,
        }


def test_every_series_and_route_is_explained(start: Start) -> None:
    text = (ROOT / "docs/features/disaggregated_serving.md").read_text("utf-8")
    routes, _, series = text.partition("## Routes")[2].partition("## Metrics")
    shown = families(RouterStats.empty(), [("prefill", "u", True)], 0)
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", series, re.MULTILINE))
    assert rows == {family.name: family.kind for family in shown}
    labels = {label for family in shown for sample in family.samples for label in sample.labels} - {"u"}
    assert labels <= set(re.findall(r"`(\w+)`", series))
    with routing([start(prefilled).url], [start(decoded).url]) as router:
        paths = {route.path for route in router.server.config.app.routes}
    assert {path.replace("{name:path}", "{name}") for path in paths} == set(
        re.findall(r"`(?:POST )?(/[^`]*)`", routes)
    )


@pytest.mark.parametrize(
    "urls",
    [
        {"prefill": (), "decode": ("http://a",)},
        {"prefill": ("http://a",), "decode": ("ftp://a",)},
        {"prefill": ("http://a:99999",), "decode": ("http://b",)},
        {"prefill": ("http://",), "decode": ("http://b",)},
        {"prefill": ("http://a/?x=1",), "decode": ("http://b",)},
        {"prefill": ("http://a", "http://a"), "decode": ("http://b",)},
    ],
)
def test_wrong_backends_are_refused(urls: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(ConfigError, match=r"--prefill|--decode"):
        RouterOptions(**urls)


def test_the_router_imports_no_jax() -> None:
    code = "import sys, jaxserve.cli.router; sys.exit('jax' in sys.modules or 'jaxlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
