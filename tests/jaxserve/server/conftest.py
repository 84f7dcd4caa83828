"""A fake engine behind the real application: in this process, or behind a real port in a thread."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import pytest

from jaxserve.server import ServerOptions, create_app, reserve_port
from jaxserve.server.run import Server
from tests.jaxserve.server.fake_engine import FakeEngine

T = TypeVar("T")


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@contextlib.asynccontextmanager
async def asgi_client(engine: FakeEngine, options: ServerOptions | None = None):
    app = create_app(engine, options or ServerOptions())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


@pytest.fixture
def ask(engine: FakeEngine) -> Callable[..., httpx.Response]:
    """Sends one request to an application around `engine`."""

    def send(method: str, path: str, options: ServerOptions | None = None, **request: Any) -> httpx.Response:
        async def once() -> httpx.Response:
            async with asgi_client(engine, options) as client:
                return await client.request(method, path, **request)

        return asyncio.run(once())

    return send


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """A server on a real port. `call` runs a coroutine on its loop and gives the result."""

    engine: FakeEngine
    port: int
    server: Server
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout=30)


@contextlib.contextmanager
def live_server(engine: FakeEngine, options: ServerOptions) -> Generator[Live, None, None]:
    sock = reserve_port(options)
    server = Server(create_app(engine, options), engine, options)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve(sockets=[sock])))
    thread.start()
    live = Live(engine=engine, port=sock.getsockname()[1], server=server, loop=loop)
    try:
        for _ in range(100):
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{live.url}/health").raise_for_status()
                break
        yield live
    finally:
        loop.call_soon_threadsafe(setattr, server, "should_exit", True)
        thread.join(timeout=30)
        sock.close()
        loop.close()


@pytest.fixture
def live(engine: FakeEngine) -> Generator[Live, None, None]:
    with live_server(engine, ServerOptions(port=0)) as running:
        yield running
