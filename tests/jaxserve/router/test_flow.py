"""What P and D are asked, what the client gets, and what happens when one of them fails."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from jaxserve.server import ServerOptions
from tests.jaxserve.router.conftest import (
    PARAMS,
    WAIT_S,
    Cut,
    FakeServer,
    answer_with,
    decoded,
    hang,
    prefilled,
    routing,
)

Start = Callable[..., FakeServer]

SIX_KEYS = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_p_computes_the_prompt_and_d_answers(start: Start, path: str) -> None:
    p, d = start(prefilled), start(decoded)
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "grüß dich ☃"}],
        "max_tokens": 7,
        "max_completion_tokens": 7,
        "min_tokens": 2,
        "n": 2,
        "temperature": 0.5,
        "seed": 2**53 + 1,
        "logprobs": True,
        "top_logprobs": 3,
    }
    with routing([p.url], [d.url]) as router:
        response = router.client.post(
            path, json=body, headers={"X-Request-Id": "mine", "Authorization": "Bearer k"}
        )
    assert (response.status_code, response.json()) == (200, {"choices": [{"text": "hello"}]})
    assert response.headers["x-backend"] == "d"
    assert response.headers.get_list("x-request-id") == ["mine"]
    (to_p,), (to_d,) = p.asked, d.asked
    kept = {key: body[key] for key in ("model", "messages", "temperature", "seed")}
    one = {"max_tokens": 1, "max_completion_tokens": 1, "n": 1, "stream": False}
    assert to_p.body == kept | one | {"kv_transfer_params": SIX_KEYS}
    assert to_d.body == body | {"kv_transfer_params": PARAMS}
    assert to_p.path == to_d.path == path
    for asked in (to_p, to_d):
        assert asked.headers["x-request-id"] == "mine"
        assert asked.headers["authorization"] == "Bearer k"


def test_a_request_without_an_id_gets_one_for_all_three(start: Start) -> None:
    p, d = start(prefilled), start(decoded)
    with routing([p.url], [d.url]) as router:
        response = router.complete()
    ids = {p.asked[0].headers["x-request-id"], d.asked[0].headers["x-request-id"]}
    assert ids == {response.headers["x-request-id"]}


def test_a_header_that_is_no_ascii_is_passed_on(start: Start) -> None:
    p, d = start(prefilled), start(decoded)
    with routing([p.url], [d.url]) as router:
        key = "Bearer schlüssel".encode("latin-1")
        response = router.client.post(
            "/v1/completions", json={"prompt": "a"}, headers={b"authorization": key}
        )
    assert response.status_code == 200
    assert {asked.headers["authorization"] for asked in (*p.asked, *d.asked)} == {"Bearer schlüssel"}


def test_a_stream_passes_through_chunk_by_chunk(start: Start) -> None:
    """The second chunk is not made before the client has the first."""
    chunks = [b'data: {"a":"\xc3', b'\xa9"}\n\n', b"data: [DONE]\n\n"]
    release = threading.Semaphore(0)

    async def stream(request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            for chunk in chunks:
                yield chunk
                await asyncio.to_thread(release.acquire, timeout=WAIT_S)

        return StreamingResponse(parts(), media_type="text/event-stream")

    p, d = start(prefilled), start(stream)
    body = {"prompt": "hi", "stream": True, "stream_options": {"include_usage": True}}
    with routing([p.url], [d.url]) as router:
        with router.client.stream("POST", "/v1/completions", json=body) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            got = []
            for chunk in response.iter_raw():
                got.append(chunk)
                release.release()
        assert got == chunks
        assert router.metrics()['requests_total{outcome="ok"}'] == 1
    assert "stream_options" not in p.asked[0].body
    assert p.asked[0].body["stream"] is False
    assert d.asked[0].body == body | {"kv_transfer_params": PARAMS}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"prompt": "a", "prompt_logprobs": 0}, "prompt_logprobs"),
        ({"prompt": "a", "echo": True, "logprobs": 0}, "prompt_logprobs"),
        ({"prompt": ["a", "b"]}, "several_prompts"),
        ({"prompt": [[1], [2]]}, "several_prompts"),
        ({"prompt": "a", "truncate_prompt_tokens": -1}, "truncation"),
    ],
)
def test_what_pages_from_elsewhere_would_falsify_goes_to_d_alone(
    start: Start, body: dict, reason: str
) -> None:
    p, d = start(prefilled), start(decoded)
    raw = json.dumps(body, indent=3).encode()
    with routing([p.url], [d.url]) as router:
        response = router.client.post(
            "/v1/completions", content=raw, headers={"content-type": "application/json"}
        )
        assert response.status_code == 200
        assert router.metrics()[f'direct_total{{reason="{reason}"}}'] == 1
    assert not p.asked
    assert d.asked[0].raw == raw


@pytest.mark.parametrize("prompt", [["a"], [[1, 2]], [1, 2]])
def test_one_prompt_in_a_list_goes_through_p(start: Start, prompt: list) -> None:
    p, d = start(prefilled), start(decoded)
    with routing([p.url], [d.url]) as router:
        assert router.complete(prompt=prompt).status_code == 200
    assert p.asked[0].body["prompt"] == prompt
    assert d.asked[0].body["kv_transfer_params"] == PARAMS


def test_requests_go_round_the_servers(start: Start) -> None:
    ps, ds = [start(prefilled) for _ in range(2)], [start(decoded) for _ in range(2)]
    with routing([p.url for p in ps], [d.url for d in ds]) as router:
        for _ in range(4):
            router.complete()
    assert [len(server.asked) for server in (*ps, *ds)] == [2, 2, 2, 2]


def test_ps_refusal_reaches_the_client_and_d_is_not_asked(start: Start) -> None:
    refusal = {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": None}}
    p, d = start(answer_with(429, refusal, **{"retry-after": "3"})), start(decoded)
    with routing([p.url], [d.url]) as router:
        response = router.complete()
        assert (response.status_code, response.json()) == (429, refusal)
        assert response.headers["retry-after"] == "3"
        assert router.metrics()['requests_total{outcome="client_error"}'] == 1
    assert not d.asked


@pytest.mark.parametrize("failure", ["status", "cut", "nonsense"])
def test_another_p_is_asked_when_one_fails(start: Start, failure: str) -> None:
    async def cut(request: Request) -> Response:
        return Cut(b"", "application/json")

    bad = {"status": answer_with(503), "cut": cut, "nonsense": answer_with(200, ["no", "object"])}[failure]
    first, second, d = start(bad), start(prefilled), start(decoded)
    with routing([first.url, second.url], [d.url]) as router:
        assert router.complete().status_code == 200
        found = router.metrics()
    assert (len(first.asked), len(second.asked)) == (1, 1)
    assert d.asked[0].body["kv_transfer_params"] == PARAMS
    assert found['retries_total{role="prefill"}'] == 1
    assert 'fallbacks_total{reason="prefill_failed"}' not in found


def test_the_only_p_is_asked_once_more_and_then_d_computes(start: Start) -> None:
    p, d = start(answer_with(500)), start(decoded)
    with routing([p.url], [d.url]) as router:
        assert router.complete(max_tokens=3).status_code == 200
        found = router.metrics()
    assert len(p.asked) == 2
    assert d.asked[0].body == {"model": "m", "prompt": "hi", "max_tokens": 3}
    assert found['retries_total{role="prefill"}'] == 1
    assert found['fallbacks_total{reason="prefill_failed"}'] == 1


def test_d_computes_when_p_is_killed(start: Start) -> None:
    p, d = start(prefilled), start(decoded)
    with routing([p.url], [d.url]) as router:
        p.stop()
        assert [router.complete().status_code for _ in range(2)] == [200, 200]
        found = router.metrics()
        assert router.client.get("/health").status_code == 503
    assert found['fallbacks_total{reason="prefill_failed"}'] == 1
    assert found['fallbacks_total{reason="no_prefill_server"}'] == 1
    assert found[f'backend_up{{role="decode",url="{d.url}"}}'] == 1
    assert f'backend_up{{role="prefill",url="{p.url}"}}' not in found


@pytest.mark.parametrize("params", [None, {}])
def test_d_gets_no_parameters_where_p_gives_none(start: Start, params: dict | None) -> None:
    p, d = start(answer_with(200, {"choices": [], "kv_transfer_params": params})), start(decoded)
    with routing([p.url], [d.url]) as router:
        assert router.complete().status_code == 200
        assert router.metrics()['fallbacks_total{reason="no_params"}'] == 1
    assert "kv_transfer_params" not in d.asked[0].body


def test_a_p_that_is_too_slow_is_given_up(start: Start) -> None:
    p, d = start(decoded), start(decoded)
    p.answer = hang(p)
    with routing([p.url], [d.url], prefill_timeout_s=0.2) as router:
        assert router.complete().status_code == 200
        assert router.metrics()['fallbacks_total{reason="prefill_failed"}'] == 1
    assert p.gone.wait(WAIT_S)


@pytest.mark.parametrize("failure", ["status", "cut", "killed"])
def test_another_d_is_asked_with_the_same_parameters(start: Start, failure: str) -> None:
    async def cut(request: Request) -> Response:
        return Cut(b"", "text/event-stream")

    bad = {"status": answer_with(503), "cut": cut, "killed": decoded}[failure]
    p, first, second = start(prefilled), start(bad), start(decoded)
    with routing([p.url], [first.url, second.url]) as router:
        if failure == "killed":
            first.stop()
        assert router.complete().json() == {"choices": [{"text": "hello"}]}
        assert router.metrics()['retries_total{role="decode"}'] == 1
    assert len(p.asked) == 1
    assert second.asked[0].body["kv_transfer_params"] == PARAMS


def test_ds_own_error_reaches_the_client_where_there_is_no_other_d(start: Start) -> None:
    p, d = start(prefilled), start(answer_with(503, {"error": {"message": "busy"}}))
    with routing([p.url], [d.url]) as router:
        response = router.complete()
        assert (response.status_code, response.json()) == (503, {"error": {"message": "busy"}})
        assert router.metrics()['requests_total{outcome="server_error"}'] == 1
    assert len(d.asked) == 1


def test_no_d_is_a_502_and_then_a_503(start: Start) -> None:
    p, d = start(prefilled), start(decoded)
    with routing([p.url], [d.url]) as router:
        d.stop()
        first, second = router.complete(), router.complete()
        assert (first.status_code, first.json()["error"]["code"]) == (502, "bad_gateway")
        assert (second.status_code, second.json()["error"]["type"]) == (503, "server_error")
        assert second.headers["retry-after"]
        p.stop()
        assert router.complete().status_code == 503
        assert router.metrics()['requests_total{outcome="server_error"}'] == 3


@pytest.mark.parametrize("half", [b'data: {"a":1}\n\n', b'data: {"a":'])
def test_a_stream_that_breaks_ends_with_an_error_event(start: Start, half: bytes) -> None:
    async def cut(request: Request) -> Response:
        return Cut(half, "text/event-stream")

    p, d = start(prefilled), start(cut)
    with routing([p.url], [d.url]) as router:
        events = router.complete(stream=True).content.split(b"\n\n")
        assert router.metrics()['requests_total{outcome="broken"}'] == 1
    assert events[0] == half.strip()
    assert json.loads(events[1].removeprefix(b"data: "))["error"]["code"] == "bad_gateway"
    assert events[2:] == [b"data: [DONE]", b""]


def test_a_whole_answer_that_breaks_is_cut(start: Start) -> None:
    async def cut(request: Request) -> Response:
        return Cut(b'{"choices": [', "application/json")

    p, d = start(prefilled), start(cut)
    with routing([p.url], [d.url]) as router:
        with pytest.raises(httpx.RemoteProtocolError):
            router.complete()
        assert router.metrics()['requests_total{outcome="broken"}'] == 1


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_client_that_leaves_aborts_the_call_behind(start: Start, stage: str) -> None:
    p, d = start(prefilled), start(decoded)
    waiting = p if stage == "prefill" else d
    waiting.answer = hang(waiting)
    with routing([p.url], [d.url]) as router:

        async def leave() -> None:
            async with httpx.AsyncClient(trust_env=False, timeout=WAIT_S) as client:
                asking = asyncio.create_task(
                    client.post(f"{router.client.base_url}/v1/completions", json={"prompt": "hi"})
                )
                await asyncio.to_thread(waiting.began.wait, WAIT_S)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)

        asyncio.run(leave())
        assert waiting.gone.wait(WAIT_S)
        while router.client.get("/load").json()["server_load"]:
            pass
        assert router.metrics()['requests_total{outcome="aborted"}'] == 1
    assert len(d.asked) == (stage == "decode")


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_server_that_falls_silent_is_given_up(start: Start, stage: str) -> None:
    """Its connections stay open and nothing answers, as after SIGSTOP."""
    p, d, spare = start(prefilled), start(decoded), start(decoded)
    stopped = p if stage == "prefill" else d
    stopped.answer = hang(stopped)

    async def health() -> int:
        if stopped.began.is_set():
            await asyncio.sleep(WAIT_S)
        return 200

    stopped.health = health
    decode = [d.url] if stage == "prefill" else [d.url, spare.url]
    with routing([p.url], decode, probe_interval_s=0.02, probe_timeout_s=0.1) as router:
        assert router.complete().status_code == 200
        found = router.metrics()
    if stage == "prefill":
        assert found['fallbacks_total{reason="prefill_failed"}'] == 1
    else:
        assert found['retries_total{role="decode"}'] == 1
        assert spare.asked[0].body["kv_transfer_params"] == PARAMS
    assert stopped.gone.wait(WAIT_S)


def test_d_computes_where_it_refuses_ps_parameters(start: Start) -> None:
    """Keys that differ, or a lease that is over, are not the client's fault."""

    async def refuse(request: Request) -> Response:
        if "kv_transfer_params" in await request.json():
            return JSONResponse({"error": {"message": "no", "param": "kv_transfer_params"}}, 400)
        return await decoded(request)

    p, d = start(prefilled), start(refuse)
    with routing([p.url], [d.url]) as router:
        assert router.complete().json() == {"choices": [{"text": "hello"}]}
        found = router.metrics()
    assert found['fallbacks_total{reason="params_refused"}'] == 1
    assert found['requests_total{outcome="ok"}'] == 1
    assert d.asked[1].body == {"model": "m", "prompt": "hi"}


