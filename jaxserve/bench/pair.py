"""What HTTP, a router and transfers cost, measured at a running pair of prefill and decode servers.

Requests go one at a time through the router and to the servers. A client sees the whole; the servers' metrics
say how much of it was the engines'. What is left are HTTP and the router; what the decode engine takes until
its first token, beyond the one step that it computes, are the transfer and its messages; and what the prefill
engine takes over its steps, while the decode server works, is what lending costs it. And the decode server
streams to several clients at once: what a token takes beyond its step is the host's.
"""

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.bench.client import Ask, Endpoint, request
from jaxserve.bench.datasets import random_prompts
from jaxserve.sim.costs import LATENESS_S, CostTable, HttpCost, TransferCost, fit, step_clock
from scheduler.types import Rows

LENGTHS = (32, 256, 512, 1024)
"""Tokens of the prompts whose pages are moved."""

ROUNDS = 8
MESSAGES = 4
"""Of the protocol behind a handshake, one way: question and answer before the read, and after it."""

WAKES = 8
"""Of threads on the way of a load, which a simulation has too."""

STREAM_PROMPT_TOKENS, STREAM_TOKENS, WORK_TOKENS = 16, 40, 400

NO_SLOWER_THAN = 1e12
"""Bytes per second, where the measured times do not grow with the bytes."""


class PairError(RuntimeError):
    """The servers are no pair that can be measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """URLs, without a slash at the end."""

    router: str
    prefill: str
    decode: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """How requests are sent. Attributes: model: its name there. transport: None: the network."""

    model: str
    transport: httpx.BaseTransport | None
    clock: Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One request through the pair, in seconds.

    Attributes:
        client_s: to the first token, at the client.
        prefill_s: at the prefill engine, from its arrival to its end.
        decode_s: at the decode engine, to the first token.
        read_s: of that, NIXL's own.
    """

    prompt_tokens: int
    client_s: float
    prefill_s: float
    decode_s: float
    read_s: float


