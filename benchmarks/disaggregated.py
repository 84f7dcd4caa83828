"""Time to first token through P and D, and what arriving pages cost a running decode batch, in one run.

    python benchmarks/disaggregated.py [--prompt-tokens 1024] [--rounds 5] [--dtype float32]

Starts P (kv_producer) and D (kv_consumer) as processes of their own and prints:

- time to first token of P alone (a streamed request of one token to P), of the pair (P with max_tokens 1, and
  then D until its first streamed token), the bare transfer (D's nixl_xfer_time_seconds), and
  pair / (alone + transfer);
- the mean inter-token latency of a decode batch on D alone, while prompts of the same length arrive whose
  pages P has computed before, and their ratio.
"""

import argparse
import asyncio
import itertools
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import httpx
from prometheus_client.parser import text_string_to_metric_families

NAME = "pair"
LEASE = {"do_remote_decode": True, "do_remote_prefill": False}


def start(role: str, port: int, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    """One server of a pair."""
    transfer = {"kv_connector": "NixlConnector", "kv_role": role}
    command = [
        *(sys.executable, "-m", "jaxserve", "serve", args.model, "--port", str(port)),
        *("--kv-transfer-config", json.dumps(transfer), "--nixl-side-channel-port", "0"),
        *("--served-model-name", NAME, "--dtype", args.dtype, "--max-num-seqs", "16", "--disable-log-stats"),
    ]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def free_ports(count: int) -> list[int]:
    """Ports on which nobody listens."""
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def prompt(rng: random.Random, tokens: int) -> list[int]:
    """A prompt that nobody has seen."""
    return [rng.randrange(1000, 40000) for _ in range(tokens)]


async def wait_ready(client: httpx.AsyncClient, url: str, process: subprocess.Popen[bytes]) -> None:
    """Until the server answers."""
    while process.poll() is None:
        try:
            if (await client.get(f"{url}/ready")).status_code == 200:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.2)
    raise SystemExit(f"the server for {url} has ended")


async def lease(client: httpx.AsyncClient, url: str, ids: Sequence[int]) -> dict[str, object]:
    """Has P compute a prompt; what D needs to take it over."""
    body = {
        **{"model": NAME, "prompt": list(ids), "max_tokens": 1, "temperature": 0},
        "kv_transfer_params": LEASE,
    }
    answer = await client.post(f"{url}/v1/completions", json=body)
    answer.raise_for_status()
    return answer.json()["kv_transfer_params"]


async def token_times(
    client: httpx.AsyncClient, url: str, ids: Sequence[int], tokens: int, params: object = None
) -> list[float]:
    """Streams a completion; when each chunk with a token came."""
    body: dict[str, object] = {
        **{"prompt": list(ids), "max_tokens": tokens, "temperature": 0, "ignore_eos": True},
        **{"model": NAME, "stream": True, "return_token_ids": True},
    }
    if params is not None:
        body["kv_transfer_params"] = params
    times: list[float] = []
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line[6:])["choices"]
                times += [time.perf_counter()] * sum(len(choice.get("token_ids") or ()) for choice in choices)
    return times


async def series(client: httpx.AsyncClient, url: str, name: str) -> float:
    """A metric, summed over its label sets."""
    text = (await client.get(f"{url}/metrics")).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    )


async def first_tokens(client: httpx.AsyncClient, p: str, d: str, args: argparse.Namespace) -> None:
    """Time to first token, alone and through the pair, alternating."""
    rng = random.Random(0)
    alone, pair, moved = [], [], []
    for round_number in range(args.rounds + 1):
        begin = time.perf_counter()
        first = (await token_times(client, p, prompt(rng, args.prompt_tokens), 1))[0] - begin
        before = await series(client, d, "vllm:nixl_xfer_time_seconds_sum")
        ids, begin = prompt(rng, args.prompt_tokens), time.perf_counter()
        params = await lease(client, p, ids)
        both = (await token_times(client, d, ids, 2, params))[0] - begin
        transfer = await series(client, d, "vllm:nixl_xfer_time_seconds_sum") - before
        if round_number:  # the first round connects the two and warms caches
            alone.append(first)
            pair.append(both)
            moved.append(transfer)
    a, b, c = (statistics.median(values) for values in (alone, pair, moved))
    print(f"time to first token, {args.prompt_tokens} tokens, median of {args.rounds}:")
    print(f"  P alone {a:.3f} s, P and D {b:.3f} s, bare transfer {c * 1000:.1f} ms")
    print(f"  ratio P and D / (P alone + transfer): {b / (a + c):.3f}")


async def inter_token(client: httpx.AsyncClient, p: str, d: str, args: argparse.Namespace) -> None:
    """Inter-token latency of a decode batch, alone and while pages arrive."""
    rng = random.Random(1)

    async def batch() -> list[float]:
        streams = [token_times(client, d, prompt(rng, 32), args.decode_tokens) for _ in range(args.batch)]
        gaps: list[float] = []
        for times in await asyncio.gather(*streams):
            steady = times[8:]  # behind the other streams' prompts
            gaps += [after - before for before, after in itertools.pairwise(steady)]
        return gaps

    async def arrivals(ready: list[tuple[list[int], dict[str, object]]], every_s: float) -> None:
        await asyncio.sleep(every_s)
        for ids, params in ready:
            await token_times(client, d, ids, 1, params)
            await asyncio.sleep(every_s)

    await batch()
    alone: list[float] = []
    disturbed: list[float] = []
    for _ in range(args.rounds):
        alone += await batch()
        ready = []
        for _ in range(args.arrivals):
            ids = prompt(rng, args.prompt_tokens)
            ready.append((ids, await lease(client, p, ids)))
        gaps, _ = await asyncio.gather(batch(), arrivals(ready, args.every))
        disturbed += gaps
    a, b = statistics.mean(alone), statistics.mean(disturbed)
    print(f"inter-token latency of {args.batch} sequences, {args.arrivals} prompts of {args.prompt_tokens} ")
    print(f"tokens arriving every {args.every} s, {args.rounds} rounds:")
    print(f"  alone {a * 1000:.2f} ms, while pages arrive {b * 1000:.2f} ms, ratio {b / a:.3f}")


async def measure(args: argparse.Namespace) -> None:
    """Starts the pair, measures, stops it."""
    ports = free_ports(2)
    p, d = (f"http://127.0.0.1:{port}" for port in ports)
    processes = [
        start(role, port, args) for role, port in zip(("kv_producer", "kv_consumer"), ports, strict=True)
    ]
    try:
        async with httpx.AsyncClient(timeout=600) as client:
            for url, process in zip((p, d), processes, strict=True):
                await wait_ready(client, url, process)
            await first_tokens(client, p, d, args)
            await inter_token(client, p, d, args)
            for name in ("nixl_num_failed_transfers_total", "kv_digest_failures_total"):
                print(f"{name} on D: {await series(client, d, f'vllm:{name}'):.0f}")
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def main() -> None:
    """Reads the arguments and measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--model", default="smollm2")
    add("--dtype", default="auto")
    add("--prompt-tokens", type=int, default=1024)
    add("--rounds", type=int, default=5)
    add("--batch", type=int, default=6, help="sequences of the decode batch")
    add("--decode-tokens", type=int, default=96)
    add("--arrivals", type=int, default=4, help="prompts that arrive while the batch decodes")
    add("--every", type=float, default=0.5, help="seconds between arrivals")
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
