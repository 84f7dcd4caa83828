"""The router and the plain proxy ask P and D for the same."""

from collections.abc import Callable

import httpx
import pytest

from tests.e2e import plain_proxy
from tests.jaxserve.router.conftest import FakeServer, answer_with, decoded, prefilled, routing

Start = Callable[..., FakeServer]

BODIES = [
    ("/v1/completions", {"prompt": "a", "max_tokens": 5, "min_tokens": 2, "temperature": 0}),
    ("/v1/completions", {"prompt": [1, 2], "stream": True, "stream_options": {"include_usage": True}}),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 5},
    ),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_both_ask_the_same_of_p_and_d(start: Start, path: str, body: dict) -> None:
    p, d = start(prefilled), start(decoded)
    plain = plain_proxy.complete(p.url, d.url, path, body)
    with routing([p.url], [d.url]) as router:
        routed = router.client.post(path, json=body)
    assert plain.content == routed.content
    for server in (p, d):
        first, second = server.asked
        assert (first.path, first.body) == (second.path, second.body)


def test_d_gets_the_clients_body_where_p_gives_nothing(start: Start) -> None:
    p, d = start(answer_with(200, {"kv_transfer_params": None})), start(decoded)
    plain_proxy.complete(p.url, d.url, "/v1/completions", {"prompt": "a"})
    assert d.asked[0].body == {"prompt": "a"}


def test_ps_refusal_is_an_error(start: Start) -> None:
    p, d = start(answer_with(400)), start(decoded)
    with pytest.raises(httpx.HTTPStatusError):
        plain_proxy.complete(p.url, d.url, "/v1/completions", {"prompt": "a"})
    assert not d.asked
