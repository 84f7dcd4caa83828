"""A prefill and a decode server that a test may kill and stop, and requests under way to them."""

import concurrent.futures
import http.client
import json
import os
import select
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.e2e.connectors.fleet import (
    ADMIN_KEY,
    GREEDY,
    PAGES_16,
    WAIT_S,
    Node,
    Plan,
    Prompts,
    ask,
    nixl,
    prefill,
    split_of,
    start,
    stop_all,
    text_of,
    until,
)

Alone = Callable[..., str]
"""The text of a server that no fault meets, for a prompt and fields of a request."""
LEASE_S = 8.0
"""Of the prefill server: so long its pages wait for a decode server that has died."""
BUDGET = 32
"""Tokens of a step. Few, so that a long prompt is being computed for long enough to be met in the middle."""
PLANS = tuple(
    Plan(
        name=name,
        config=config,
        page_size=16,
        num_pages=PAGES_16,
        flags=("--max-num-batched-tokens", str(BUDGET)),
    )
    for name, config in (
        ("chaos-p", nixl("kv_producer", kv_lease_duration=LEASE_S)),
        ("chaos-d", nixl("kv_consumer")),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a request ended.

    Attributes:
        status: of the answer; 0: the connection ended before there was a whole one.
        body: of an answer that is no stream, or the error that a stream ended with.
        text: what was generated, or came of it.
    """

    status: int = 0
    body: dict[str, Any] | None = None
    text: str = ""

    @property
    def cut(self) -> bool:
        """No answer, or not all of it."""
        return not self.status


class Call:
    """One request under way, on a connection of its own. Nothing is read before somebody asks."""

    def __init__(self, node: Node, prompt: Sequence[int], **fields: Any) -> None:
        address = urlsplit(node.url)
        self._connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=WAIT_S)
        self._response: http.client.HTTPResponse | None = None
        self._events: list[dict[str, Any]] = []
        body = json.dumps({**GREEDY, "prompt": list(prompt), **fields})
        self._connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})

    @property
    def answered(self) -> bool:
        """Something has come that nobody has read, be it the connection's end."""
        return bool(select.select([self._connection.sock], [], [], 0)[0])

    def disconnect(self) -> None:
        """The client goes away."""
        self._connection.close()

    def first_chunk(self) -> None:
        """Waits for the first text of a stream."""
        self._response = self._connection.getresponse()
        assert self._response.status == 200, self._response.read()
        while not any(text_in(event) for event in self._events):
            assert self._next_event(), "the stream ended without a text"

    def end(self) -> End:
        """Waits for the end, whatever it is.

        Raises:
            TimeoutError: there is none in WAIT_S.
        """
        try:
            if self._response is None:
                self._response = self._connection.getresponse()
            if self._events:
                while self._next_event():
                    pass
                text = "".join(map(text_in, self._events))
                broken = next((event for event in self._events if "error" in event), None)
                return End(status=200 if broken is None else 500, body=broken, text=text)
            body = json.loads(self._response.read())
            return End(status=self._response.status, body=body, text=text_in(body))
        except (ConnectionError, http.client.HTTPException):
            return End()
        finally:
            self.disconnect()

    def _next_event(self) -> bool:
        """Reads one event of a stream; False: it was the last, and the stream is whole."""
        assert self._response is not None
        while line := self._response.readline():
            if line.startswith(b"data: "):
                if line == b"data: [DONE]\n":
                    return False
                self._events.append(json.loads(line[6:]))
                return True
        raise http.client.IncompleteRead(b"")


def text_in(answer: dict[str, Any]) -> str:
    """What an answer, or an event of a stream, says; "": nothing, or it is an error."""
    return answer["choices"][0]["text"] if answer.get("choices") else ""


def census(node: Node) -> dict[str, Any]:
    """What a server's pages are for, at this moment."""
    with onlooker() as client:
        return census_through(client, node)


def onlooker() -> httpx.Client:
    """A connection for those who look often: to open one takes longer than to ask."""
    return httpx.Client(headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=60, trust_env=False)


def census_through(client: httpx.Client, node: Node) -> dict[str, Any]:
    """The same through an onlooker's connection."""
    answer = client.get(f"{node.url}/debug/pages").raise_for_status().json()
    assert sum(answer["pages"].values()) == answer["total"] == PAGES_16 - 1, answer
    return answer


def clear(*nodes: Node) -> None:
    """Waits until every request has ended and every page has come back."""
    for node in nodes:
        until(lambda node=node: _is_clear(census(node)), f"all pages of {node.url} are back")


def _is_clear(seen: dict[str, Any]) -> bool:
    held = (seen["pages"]["in_use"], seen["leases"], *seen["in_moves"].values(), *seen["requests"].values())
    return seen["current"] and not any(held)


@dataclass(slots=True, kw_only=True)
class Duo:
    """The two servers. Each keeps its ports when it is started again.

    Attributes:
        prefill, decode: their present lives.
        side_channel_port: of the prefill server.
        lives: that began after another; what each printed is in a folder of its own.
    """

    prefill: Node
    decode: Node
    side_channel_port: int
    folder: Path
    lives: int = 0

    @classmethod
    def begin(cls, ports: Sequence[int], folder: Path) -> "Duo":
        """Starts both side by side. `ports`: of the prefill server, its side channel, the decode server."""
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            asked = (
                threads.submit(start, PLANS[0], ports[0], folder, ports[1]),
                threads.submit(start, PLANS[1], ports[2], folder),
            )
        failed = [future.exception() for future in asked if future.exception() is not None]
        if failed:
            stop_all(future.result() for future in asked if future.exception() is None)
            raise RuntimeError(failed[0])
        p, d = (future.result() for future in asked)
        return cls(prefill=p, decode=d, side_channel_port=ports[1], folder=folder)

    def revive(self) -> None:
        """Whoever stands goes on, whoever is dead begins another life at its old address."""
        if not _goes_on(self.prefill):
            self.prefill = start(PLANS[0], port_of(self.prefill), self._next_folder(), self.side_channel_port)
        if not _goes_on(self.decode):
            self.decode = start(PLANS[1], port_of(self.decode), self._next_folder())

    def _next_folder(self) -> Path:
        self.lives += 1
        folder = self.folder / str(self.lives)
        folder.mkdir()
        return folder

    def stop(self) -> list[int]:
        """Ends both; their exit codes."""
        return stop_all((self.prefill, self.decode))


def port_of(node: Node) -> int:
    """Where it answers."""
    return int(node.url.rpartition(":")[2])


def _goes_on(node: Node) -> bool:
    assert node.server is not None
    if node.server.process.poll() is not None:
        return False
    os.kill(node.pid, signal.SIGCONT)
    return True


def kill(node: Node) -> None:
    """-9, stopped or not."""
    assert node.server is not None
    node.server.process.kill()
    node.server.process.wait()


def continued(node: Node, prompt: list[int], end: End) -> str:
    """D's text for a prompt that P has answered."""
    assert end.status == 200 and end.body is not None
    return text_of(ask(node.url, prompt, kv_transfer_params=end.body["kv_transfer_params"]))


def assert_well(duo: Duo, asked: Prompts, alone: Alone) -> None:
    """All pages are back, and D reads from P what P computes."""
    clear(duo.prefill, duo.decode)
    prompt = asked.take(50)
    answer = ask(duo.decode.url, prompt, kv_transfer_params=prefill(duo.prefill.url, prompt))
    assert split_of(answer) == (0, 0, 50)
    assert text_of(answer) == alone(prompt)
    clear(duo.prefill, duo.decode)
