"""A router on a real port, between fake servers on real ports; each in a thread of this process."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxserve.router import RouterOptions, RouterServer
from jaxserve.server import ServerOptions, reserve_port

PARAMS = {
    "do_remote_prefill": True,
    "remote_engine_id": "p",
    "remote_block_ids": [[1, 2]],
    "seal": "aGVsbG8=",
}
WAIT_S = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request that a fake server got."""

    path: str
    headers: dict[str, str]
    raw: bytes

    @property
    def body(self) -> dict[str, Any]:
        return json.loads(self.raw)


Answer = Callable[[Request], Awaitable[Response]]


@dataclass(eq=False)
class FakeServer:
    """A backend that answers as a test says; `gone` is set when a client left before its answer was whole."""

    answer: Answer
    asked: list[Asked] = field(default_factory=list)
    health: Callable[[], Awaitable[int]] | None = None
    began: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)
    port: int = 0
    stop: Callable[[], None] = lambda: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self, request: Request) -> Response:
        asked = Asked(path=request.scope["path"], headers=dict(request.headers), raw=await request.body())
        self.asked.append(asked)
        self.began.set()
        return await self.answer(request)

    async def _health(self, request: Request) -> Response:
        return Response(status_code=200 if self.health is None else await self.health())

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/{path:path}", self._serve, methods=["GET", "POST"]),
            ]
        )


async def prefilled(request: Request) -> Response:
    """P's ordinary answer."""
    return JSONResponse({"choices": [{"text": "x"}], "kv_transfer_params": PARAMS})


async def decoded(request: Request) -> Response:
    """D's ordinary answer."""
    return JSONResponse({"choices": [{"text": "hello"}]}, headers={"x-backend": "d"})


def answer_with(status: int, body: object = None, **headers: str) -> Answer:
    async def answer(request: Request) -> Response:
        return JSONResponse(body, status, headers)

    return answer


def hang(server: FakeServer) -> Answer:
    """Never answers; notes when the client goes."""

    async def answer(request: Request) -> Response:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        server.gone.set()
        return Response()

    return answer


class Cut(Response):
    """Sends some bytes, then cuts the connection."""

    def __init__(self, first: bytes, media_type: str) -> None:
        super().__init__(media_type=media_type)
        self._first = first

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", self.media_type.encode())] if self.media_type else []
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if self._first:
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
        raise ConnectionAbortedError("cut")


@contextlib.contextmanager
def _in_thread(server: uvicorn.Server, sock: Any) -> Generator[Callable[[], None], None, None]:
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
    thread.start()

    def stop() -> None:
        server.force_exit = server.should_exit = True
        thread.join(timeout=WAIT_S)
        sock.close()

    try:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/health"
        for _ in range(100):
            with contextlib.suppress(httpx.TransportError):
                httpx.get(url, trust_env=False)
                break
        yield stop
    finally:
        stop()


@pytest.fixture
def start() -> Generator[Callable[[Answer], FakeServer], None, None]:
    """Starts a fake server."""
    servers: list[uvicorn.Server] = []
    with contextlib.ExitStack() as stack:

        def begin(answer: Answer) -> FakeServer:
            fake = FakeServer(answer)
            sock = reserve_port(ServerOptions(port=0))
            fake.port = sock.getsockname()[1]
            config = uvicorn.Config(
                fake.app(), loop="asyncio", lifespan="off", log_config=None, access_log=False, ws="none"
            )
            servers.append(uvicorn.Server(config))
            fake.stop = stack.enter_context(_in_thread(servers[-1], sock))
            return fake

        yield begin
        for server in servers:
            server.force_exit = server.should_exit = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """A running router and a client of it."""

    server: RouterServer
    client: httpx.Client

    def complete(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        return self.client.post(path, json={"model": "m", "prompt": "hi", **body})

    def metrics(self) -> dict[str, float]:
        """Every sample but buckets by its name and labels, where it is not zero."""
        lines = self.client.get("/metrics").text.splitlines()
        samples = [line.rpartition(" ") for line in lines if line.startswith("jaxserve_router_")]
        return {
            name.removeprefix("jaxserve_router_"): float(value)
            for name, _, value in samples
            if "_bucket" not in name
            and not name.endswith(("_created", "_sum", "_in_flight"))
            and float(value)
        }


@contextlib.contextmanager
def routing(
    prefill: list[str], decode: list[str], server: ServerOptions | None = None, **options: Any
) -> Generator[Router, None, None]:
    """A router before these servers. Its health checks do not repeat unless the test says so."""
    settings = RouterOptions(
        prefill=tuple(prefill),
        decode=tuple(decode),
        server=server or ServerOptions(port=0),
        **{"probe_interval_s": 600.0, **options},
    )
    sock = reserve_port(settings.server)
    running = RouterServer(settings)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    with _in_thread(running, sock), httpx.Client(base_url=url, trust_env=False, timeout=WAIT_S) as client:
        yield Router(server=running, client=client)
