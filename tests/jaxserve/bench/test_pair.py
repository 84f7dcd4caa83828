"""What a pair costs is read from what its clients and metrics say."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.bench.pair import (
    LENGTHS,
    MESSAGES,
    STREAM_TOKENS,
    WAKES,
    Pair,
    PairError,
    Seen,
    costs_of,
    measure_pair,
    with_streams,
)
from jaxserve.sim.costs import LATENESS_S, step_clock
from scheduler.types import Rows
from tests.sim.tables import PAGE_BYTES, PAGE_SIZE, table

PAIR = Pair(router="http://r", prefill="http://p", decode="http://d")


def chunk(start: int, count: int) -> Rows:
    one = np.ones(1, np.int32)
    return Rows(
        slots=0 * one,
        starts=one * start,
        lens=one * count,
        samples=one > 0,
        num_outputs=0 * one,
        tokens=np.zeros(count, np.int32),
        page_tables=(np.zeros((1, 1), np.int32),),
    )


def prefill_s(tokens: int, seconds: Callable[[Rows], float]) -> float:
    """Chunks of the budget, 64 tokens."""
    return sum(seconds(chunk(start, min(64, tokens - start))) for start in range(0, tokens, 64))


def load_s(tokens: int, fixed: float, message: float, rate: float) -> float:
    moved = -(-tokens // PAGE_SIZE) * PAGE_BYTES / rate
    return fixed + moved + MESSAGES * message + WAKES * LATENESS_S


@given(
    st.floats(0, 0.1),
    st.floats(0, 0.1),
    st.floats(1e3, 1e9),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0.8, 3),
)
def test_known_costs_are_found_again(fixed, message, rate, server, router, lending):
    seconds = step_clock(table())
    through = [
        Seen(
            prompt_tokens=tokens,
            client_s=2 * server + router + prefill_s(tokens, seconds) + decode_s,
            prefill_s=prefill_s(tokens, seconds),
            decode_s=decode_s,
            read_s=fixed,
        )
        for tokens in LENGTHS
        if (decode_s := load_s(tokens, fixed, message, rate) + seconds(chunk(tokens - 1, 1)))
    ]
    slower = [replace(seen, prefill_s=lending * seen.prefill_s) for seen in through]
    made = costs_of(through, [server], table(), at_work=slower)
    assert made.transfer is not None and made.http is not None
    assert made.transfer.fixed_s == pytest.approx(fixed, abs=1e-5)
    assert made.transfer.message_s == pytest.approx(message, abs=1e-4)
    if rate < 1e7:  # beyond, the bytes take less than the rest can be told from
        assert made.transfer.bytes_per_s == pytest.approx(rate, rel=0.05)
    assert made.transfer.lending == pytest.approx(max(1.0, lending))
    assert made.http.server_s == pytest.approx(server)
    assert made.http.router_s == pytest.approx(router, abs=1e-9)


@given(st.floats(0, 0.1), st.floats(0, 0.1))
def test_what_streams_take_beyond_their_steps_is_the_hosts(fixed, per_row):
    bare = replace(table(), host_s=0.0, host_row_s=0.0)
    device = {1: 0.002, 2: 0.002, 4: 0.004}
    streams = [(rows, base + 36 * 1e-5 + fixed + per_row * rows) for rows, base in device.items()]
    made = with_streams(streams, bare)
    assert made.host_s == pytest.approx(fixed, abs=1e-5)
    assert made.host_row_s == pytest.approx(per_row, abs=1e-5)
    assert replace(made, host_s=0.0, host_row_s=0.0) == bare


class Servers(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """A router and two servers, as their clients see them; every wait moves one clock."""

    def __init__(self, *, reads: bool = True) -> None:
        self.now, self.reads = 0.0, reads
        self.sums = {host: dict.fromkeys(("first", "ended", "read"), 0.0) for host in "pd"}

    def clock(self) -> float:
        return self.now

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """A stream: every token of every client moves the clock by 0.5 s."""
        assert request.url.host == "d"

        async def tokens():
            for token in range(STREAM_TOKENS):
                self.now += 0.5
                yield f"data: {json.dumps({'choices': [{'token_ids': [token]}]})}\n\n".encode()
                await asyncio.sleep(0)
            yield b"data: [DONE]\n\n"

        return httpx.Response(200, content=tokens())

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        host, path = request.url.host, request.url.path
        if path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        if path == "/metrics":
            sums = self.sums[host]
            names = {"first": "time_to_first_token_seconds", "ended": "e2e_request_latency_seconds"}
            names |= {"read": "nixl_xfer_time_seconds"} if host == "d" and self.reads else {}
            lines = [
                f"# TYPE vllm:{name} histogram\nvllm:{name}_count 1\nvllm:{name}_sum {sums[key]}"
                for key, name in names.items()
            ]
            return httpx.Response(200, text="\n".join(lines) + "\n")
        tokens = len(json.loads(request.content)["prompt"])
        if host == "p":
            self.sums["p"]["first"] += 1.0
            self.now += 1.0 + 0.003
        else:
            decode = load_s(tokens, 0.001, 0.002, 1e6) + 0.5
            self.sums["p"]["ended"] += 2.0
            self.sums["d"]["first"] += decode
            self.sums["d"]["read"] += 0.001
            self.now += 2.0 + decode + 2 * 0.003 + 0.004
        chunks = [{"choices": [{"token_ids": [1]}]}, {"choices": [{"token_ids": [2]}]}]
        lines = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
        return httpx.Response(200, text=lines + "data: [DONE]\n\n")


def test_a_pair_is_measured_through_its_router():
    """The table's own steps take nothing, so that all of a token's 0.5 s are the host's."""
    costs = table(max_model_len=4096)
    free = tuple(replace(own, base_s=0.0, by_context_s=0.0, by_pair_s=0.0) for own in costs.buckets)
    bare = replace(costs, buckets=free, transfer=None, http=None)
    servers = Servers()
    made = measure_pair(PAIR, bare, transport=servers, clock=servers.clock)
    assert made.host_s + made.host_row_s == pytest.approx(0.5)
    assert made.http is not None and made.transfer is not None
    assert made.http.server_s == pytest.approx(0.003)
    assert made.http.router_s == pytest.approx(0.004)
    assert made.transfer.bytes_per_s == pytest.approx(1e6, rel=1e-3)
    assert made.transfer.fixed_s == pytest.approx(0.001)
    assert made.transfer.message_s == pytest.approx(0.002, rel=1e-3)
    again = replace(made, transfer=None, http=None, host_s=bare.host_s, host_row_s=bare.host_row_s)
    assert again == bare


def test_servers_that_are_no_pair_are_refused():
    servers = Servers(reads=False)
    with pytest.raises(PairError, match="has read no pages"):
        measure_pair(PAIR, table(), transport=servers, clock=servers.clock)
    refusing = httpx.MockTransport(lambda request: httpx.Response(503))
    with pytest.raises(PairError, match="503"):
        measure_pair(PAIR, table(), transport=refusing)
