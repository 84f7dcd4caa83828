"""`bench serve` against a small server on a real port."""

import argparse
import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxserve.bench import serve


class FakeServer:
    """Answers `max_tokens` tokens, one event each; the model's name says what goes wrong."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.clients: set[tuple[str, int]] = set()
        self.url = ""

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
            ]
        )

    async def models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": "fake"}]})

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("authorization"))
        if request.client:
            self.clients.add((request.client.host, request.client.port))
        if body["model"] == "full":
            return JSONResponse({"error": {"message": "the queue\nis full"}}, status_code=429)
        return StreamingResponse(self.stream(body), media_type="text/event-stream")

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        chat = "messages" in body
        if chat:
            yield event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        await asyncio.sleep(0.02)
        for i in range(body["max_tokens"]):
            if body["model"] == "cut" and i == 1:
                return
            if body["model"] == "breaks" and i == 1:
                yield event({"error": {"message": "it broke", "code": 500}})
                return
            yield event({"choices": [{"delta": {"content": "x"}} if chat else {"text": "x"}]})
            await asyncio.sleep(0.002)
        length = len(body.get("prompt", "12"))
        usage = {"prompt_tokens": length, "completion_tokens": body["max_tokens"]}
        usage["prompt_tokens_details"] = {"cached_tokens": 1}
        if body["model"] != "silent":
            yield event({"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        uvicorn_server = uvicorn.Server(uvicorn.Config(server.app(), log_level="warning", lifespan="off"))
        thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield server
        uvicorn_server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive()


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return serve.run(parser.parse_args(["--disable-tqdm", *words]))


SMALL = ("--num-prompts", "6", "--input-len", "8", "--output-len", "4")


def test_one_server(fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    words = ["--base-url", fake.url, *SMALL, "--concurrency", "2", "--ignore-eos", "--api-key", "secret"]
    status = run(
        *words,
        "--goodput",
        "ttft:5000",
        "tpot:0.0001",
        "--json",
        str(path),
        "--save-detailed",
        "--plot",
        str(tmp_path / "plot.png"),
    )
    assert status == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert len(fake.bodies) == 7 and all(len(body["prompt"]) == 8 for body in fake.bodies)
    assert all(body["ignore_eos"] and body["max_tokens"] == 4 for body in fake.bodies)
    assert set(fake.keys) == {"Bearer secret"}
    assert len(fake.clients) <= 2, "connections are kept and used again"
    report = json.loads(path.read_text())
    (endpoint,) = report["endpoints"]
    summary = endpoint["summary"]
    assert (endpoint["label"], endpoint["model"], endpoint["base_url"]) == ("A", "fake", f"{fake.url}/v1")
    assert (summary["completed"], summary["failed"]) == (6, 0)
    assert (summary["prompt_tokens"], summary["output_tokens"], summary["cached_tokens"]) == (48, 24, 6)
    assert summary["goodput"] == 0.0
    assert summary["ttft"]["min"] >= 0.02 and summary["itl"]["count"] == 18
    assert summary["e2el"]["min"] >= 0.02 + 3 * 0.002
    assert len(endpoint["requests"][0]) == 6 and report["ratios"] == {}
    assert "secret" not in path.read_text()
    assert "6 requests in" in capsys.readouterr().out


def test_two_servers_take_turns_with_the_same_prompts(
    fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    words = ["--base-url", fake.url, "--base-url", f"{fake.url}/v1/", "--label", "ours", "--label", "theirs"]
    assert (
        run(*words, *SMALL, "--rounds", "3", "--warmup", "0", "--concurrency", "1", "--json", str(path)) == 0
    )
    prompts = [tuple(body["prompt"]) for body in fake.bodies]
    assert len(prompts) == 12 and len(set(prompts)) == 6
    for i in range(0, 12, 4):
        assert prompts[i : i + 2] == prompts[i + 2 : i + 4], "a round is A then B, on the same prompts"
    report = json.loads(path.read_text())
    assert [endpoint["label"] for endpoint in report["endpoints"]] == ["ours", "theirs"]
    assert [len(endpoint["rounds"]) for endpoint in report["endpoints"]] == [3, 3]
    ratio = report["ratios"]["theirs"]["request_throughput"]
    first, second = (endpoint["summary"]["request_throughput"] for endpoint in report["endpoints"])
    assert ratio["value"] == pytest.approx(second / first) and len(ratio["rounds"]) == 3
    assert "over ours" in capsys.readouterr().out


def test_a_request_rate_is_kept(fake: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    words = ["--base-url", fake.url, *SMALL, "--request-rate", "40", "--json", str(path), "--save-detailed"]
    assert run(*words, "--warmup", "0") == 0
    (endpoint,) = json.loads(path.read_text())["endpoints"]
    starts = sorted(record["start"] for record in endpoint["requests"][0])
    assert starts[-1] - starts[0] == pytest.approx(5 / 40)


def test_chat(fake: FakeServer, tmp_path: Path) -> None:
    prompts, path = tmp_path / "chats.jsonl", tmp_path / "report.json"
    prompts.write_text('{"messages": [{"role": "user", "content": "hi"}], "output_len": 2}\n')
    words = ["--base-url", fake.url, "--dataset-path", str(prompts), "--num-prompts", "2"]
    assert run(*words, "--json", str(path), "--save-detailed") == 0
    assert [body["max_tokens"] for body in fake.bodies[1:]] == [2, 2]
    (endpoint,) = json.loads(path.read_text())["endpoints"]
    assert all(len(record["arrivals"]) == 2 for record in endpoint["requests"][0])
    assert endpoint["summary"]["ttft"]["min"] >= 0.02, "the opening role is no token"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("full", "HTTP 429: the queue is full"),
        ("cut", "the stream ended before it was done"),
        ("breaks", "it broke"),
    ],
)
def test_failures_are_counted_and_named(
    fake: FakeServer, model: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--base-url", fake.url, *SMALL, "--model", model, "--warmup", "0") == 1
    printed = capsys.readouterr().out
    assert "6 FAILED" in printed and f"6 x {message}" in printed


def test_a_slow_answer_fails(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--base-url", fake.url, *SMALL, "--warmup", "0", "--timeout", "0.01") == 1
    assert "no complete answer in 0.01 s" in capsys.readouterr().out


def test_a_server_that_counts_nothing(fake: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert run("--base-url", fake.url, *SMALL, "--model", "silent", "--json", str(path)) == 0
    summary = json.loads(path.read_text())["endpoints"][0]["summary"]
    assert (summary["output_tokens"], summary["cached_tokens"]) == (24, None)


def test_a_failing_warm_up_ends_the_run(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--base-url", fake.url, *SMALL, "--model", "full") == 2
    assert len(fake.bodies) == 1 and "warm-up" in capsys.readouterr().err


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert run("--base-url", f"http://127.0.0.1:{port}", *SMALL) == 2
    assert "does not name a model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--base-url", "localhost:8000"],
        ["--label", "a", "--label", "b"],
        ["--goodput", "x:1"],
        ["--endpoint", "chat"],
        ["--dataset-path", "no/such/file.txt"],
        ["--dataset-name", "shared-prefix", "--prefix-len", "999"],
    ],
)
def test_bad_arguments_fail_before_anything_is_sent(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    assert capsys.readouterr().err.startswith("error: ")