@pytest.mark.parametrize("refusal", [{"error": {"param": "prompt"}}, {"error": "text"}, []])
def test_ds_refusal_of_the_request_reaches_the_client(start: Start, refusal: object) -> None:
    p, d = start(prefilled), start(answer_with(400, refusal))
    with routing([p.url], [d.url]) as router:
        response = router.complete()
        assert (response.status_code, response.json()) == (400, refusal)
        assert router.metrics()['requests_total{outcome="client_error"}'] == 1
    assert len(d.asked) == 1


def test_an_answer_of_p_that_is_no_json_object_is_a_failure(start: Start) -> None:
    p, d = start(answer_with(200, {"kv_transfer_params": "text"})), start(decoded)
    with routing([p.url], [d.url]) as router:
        assert router.complete().status_code == 200
        assert router.metrics()['fallbacks_total{reason="prefill_failed"}'] == 1
    assert "kv_transfer_params" not in d.asked[0].body


def test_a_drain_lets_requests_finish_within_its_time(start: Start) -> None:
    release = threading.Event()

    async def later(request: Request) -> Response:
        await asyncio.to_thread(release.wait, WAIT_S)
        return JSONResponse({"choices": []})

    p, d = start(prefilled), start(later)
    with routing([p.url], [d.url]) as router:
        results: list[int] = []
        asking = threading.Thread(target=lambda: results.append(router.complete().status_code))
        asking.start()
        assert d.began.wait(WAIT_S)
        router.server.handle_exit(15, None)
        with httpx.Client(base_url=router.client.base_url, trust_env=False) as client:
            while client.get("/ready").status_code == 200:
                pass
            assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 503
        release.set()
        asking.join(WAIT_S)
        assert results == [200]
    assert router.server.exit_code == 0


