"""`jaxserve bench serve`: measure one or more OpenAI endpoints.

Several endpoints are measured in turn, A B A B ..., each round with new prompts and the same ones for all, so
that a slow spell of the machine does not fall on one of them alone; the report then has ratios to the first.
"""

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from jaxserve import plot
from jaxserve.bench.client import Ask, BadStream, Endpoint, body_of, first_model, request
from jaxserve.bench.datasets import Prompt, random_prompts
from jaxserve.bench.load import closed_loop, open_loop, send_times
from jaxserve.bench.options import (
    add_dataset_arguments,
    at_least,
    json_object,
    prompts_of,
    rate,
    recorded,
    slo_of,
)
from jaxserve.bench.plot import serve_charts
from jaxserve.bench.stats import RequestRecord, Summary, as_json, ratios, summarize
from jaxserve.bench.tables import ratio_table, summary_table

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_CONCURRENCY = 16
DEFAULT_ROUNDS = 4
WARMUP_SEED = 1_000_003


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How requests are sent.

    Attributes:
        concurrency: requests under way at most; None: any number.
        request_rate: requests per second; infinite: as fast as concurrency allows.
        burstiness: of the arrivals, see `send_times`.
    """

    concurrency: int | None
    request_rate: float
    burstiness: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One endpoint, once: its records, and the seconds they took together."""

    records: tuple[RequestRecord, ...]
    duration: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags, with the names of `vllm bench serve` where the meaning is the same."""
    add = parser.add_argument_group("servers").add_argument
    add(
        "--base-url",
        action="append",
        metavar="URL",
        help=f"a server, with or without /v1; repeat it to compare (default: {DEFAULT_URL})",
    )
    add("--label", action="append", metavar="NAME", help="its name in the report, in the order of --base-url")
    add("--model", help="name to send in requests (default: the first that each server lists)")
    add(
        "--endpoint",
        choices=("completions", "chat"),
        help="default: completions, or chat where the prompts are messages",
    )
    add("--api-key", metavar="KEY", help="sent as bearer token; never in the report")
    add_dataset_arguments(parser, num_prompts=100)
    add = parser.add_argument_group("load").add_argument
    add(
        "--concurrency",
        "--max-concurrency",
        type=at_least(1),
        metavar="N",
        help=f"requests under way at most (default: {DEFAULT_CONCURRENCY}; no bound with --request-rate)",
    )
    add(
        "--request-rate",
        type=rate,
        default=math.inf,
        metavar="R",
        help="requests per second on average (default: inf)",
    )
    add(
        "--burstiness",
        type=rate,
        default=1.0,
        metavar="B",
        help="1 is Poisson, less comes in bursts, more is regular (default: 1)",
    )
    add(
        "--rounds",
        type=at_least(1),
        metavar="N",
        help=f"turns that the servers take (default: 1, or {DEFAULT_ROUNDS} with several servers)",
    )
    add(
        "--warmup",
        type=at_least(0),
        default=1,
        metavar="N",
        help="requests to each server beforehand, not counted (default: %(default)s)",
    )
    add("--temperature", type=float, default=0.0, metavar="T", help="default: %(default)s")
    add("--extra-body", type=json_object, default={}, metavar="JSON", help="keys to add to every request")
    add(
        "--timeout",
        type=rate,
        default=600.0,
        metavar="S",
        help="seconds for one request (default: %(default)g)",
    )
    add = parser.add_argument_group("report").add_argument
    add(
        "--goodput",
        nargs="+",
        metavar="NAME:MS",
        help="count requests that keep these bounds, e.g. ttft:500 tpot:50 e2el:9000",
    )
    add("--json", type=Path, metavar="FILE", help="write the report here, too")
    add("--plot", type=Path, metavar="FILE", help="draw latencies and throughput, as PNG, SVG or PDF")
    add("--save-detailed", action="store_true", help="with every request's times in it")
    add("--disable-tqdm", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0 if every request succeeded, 1 if one failed, 2 if nothing could be measured."""
    try:
        if args.plot is not None:
            plot.check_path(args.plot)
        labels = _labels(args.base_url or [DEFAULT_URL], args.label)
        slo = slo_of(args.goodput)
        prompts = prompts_of(args)
        ask = _ask(args, prompts)
        measured = asyncio.run(_measure(args, labels, prompts, ask))
    except (ValueError, OSError, BadStream) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    endpoints, rounds = [endpoint for endpoint, _ in measured], [rounds for _, rounds in measured]
    totals = [summarize(_all_records(own), sum(each.duration for each in own), slo) for own in rounds]
    per_round = [[summarize(each.records, each.duration, slo) for each in own] for own in rounds]
    compared = {
        endpoint.label: ratios(totals[0], total, per_round[0], own)
        for endpoint, total, own in zip(endpoints[1:], totals[1:], per_round[1:], strict=True)
    }
    for endpoint, total in zip(endpoints, totals, strict=True):
        print(f"\n{summary_table(f'{endpoint.label}  {endpoint.url}  {endpoint.model}', total)}")
    if compared:
        print(f"\n{ratio_table(endpoints[0].label, compared)}")
    if args.json:
        report = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "arguments": recorded(args, without=("api_key",)),
            "endpoints": [
                _report(*each, detailed=args.save_detailed)
                for each in zip(endpoints, totals, per_round, rounds, strict=True)
            ],
            "ratios": as_json(compared),
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.plot is not None:
        shown = {
            endpoint.label: [each.records for each in own]
            for endpoint, own in zip(endpoints, rounds, strict=True)
        }
        plot.write(args.plot, serve_charts(shown))
    return 1 if any(total.failed for total in totals) else 0


