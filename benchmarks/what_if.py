"""Does a simulation say what a real pair does? `python benchmarks/what_if.py [--rounds 3] [--cores 0 1]`.

Starts a prefill server, a decode server and a router, measures what steps, transfers and HTTP cost, sends
traffic with Poisson arrivals and common prefixes through the router, simulates the same traffic with the
measured costs, and prints both and their ratios. Ends with 1 where a median is further off than --within.

The servers get a core each (--cores): a simulated engine has a machine of its own, and two real ones that
share their cores slow each other down by more than anything else in here. Client and router have what is left
over.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.bench.client import Ask, Endpoint, request
from jaxserve.bench.datasets import Prompt
from jaxserve.bench.load import open_loop, send_times
from jaxserve.bench.stats import RequestRecord, Summary, summarize
from jaxserve.bench.tables import grid, number
from jaxserve.sim.costs import read_table
from jaxserve.sim.report import SOURCES, Report, report_text
from jaxserve.sim.traffic import Trace, from_lines
from jaxserve.sim.what_if import simulate

NAME = "pair"
BLOCK_TOKENS = 64
FIGURES = (("TTFT p50", "ttft", 50), ("TTFT p90", "ttft", 90), ("ITL p50", "itl", 50), ("ITL p90", "itl", 90))


def traffic(count: int, rate: float, seed: int) -> bytes:
    """JSON lines: prompts of 64 to 512 tokens behind one of four prefixes, answers of 8 to 64."""
    rng = np.random.default_rng(seed)
    lines = []
    for index, at_s in enumerate(send_times(count, rate, seed=seed)):
        tokens = int(rng.integers(64, 512))
        blocks, common = -(-tokens // BLOCK_TOKENS), int(rng.integers(0, 4))
        which = rng.integers(0, 4)
        prefix = [f"{seed} prefix {which} {block}" for block in range(min(common, blocks))]
        own = [f"{seed} request {index} {block}" for block in range(len(prefix), blocks)]
        entry = {"timestamp": at_s * 1000, "input_length": tokens, "hash_ids": prefix + own}
        lines.append(json.dumps(entry | {"output_length": int(rng.integers(8, 64))}))
    return "\n".join(lines).encode()


def free_ports(count: int) -> list[int]:
    """Ports on which nobody listens."""
    return [int(subprocess.check_output([sys.executable, "-c", PORT])) for _ in range(count)]


PORT = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"


def pinned(command: Sequence[str], cores: Sequence[int]) -> subprocess.Popen[bytes]:
    """A process on some cores; on all, where none are named."""

    def pin() -> None:
        if cores:
            os.sched_setaffinity(0, cores)

    return subprocess.Popen(
        [sys.executable, "-m", "jaxserve", *command], stderr=subprocess.DEVNULL, preexec_fn=pin
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A router, a prefill and a decode server. Attributes: urls, pids: in this order."""

    urls: tuple[str, str, str]
    pids: tuple[int, int, int]


@contextlib.contextmanager
def pair(args: argparse.Namespace) -> Generator[Running]:
    """Starts the three, and ends them."""
    ports = free_ports(3)
    router, prefill, decode = (f"http://127.0.0.1:{port}" for port in ports)
    processes = []
    for place, (role, port) in enumerate(zip(("kv_producer", "kv_consumer"), ports[1:], strict=True)):
        transfer = {"kv_connector": "NixlConnector", "kv_role": role}
        command = ["serve", args.model, "--port", str(port), "--kv-transfer-config", json.dumps(transfer)]
        command += ["--nixl-side-channel-port", "0", "--served-model-name", NAME, "--disable-log-stats"]
        command += ["--max-num-seqs", str(args.max_num_seqs)]
        command += ["--num-gpu-blocks-override", str(args.num_pages)]
        command += ["--max-num-batched-tokens", str(args.max_num_batched_tokens)]
        if args.records is not None:
            command += ["--record", str(args.records / f"{role}.record")]
        processes.append(pinned(command, args.cores[place : place + 1]))
    processes.append(
        pinned(["router", "--prefill", prefill, "--decode", decode, "--port", str(ports[0])], [])
    )
    try:
        with httpx.Client(trust_env=False) as client:
            for url, process in zip((prefill, decode, router), processes, strict=True):
                wait_ready(client, url, process)
        server_p, server_d, server_r = (process.pid for process in processes)
        yield Running(urls=(router, prefill, decode), pids=(server_r, server_p, server_d))
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def wait_ready(client: httpx.Client, url: str, process: subprocess.Popen[bytes]) -> None:
    """Until the server answers."""
    while process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if client.get(f"{url}/ready").status_code == 200:
                return
        time.sleep(0.2)
    raise SystemExit(f"the server for {url} has ended")


def measure_costs(args: argparse.Namespace, urls: Sequence[str], path: Path) -> None:
    """`jaxserve bench steps` on the prefill server's core, while both servers have nothing to do."""
    command = ["bench", "steps", args.model, "--output", str(path), "--disable-tqdm", "--pair", *urls]
    for name in ("max_num_seqs", "num_pages", "max_num_batched_tokens"):
        command += ["--engine", f"{name}={getattr(args, name)}"]
    command += ["--contexts", "64", "256", "512", "--repetitions", str(args.repetitions)]
    if pinned(command, args.cores[:1]).wait():
        raise SystemExit("`jaxserve bench steps` has failed")