def test_a_drain_that_takes_too_long_ends_what_runs(start: Start) -> None:
    p, d = start(prefilled), start(decoded)
    d.answer = hang(d)
    with routing([p.url], [d.url], ServerOptions(port=0, shutdown_timeout_s=0.05)) as router:
        results: list[int] = []
        asking = threading.Thread(target=lambda: results.append(router.complete().status_code))
        asking.start()
        assert d.began.wait(WAIT_S)
        router.server.handle_exit(15, None)
        asking.join(WAIT_S)
    assert results == [503]
    assert d.gone.wait(WAIT_S)


class Lingering(Response):
    """Everything is sent, the end is not: a client that has all it needs goes before."""

    def __init__(self, body: bytes, release: threading.Event, *, media_type: str, sized: bool) -> None:
        super().__init__(body, media_type=media_type)
        self._release = release
        if not sized:
            del self.headers["content-length"]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        await asyncio.to_thread(self._release.wait, WAIT_S)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_with_its_whole_answer_has_not_aborted(start: Start, stream: bool) -> None:
    release = threading.Event()
    body = b"data: {}\n\ndata: [DONE]\n\n" if stream else b'{"choices": []}'

    async def answer(request: Request) -> Response:
        media_type = "text/event-stream" if stream else "application/json"
        return Lingering(body, release, media_type=media_type, sized=not stream)

    p, d = start(prefilled), start(answer)
    with routing([p.url], [d.url]) as router:
        got = b""
        with router.client.stream(
            "POST", "/v1/completions", json={"prompt": "hi", "stream": stream}
        ) as response:
            for chunk in response.iter_raw():
                got += chunk
                if got == body:
                    break
        while router.client.get("/load").json()["server_load"]:
            pass
        release.set()
        found = router.metrics()
        assert found['requests_total{outcome="ok"}'] == 1
        assert not found.get('requests_total{outcome="aborted"}')