def measure_pair(
    pair: Pair,
    table: CostTable,
    *,
    transport: httpx.BaseTransport | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> CostTable:
    """The table with the costs of HTTP, router and transfers.

    Args:
        transport: None: the network.

    Raises:
        PairError: a server cannot be reached, or is none of a pair.
    """
    lengths = [tokens for tokens in LENGTHS if tokens < table.engine.max_model_len]
    try:
        with httpx.Client(timeout=600, trust_env=False, transport=transport) as client:
            model = client.get(f"{pair.prefill}/v1/models").raise_for_status().json()["data"][0]["id"]
            network = Network(model=model, transport=transport, clock=clock)
            through = [
                _through(client, pair, network, tokens, seed)
                for seed in range(ROUNDS + 1)
                for tokens in lengths
            ][len(lengths) :]  # the first round connects the two
            most = table.engine.max_num_seqs
            streams = [
                (rows, statistics.median(asyncio.run(_gaps(network, pair.decode, rows, STREAM_TOKENS))))
                for rows in sorted({1, max(1, most // 2), most})
            ]
            at_work: list[Seen] = []
            with ThreadPoolExecutor(1) as pool:
                busy = pool.submit(asyncio.run, _gaps(network, pair.decode, max(1, most // 2), WORK_TOKENS))
                while not (at_work and busy.done()):
                    seed = ROUNDS + 1 + len(at_work)
                    at_work += [_through(client, pair, network, tokens, seed) for tokens in lengths]
                busy.result()
            alone = [_alone(client, pair.prefill, network, seed) for seed in range(ROUNDS + 1)][1:]
    except (httpx.HTTPError, KeyError, IndexError, ValueError) as error:
        raise PairError(f"the pair could not be measured: {error}") from error
    return costs_of(through, alone, with_streams(streams, table), at_work=at_work)


def with_streams(streams: Sequence[tuple[int, float]], table: CostTable) -> CostTable:
    """The table with the host's part from (streams at once, seconds between their tokens)."""
    device = step_clock(replace(table, host_s=0.0, host_row_s=0.0))
    columns = [[1.0, float(rows)] for rows, _ in streams]
    context = STREAM_PROMPT_TOKENS + STREAM_TOKENS // 2
    beyond = [max(1e-6, seconds - device(_decodes(rows, context))) for rows, seconds in streams]
    host_s, host_row_s = fit(columns, beyond)
    return replace(table, host_s=host_s, host_row_s=host_row_s)


def costs_of(
    through: Sequence[Seen], alone: Sequence[float], table: CostTable, *, at_work: Sequence[Seen]
) -> CostTable:
    """The table with what these requests say.

    Args:
        through: of requests through the router.
        alone: seconds of a server's own, beyond its engine's.
        at_work: of requests through the router while the decode server generates for others.
    """
    seconds, engine = step_clock(table), table.engine
    columns: list[list[float]] = []
    loads: list[float] = []
    for tokens in sorted({seen.prompt_tokens for seen in through}):
        own = [seen for seen in through if seen.prompt_tokens == tokens]
        pages = -(-tokens // engine.page_size)
        beyond = statistics.median(seen.decode_s for seen in own) - seconds(_decodes(1, tokens))
        columns.append([1.0, float(pages * engine.page_bytes)])
        loads.append(max(1e-6, beyond))
    constant, per_byte = fit(columns, loads)
    smallest = min(seen.prompt_tokens for seen in through)
    read = statistics.median(seen.read_s for seen in through if seen.prompt_tokens == smallest)
    fixed = min(read, constant)
    slower = [seen.prefill_s / _prefill_s(seen.prompt_tokens, table) for seen in at_work]
    server = max(0.0, statistics.median(alone))
    outside = statistics.median(seen.client_s - seen.prefill_s - seen.decode_s for seen in through)
    return replace(
        table,
        transfer=TransferCost(
            fixed_s=fixed,
            bytes_per_s=1 / per_byte if per_byte > 1 / NO_SLOWER_THAN else NO_SLOWER_THAN,
            message_s=max(0.0, constant - fixed - WAKES * LATENESS_S) / MESSAGES,
            lending=max(1.0, statistics.median(slower)),
        ),
        http=HttpCost(server_s=server, router_s=max(0.0, outside - 2 * server)),
    )


def _prefill_s(tokens: int, table: CostTable) -> float:
    """What the steps of a prompt take, by the table."""
    seconds, budget = step_clock(table), table.engine.max_num_batched_tokens
    starts = range(0, tokens, budget)
    return sum(seconds(_rows(1, start, min(budget, tokens - start))) for start in starts)


def _decodes(rows: int, context: int) -> Rows:
    """A step of rows of one token. A decode engine whose prompt has arrived computes its last token again, as
    one of these."""
    return _rows(rows, context - 1, 1)


def _rows(rows: int, start: int, count: int) -> Rows:
    """Rows that each compute `count` tokens behind `start` others."""
    ones, nothing = np.ones(rows, np.int32), np.zeros(rows, np.int32)
    return Rows(
        slots=nothing,
        starts=nothing + start,
        lens=ones * count,
        samples=ones > 0,
        num_outputs=nothing,
        tokens=np.zeros(rows * count, np.int32),
        page_tables=(np.zeros((rows, 1), np.int32),),
    )


async def _gaps(network: Network, url: str, rows: int, tokens: int) -> list[float]:
    """Seconds between the tokens of so many streams at once."""
    endpoint, clock = Endpoint(label="", url=f"{url}/v1", model=network.model), network.clock
    ask = Ask(chat=False, output_len=tokens, ignore_eos=True, extra={"return_token_ids": True})
    prompts = random_prompts(rows, STREAM_PROMPT_TOKENS, seed=rows)
    shared = network.transport if isinstance(network.transport, httpx.AsyncBaseTransport) else None
    async with httpx.AsyncClient(timeout=None, trust_env=False, transport=shared) as client:
        records = await asyncio.gather(
            *(request(client, endpoint, ask, prompt, due=clock(), clock=clock) for prompt in prompts)
        )
    failed = [record.error for record in records if record.error is not None]
    if failed:
        raise ValueError(failed[0])
    return [gap for record in records for gap in record.itl]


def _through(client: httpx.Client, pair: Pair, network: Network, tokens: int, seed: int) -> Seen:
    ended = "vllm:e2e_request_latency_seconds_sum"
    first, read = "vllm:time_to_first_token_seconds_sum", "vllm:nixl_xfer_time_seconds_sum"
    before = series(client, pair.prefill), series(client, pair.decode)
    client_s = _first_token(client, pair.router, (tokens, 10_000 * seed + tokens), network)
    after = series(client, pair.prefill), series(client, pair.decode)
    if after[1].get(read, 0.0) <= before[1].get(read, 0.0):
        raise ValueError(f"{pair.decode} has read no pages for a request through {pair.router}")
    return Seen(
        prompt_tokens=tokens,
        client_s=client_s,
        prefill_s=after[0][ended] - before[0][ended],
        decode_s=after[1][first] - before[1][first],
        read_s=after[1][read] - before[1].get(read, 0.0),
    )


def _alone(client: httpx.Client, url: str, network: Network, seed: int) -> float:
    """Seconds of a short request at a server, beyond its engine's."""
    first = "vllm:time_to_first_token_seconds_sum"
    before = series(client, url)
    client_s = _first_token(client, url, (16, 10_000 * seed), network)
    return client_s - (series(client, url)[first] - before[first])


def _first_token(client: httpx.Client, url: str, drawn: tuple[int, int], network: Network) -> float:
    """Seconds to the first streamed token of a prompt that nobody has seen; the answer is read to its end.

    Args:
        drawn: tokens of the prompt, and the seed of them.
    """
    tokens, seed = drawn
    (prompt,) = random_prompts(1, tokens, seed=seed)
    body = {"model": network.model, "prompt": list(prompt.token_ids or ()), "max_tokens": 2, "temperature": 0}
    body |= {"stream": True, "ignore_eos": True, "return_token_ids": True}
    began, took = network.clock(), None
    with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if (
                took is None
                and line.startswith("data: {")
                and json.loads(line[6:])["choices"][0]["token_ids"]
            ):
                took = network.clock() - began
    if took is None:
        raise ValueError(f"{url} gave no token")
    return took


def series(client: httpx.Client, url: str) -> dict[str, float]:
    """A server's metrics by name, summed over labels."""
    found: dict[str, float] = {}
    text = client.get(f"{url}/metrics").raise_for_status().text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found
