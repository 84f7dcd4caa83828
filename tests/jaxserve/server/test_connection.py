"""A real port: clients that leave, stall, flood or talk nonsense, and their neighbours who notice nothing."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable, Generator

import httpx
import pytest

from jaxserve.server import ServerOptions
from tests.jaxserve.server.catalogue import CHAT, COMPLETIONS
from tests.jaxserve.server.conftest import Live, live_server
from tests.jaxserve.server.fake_engine import FakeEngine

PROMPT = {"model": "fake", "prompt": "hi"}
ENDLESS = PROMPT | {"max_tokens": 2000}
QUICK = ServerOptions(
    port=0,
    header_timeout_s=0.3,
    body_timeout_s=0.4,
    write_timeout_s=0.5,
    keep_alive_s=1,
    max_connections=20,
)


@pytest.fixture
def quick(engine: FakeEngine) -> Generator[Live, None, None]:
    with live_server(engine, QUICK) as running:
        yield running


def until(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    """Waits until the condition holds; the seconds it took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, "it did not happen"
        time.sleep(0.005)
    return time.monotonic() - begin


@contextlib.contextmanager
def raw(live: Live, data: bytes = b"") -> Generator[socket.socket, None, None]:
    with socket.socket() as connection:
        # Bounds what the kernel takes for a client that does not read; only honoured before connecting.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.settimeout(10)
        connection.connect(("127.0.0.1", live.port))
        connection.sendall(data)
        yield connection


def request_bytes(path: str, body: dict[str, object], extra: str = "") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{extra}"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def one_answer(connection: socket.socket) -> bytes:
    """A short answer whose head and body may come apart."""
    data = b""
    while b"\r\n\r\n" not in data or not data.endswith(b"}"):
        data += connection.recv(65536)
    return data


def everything(connection: socket.socket) -> bytes:
    """What the server sends until it closes."""
    parts: list[bytes] = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def serves(live: Live) -> bool:
    response = httpx.post(live.url + COMPLETIONS, json=PROMPT | {"max_tokens": 2}, timeout=5)
    return response.status_code == 200 and response.json()["choices"][0]["text"] == "Hello wörld"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [
    (COMPLETIONS, ENDLESS),
    (COMPLETIONS, ENDLESS | {"prompt": ["a", "b", "c"], "n": 2}),
    (CHAT, {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}),
])  # fmt: skip
@pytest.mark.parametrize("waiting", [False, True], ids=["answering", "before-the-first-token"])
def test_a_client_that_leaves_is_aborted_at_once(
    live: Live,
    path: str,
    body: dict[str, object],
    stream: bool,
    waiting: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = live.engine
    engine.step_s = 60.0 if waiting else 0.01
    with raw(live, request_bytes(path, body | {"stream": stream})) as connection:
        until(lambda: bool(engine.running))
        if stream and not waiting:
            assert b"data: " in connection.recv(65536) + connection.recv(65536)
        expected = len(engine.running)
    assert until(lambda: not engine.running) < 1.0
    assert len(engine.aborted) == expected
    until(lambda: httpx.get(f"{live.url}/load").json() == {"server_load": 0})
    engine.step_s = 0.0
    assert serves(live)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_fifty_clients_that_leave(live: Live) -> None:
    live.engine.step_s = 0.005
    for moment in range(50):
        with raw(live, request_bytes(COMPLETIONS, ENDLESS | {"stream": True})):
            time.sleep(moment / 5000)
    until(lambda: not live.engine.running)
    live.engine.step_s = 0.0
    assert serves(live)


def test_chunks_arrive_one_by_one(live: Live) -> None:
    gate = asyncio.Semaphore(1)
    live.engine.gate = gate
    body = PROMPT | {"stream": True, "max_tokens": 3}
    with httpx.stream("POST", live.url + COMPLETIONS, json=body) as response:
        texts: list[str] = []
        for line in filter(None, response.iter_lines()):
            if line == "data: [DONE]":
                break
            texts.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
            # The next token is not made before the last one has arrived.
            live.loop.call_soon_threadsafe(gate.release)
    assert texts == ["Hello", " wörld", ","]


def test_answers_are_not_delayed(live: Live) -> None:
    """Nagle's algorithm would hold the body back until the client's delayed acknowledgement of the head."""
    with httpx.Client(base_url=live.url) as client:
        assert client.get("/health").status_code == 200
        (connection,) = live.server.server_state.connections
        sock = connection.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def shrink_send_buffer(live: Live, client_port: int) -> bool:
    """Bounds what the kernel takes from the server for one client; False: it is not there yet."""
    for connection in live.server.server_state.connections:
        sock = connection.transport.get_extra_info("socket")
        if sock.getpeername()[1] == client_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
            return True
    return False


def test_a_client_slower_than_the_engine_gets_all_of_it_in_fewer_chunks(live: Live) -> None:
    body = ENDLESS | {"stream": True, "n": 8, "return_token_ids": True}
    body["stream_options"] = {"include_usage": True}
    with raw(live) as connection:
        port = connection.getsockname()[1]
        until(lambda: live.call(shrink_send_buffer(live, port)))
        connection.sendall(request_bytes(COMPLETIONS, body, "Connection: close\r\n"))
        until(lambda: bool(live.engine.running))
        until(lambda: not live.engine.running, 20)
        time.sleep(0.2)
        text = everything(connection).decode()
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert chunks[-1]["usage"]["completion_tokens"] == 8 * 2000
    ids = [chunk["choices"][0]["token_ids"] for chunk in chunks[:-1]]
    assert sum(map(len, ids)) == 8 * 2000
    assert len(ids) < 8 * 2000 / 2


def test_a_client_that_reads_nothing_is_cut_off(quick: Live) -> None:
    body = ENDLESS | {"stream": True, "n": 64, "logprobs": 5}
    with raw(quick) as connection:
        quick.engine.step_s = 0.005
        connection.sendall(request_bytes(COMPLETIONS, body))
        until(lambda: bool(quick.engine.running))
        until(lambda: bool(quick.engine.aborted), 20)
        until(lambda: quick.server.server_state.connections == set(), 5)
    quick.engine.step_s = 0.0
    assert serves(quick)


def test_slow_heads_and_bodies_end_with_408(quick: Live) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 10\r\n"
    for sent in (b"", b"G", head, head + b"\r\n", head + b'\r\n{"a":'):
        with raw(quick, sent) as connection:
            begin = time.monotonic()
            answer = everything(connection)
            assert answer.startswith(b"HTTP/1.1 408 "), sent
            assert b'"request_timeout"' in answer
            assert time.monotonic() - begin < 4
    assert serves(quick)


def test_a_slow_second_head_ends_with_408(quick: Live) -> None:
    with raw(quick, b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n") as connection:
        assert one_answer(connection).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /vers")
        assert everything(connection).startswith(b"HTTP/1.1 408 ")


def test_an_idle_connection_is_closed_quietly(quick: Live) -> None:
    with raw(quick, b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n") as connection:
        assert one_answer(connection).startswith(b"HTTP/1.1 200 ")
        assert everything(connection) == b""


def test_connections_over_the_cap_are_told(quick: Live) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(QUICK.max_connections):
            held.enter_context(raw(quick))
        until(lambda: len(quick.server.server_state.connections) >= QUICK.max_connections)
        with raw(quick) as connection:
            answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: " in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "server_is_overloaded"
    until(lambda: len(quick.server.server_state.connections) == 0)
    assert serves(quick)


NONSENSE = [
    b"\x00\x01\x02\x03\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: wild\r\n\r\n",
]


@pytest.mark.parametrize("data", NONSENSE, ids=repr)
def test_nonsense_is_answered_in_json_and_closed(live: Live, data: bytes) -> None:
    with raw(live, data) as connection:
        head, _, body = everything(connection).partition(b"\r\n\r\n")
    assert head.split()[1] in (b"400", b"501")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert serves(live)


@pytest.mark.parametrize(
    "data",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\n\r\n",
        b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n",
    ],
    ids=["http2", "h2c", "websocket"],
)
def test_other_protocols_are_not_spoken(live: Live, data: bytes) -> None:
    with raw(live, data) as connection:
        assert everything(connection)[:13] in (b"HTTP/1.1 200 ", b"HTTP/1.1 404 ")
    assert serves(live)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 101 + b"\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\na: " + b"b" * 100_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\na: " + b"b" * 10_000_000,
    ],
    ids=["101", "20000", "100k", "10M"],
)
def test_heads_that_are_too_large(live: Live, head: bytes) -> None:
    with raw(live) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(head)
        assert everything(connection)[:13] in (b"HTTP/1.1 431 ", b"")
    assert serves(live)