def _all_records(rounds: Sequence[Round]) -> list[RequestRecord]:
    return [record for each in rounds for record in each.records]


def _report(
    endpoint: Endpoint,
    total: Summary,
    per_round: Sequence[Summary],
    rounds: Sequence[Round],
    *,
    detailed: bool,
) -> dict[str, Any]:
    report: dict[str, Any] = {"label": endpoint.label, "base_url": endpoint.url, "model": endpoint.model}
    report |= {"summary": as_json(total), "rounds": as_json(list(per_round))}
    if detailed:
        report["requests"] = [as_json(each.records) for each in rounds]
    return report


def _labels(urls: Sequence[str], given: Sequence[str] | None) -> list[tuple[str, str]]:
    """(label, URL up to and with /v1) of each server; A, B, ... where several have no label.

    Raises:
        ValueError: a URL or label that will not do.
    """
    if given is not None and (len(given) != len(urls) or len(set(given)) != len(given)):
        raise ValueError("--label must be given once per --base-url, each time another")
    if len(urls) > 26 and given is None:
        raise ValueError("more than 26 servers need labels")
    for url in urls:
        if httpx.URL(url).scheme not in ("http", "https"):
            raise ValueError(f"--base-url {url!r} does not begin with http:// or https://")
    labels = given or [chr(ord("A") + i) for i in range(len(urls))]
    bare = [url.rstrip("/").removesuffix("/v1") for url in urls]
    return [(label, f"{url}/v1") for label, url in zip(labels, bare, strict=True)]


def _ask(args: argparse.Namespace, prompts: Sequence[Prompt]) -> Ask:
    """What every request asks for.

    Raises:
        ValueError: a prompt does not go with the endpoint.
    """
    messages = any(prompt.messages is not None for prompt in prompts)
    ask = Ask(
        chat=args.endpoint == "chat" or (args.endpoint is None and messages),
        output_len=args.output_len,
        ignore_eos=args.ignore_eos,
        temperature=args.temperature,
        extra=args.extra_body,
        timeout_s=args.timeout,
    )
    for prompt in prompts:
        body_of(Endpoint(label="", url="", model=""), ask, prompt)
    return ask


async def _measure(
    args: argparse.Namespace, labels: Sequence[tuple[str, str]], prompts: Sequence[Prompt], ask: Ask
) -> list[tuple[Endpoint, list[Round]]]:
    """All rounds of all servers, in turn."""
    load = Load(
        concurrency=args.concurrency or (DEFAULT_CONCURRENCY if math.isinf(args.request_rate) else None),
        request_rate=args.request_rate,
        burstiness=args.burstiness,
        seed=args.seed,
    )
    rounds = min(args.rounds or (1 if len(labels) == 1 else DEFAULT_ROUNDS), len(prompts))
    warmup = _warmup_prompts(args, chat=ask.chat)
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    no_limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    results: list[list[Round]] = [[] for _ in labels]
    async with httpx.AsyncClient(headers=headers, limits=no_limits, timeout=None, trust_env=False) as client:
        models = [args.model or await first_model(client, url) for _, url in labels]
        endpoints = [
            Endpoint(label=label, url=url, model=model)
            for (label, url), model in zip(labels, models, strict=True)
        ]
        for endpoint in endpoints:
            await _warm_up(client, endpoint, ask, warmup)
        total = len(prompts) * len(endpoints)
        with tqdm(total=total, unit="req", disable=args.disable_tqdm, dynamic_ncols=True) as bar:
            for i in range(rounds):
                for endpoint, result in zip(endpoints, results, strict=True):
                    bar.set_description(f"{endpoint.label} round {i + 1}/{rounds}")
                    result.append(await _round(client, endpoint, ask, prompts[i::rounds], load, bar.update))
    return list(zip(endpoints, results, strict=True))


def _warmup_prompts(args: argparse.Namespace, *, chat: bool) -> list[Prompt]:
    """Of the usual length, but none of the run's own: those would then be found in the server's cache."""
    if chat:
        return [Prompt(text="Count to ten.")] * args.warmup
    vocabulary = (args.vocab_range[0], args.vocab_range[1])
    return random_prompts(args.warmup, args.input_len, seed=args.seed + WARMUP_SEED, vocabulary=vocabulary)


async def _warm_up(
    client: httpx.AsyncClient, endpoint: Endpoint, ask: Ask, prompts: Sequence[Prompt]
) -> None:
    """Send prompts one by one; the first request to a server may compile.

    Raises:
        BadStream: one failed, so that measuring would be in vain.
    """
    for prompt in prompts:
        record = await request(
            client, endpoint, ask, prompt, due=time.perf_counter(), clock=time.perf_counter
        )
        if record.error is not None:
            raise BadStream(f"{endpoint.url} failed its warm-up request: {record.error}")


async def _round(
    client: httpx.AsyncClient,
    endpoint: Endpoint,
    ask: Ask,
    prompts: Sequence[Prompt],
    load: Load,
    done: Callable[[], Any],
) -> Round:
    clock = time.perf_counter

    async def send(prompt: Prompt, due: float) -> RequestRecord:
        record = await request(client, endpoint, ask, prompt, due=due, clock=clock)
        done()
        return record

    began = clock()
    if math.isinf(load.request_rate):
        records = await closed_loop(send, prompts, concurrency=load.concurrency or len(prompts), clock=clock)
    else:
        times = send_times(len(prompts), load.request_rate, seed=load.seed, burstiness=load.burstiness)
        records = await open_loop(send, prompts, times=times, concurrency=load.concurrency, clock=clock)
    return Round(records=tuple(records), duration=clock() - began)