async def send(router: str, trace: Trace) -> tuple[list[RequestRecord], float]:
    """The trace to a real router; what its clients saw, and for how long."""
    endpoint = Endpoint(label="pair", url=f"{router}/v1", model=NAME)
    ask = Ask(chat=False, output_len=1, ignore_eos=True, extra={"return_token_ids": True})
    prompts = [
        Prompt(token_ids=arrival.prompt.token_ids(), output_len=arrival.output_tokens)
        for arrival in trace.arrivals
    ]
    times = [arrival.at_s for arrival in trace.arrivals]
    clock = time.perf_counter
    async with httpx.AsyncClient(
        limits=httpx.Limits(max_connections=None), timeout=None, trust_env=False
    ) as client:

        async def one(prompt: Prompt, due: float) -> RequestRecord:
            return await request(client, endpoint, ask, prompt, due=due, clock=clock)

        began = clock()
        records = await open_loop(one, prompts, times=times, concurrency=None, clock=clock)
    return records, clock() - began


def by_source(url: str) -> dict[str, int]:
    """Prompt tokens of a server by source, so far."""
    name = "vllm:prompt_tokens_by_source_total"
    with httpx.Client(trust_env=False) as client:
        text = client.get(f"{url}/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.labels["source"]: int(sample.value) for sample in samples if sample.name == name}


def sources_text(before: Sequence[dict[str, int]], after: Sequence[dict[str, int]], report: Report) -> str:
    """Where the prompt tokens of both servers came from, and those of the simulated ones."""
    rows = [["prompt tokens", *SOURCES.values()]]
    for role, old, new in zip(("prefill", "decode"), before, after, strict=True):
        rows.append([f"{role}, real", *(f"{new[name] - old[name]:,}" for name in SOURCES)])
        rows.append([f"{role}, simulated", *(f"{report.sources(role).get(name):,}" for name in SOURCES)])
    return grid(rows)


def compare(real: Sequence[Summary], simulated: Sequence[Summary]) -> tuple[str, float]:
    """A table of both, a column per round, and how far the worst median is off."""
    rows = [["milliseconds", *(f"real {i + 1}  simulated  ratio" for i in range(len(real))), "all rounds"]]
    worst = 0.0
    for title, name, percentile in FIGURES:
        pairs = [
            (getattr(a, name).at(percentile), getattr(b, name).at(percentile))
            for a, b in zip(real, simulated, strict=True)
        ]
        cells = [f"{number(a * 1e3)}  {number(b * 1e3)}  {b / a:.2f}" for a, b in pairs]
        together = statistics.median(b / a for a, b in pairs)
        rows.append([title, *cells, f"{together:.2f}"])
        if percentile == 50:
            worst = max(worst, abs(together - 1))
    return grid(rows), worst


def main() -> int:
    """Measures, simulates, compares."""
    args = arguments(sys.argv[1:])
    real, simulated = [], []
    with tempfile.TemporaryDirectory() as folder, pair(args) as running:
        urls = running.urls
        costs = args.step_cost or Path(folder) / "costs.json"
        if not costs.exists():
            measure_costs(args, urls, costs)
        table = read_table(costs)
        for number_of_round in range(args.rounds):
            trace = from_lines(
                traffic(args.requests, args.rate, args.seed + number_of_round), block_tokens=BLOCK_TOKENS
            )
            before = [by_source(url) for url in urls[1:]]
            records, duration = asyncio.run(send(urls[0], trace))
            after = [by_source(url) for url in urls[1:]]
            failed = [record.error for record in records if record.error is not None]
            if failed:
                raise SystemExit(f"{len(failed)} requests failed: {failed[0]}")
            real.append(summarize(records, duration))
            report = simulate(trace, table, prefill=1, decode=1)
            simulated.append(report.summary)
            print(f"\nround {number_of_round + 1}, load average {os.getloadavg()[0]:.1f}, simulated:")
            print(f"{report_text(report)}\n\n{sources_text(before, after, report)}")
    text, worst = compare(real, simulated)
    print(f"\n{text}\nworst median over all rounds: {worst:.0%} off")
    return int(worst > args.within)


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """A command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--model", default="smollm2")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    add(
        "--cores",
        type=int,
        nargs="*",
        default=cores[:2],
        help="of prefill and decode server; none: all cores",
    )
    add("--max-num-seqs", type=int, default=8)
    add("--num-pages", type=int, default=1024)
    add("--max-num-batched-tokens", type=int, default=512)
    add("--repetitions", type=int, default=7, help="of each measured step")
    add("--requests", type=int, default=60)
    add("--rate", type=float, default=1.0, help="requests per second")
    add("--rounds", type=int, default=3)
    add("--seed", type=int, default=0)
    add("--step-cost", type=Path, metavar="FILE", help="a table to use, or to write if there is none")
    add(
        "--records", type=Path, metavar="FOLDER", help="keep what the servers' engines were given and decided"
    )
    add("--within", type=float, default=0.15)
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