def test_a_body_over_the_cap_is_answered_before_it_is_read(live: Live) -> None:
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with raw(live, f"{head}Content-Length: 5368709120\r\n\r\n".encode()) as connection:
        begin = time.monotonic()
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
        assert time.monotonic() - begin < 1
    huge = f"{head}Expect: 100-continue\r\nContent-Length: 5368709120\r\n\r\n".encode()
    with raw(live, huge) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_chunked_body_over_the_cap_is_refused_at_the_cap(live: Live) -> None:
    def endless() -> Generator[bytes, None, None]:
        while True:
            yield b" " * 65536

    headers = {"content-type": "application/json"}
    with contextlib.suppress(httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        response = httpx.post(live.url + COMPLETIONS, content=endless(), headers=headers, timeout=20)
        assert response.status_code == 413
    assert serves(live)


def test_a_refused_body_can_be_sent_to_its_end(live: Live) -> None:
    """Closing at once would reset the connection, and some systems then drop the answer unread."""
    size = 32 << 20
    head = "POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with raw(live, f"{head}Content-Length: {size}\r\n\r\n".encode()) as connection:
        connection.sendall(b" " * size)
        assert everything(connection).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("size", [2 << 20, 40 << 20])
def test_a_whole_client_sees_the_413(live: Live, size: int) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(live.url + COMPLETIONS, content=b" " * size, headers=headers, timeout=20)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    assert response.headers["connection"] == "close"


def test_pipelined_requests_are_served_in_order(live: Live) -> None:
    requests = [request_bytes(COMPLETIONS, PROMPT | {"echo": True, "prompt": f"<{i}>"}) for i in range(50)]
    last = b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with raw(live, b"".join(requests) + last) as connection:
        text = everything(connection).decode()
    found = [text.index(f'"<{i}>Hello') for i in range(50)]
    assert found == sorted(found)


def test_two_framings_at_once_are_not_smuggled(live: Live) -> None:
    smuggled = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\nGET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    )
    with raw(live, smuggled) as connection:
        connection.settimeout(1)
        with contextlib.suppress(TimeoutError):
            connection.recv(65536)
    assert serves(live)


def test_a_hundred_bad_neighbours(live: Live) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(100):
            held.enter_context(raw(live, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"))
        assert serves(live)
