"""Servers that move KV pages, and what tests ask of them."""

import concurrent.futures
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.servers import START_S, Server, start_server, stop_server

GREEDY = {"model": "smollm2", "temperature": 0, "ignore_eos": True, "max_tokens": 8}
ADMIN_KEY = "for-the-census"
FLAGS = (
    *("--enforce-eager", "--max-num-seqs", "8", "--max-num-batched-tokens", "128"),
    *("--disable-log-stats", "--dtype", "float32", "--admin-api-key", ADMIN_KEY),
)
PAGES_16, PAGES_128 = 49, 7
"""Of every pool with pages of 16 and 128 tokens: programs are compiled for a pool, and servers share them."""
SLOT_BYTES = 30 * 2 * 3 * 64 * 4
"""KV of one token of the default model in f32: layers, keys and values, heads, width, bytes."""
WAIT_S = 120.0
BY_SOURCE = "vllm:prompt_tokens_by_source_total"
BY_TIER = "vllm:prompt_tokens_cached_by_source_total"
HOST_BYTES = {
    "OffloadingConnector": (
        'vllm:kv_offload_total_bytes_total{transfer_type="CPU_to_GPU"}',
        'vllm:kv_offload_total_bytes_total{transfer_type="GPU_to_CPU"}',
    ),
    "SimpleCPUOffloadConnector": (
        'vllm:simple_kv_offload_bytes_total{direction="load"}',
        'vllm:simple_kv_offload_bytes_total{direction="store"}',
    ),
}
"""Series of a host tier: bytes loaded, bytes stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One server as a test sees it.

    Attributes:
        page_size: tokens.
        host_tier: kind of its host tier; "": none.
        server: its process, where the test started it.
    """

    url: str
    page_size: int
    host_tier: str = ""
    server: Server | None = None

    @property
    def pid(self) -> int:
        """Of its process."""
        assert self.server is not None
        return self.server.process.pid

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.page_size * SLOT_BYTES

    def pages(self, tokens: int) -> int:
        """Pages that so many tokens need."""
        return math.ceil(tokens / self.page_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A prefill and a decode server, and a router in front of them where there is one."""

    prefill: Node
    decode: Node
    router_url: str = ""


def nixl(role: str, **extra: Any) -> dict[str, Any]:
    """A NixlConnector."""
    return {"kv_connector": "NixlConnector", "kv_role": role, "kv_connector_extra_config": extra}


def host(kind: str, num_pages: int, page_size: int) -> dict[str, Any]:
    """A host tier of so many pages."""
    extra = {"cpu_bytes_to_use": num_pages * page_size * SLOT_BYTES}
    return {"kv_connector": kind, "kv_role": "kv_both", "kv_connector_extra_config": extra}


def multi(role: str, *children: Mapping[str, Any]) -> dict[str, Any]:
    """A MultiConnector."""
    extra = {"connectors": list(children)}
    return {"kv_connector": "MultiConnector", "kv_role": role, "kv_connector_extra_config": extra}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to start one server. `flags` come after those of all servers, and win."""

    name: str
    config: Mapping[str, Any]
    page_size: int
    num_pages: int
    flags: tuple[str, ...] = ()

    @property
    def host_tier(self) -> str:
        """Kind of its host tier; "": none."""
        children = self.config.get("kv_connector_extra_config", {}).get("connectors", ())
        return next((child["kv_connector"] for child in children if child["kv_role"] == "kv_both"), "")


def start(plan: Plan, port: int, folder: Path, side_channel_port: int = 0) -> Node:
    """Starts a server and waits until it is ready."""
    server = start_server(
        port,
        folder / f"{plan.name}-{port}.txt",
        *FLAGS,
        *("--page-size", str(plan.page_size), "--num-gpu-blocks-override", str(plan.num_pages)),
        *("--kv-transfer-config", json.dumps(plan.config)),
        *("--nixl-side-channel-port", str(side_channel_port)),
        *plan.flags,
    )
    return Node(url=server.url, page_size=plan.page_size, host_tier=plan.host_tier, server=server)


def start_all(plans: Sequence[Plan], free_port: Callable[[], int], folder: Path) -> list[Node]:
    """Starts servers side by side."""
    ports: list[int] = []
    while len(ports) < len(plans):
        port = free_port()
        if port not in ports:
            ports.append(port)
    with concurrent.futures.ThreadPoolExecutor(len(plans)) as threads:
        asked = [threads.submit(start, plan, port, folder) for plan, port in zip(plans, ports, strict=True)]
    failed = [future.exception() for future in asked if future.exception() is not None]
    if failed:
        stop_all(future.result() for future in asked if future.exception() is None)
        raise RuntimeError(failed[0])
    return [future.result() for future in asked]


def stop_all(nodes: Iterable[Node]) -> list[int]:
    """Ends servers side by side, stopped ones too; their exit codes."""
    servers = [node.server for node in nodes if node.server is not None]
    for server in servers:
        if server.process.poll() is None:
            os.kill(server.process.pid, signal.SIGCONT)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        return list(threads.map(stop_server, servers))


def start_router(prefill_url: str, decode_url: str, port: int, folder: Path) -> Server:
    """A router in front of a pair, ready."""
    log = folder / f"router-{port}.txt"
    command = [
        *(sys.executable, "-m", "jaxserve", "router", "--port", str(port)),
        *("--prefill", prefill_url, "--decode", decode_url),
        *("--health-timeout", "60"),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    server = Server(url=f"http://127.0.0.1:{port}", process=process, log=log)

    def ready() -> bool:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            return httpx.get(f"{server.url}/ready", timeout=10, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    try:
        until(ready, "the router is ready", START_S)
    except BaseException:
        stop_server(server)
        raise
    return server


def until(holds: Callable[[], bool], what: str, seconds: float = WAIT_S, *, pause_s: float = 0.05) -> None:
    """Waits for a condition; looks again after `pause_s`."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not in {seconds:g} s: {what}"
        time.sleep(pause_s)


class Series(dict[str, float]):
    """A scrape: every series summed over the labels that tell servers and engines apart.

    `name` is the sum over all label sets, `name{label="value"}` over those that have this label.
    """

    def __sub__(self, before: "Series") -> "Series":
        return Series({name: value - before.get(name, 0.0) for name, value in self.items()})


def scrape(url: str) -> Series:
    """All series of a server."""
    series = Series()
    text = httpx.get(f"{url}/metrics", timeout=60, trust_env=False).raise_for_status().text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            names = {sample.name} | {
                f'{sample.name}{{{key}="{text}"}}' for key, text in sample.labels.items()
            }
            for name in names:
                series[name] = series.get(name, 0.0) + sample.value
    return series


def cache_config(url: str) -> dict[str, str]:
    """What a server says of its pool, in vLLM's words."""
    text = httpx.get(f"{url}/metrics", timeout=60, trust_env=False).raise_for_status().text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "vllm:cache_config_info":
                return sample.labels
    raise AssertionError("no cache_config_info")


def pool_pages(url: str) -> int:
    """Pages of a server's pool."""
    return int(cache_config(url)["num_gpu_blocks"])


def describe(url: str) -> Node:
    """A server that somebody else has started, by what it says of itself."""
    series = scrape(url)
    tier = next((kind for kind, (loaded, _) in HOST_BYTES.items() if loaded in series), "")
    return Node(url=url, page_size=int(cache_config(url)["block_size"]), host_tier=tier)


def at_rest(url: str) -> Series:
    """Waits until nothing runs, moves, is leased or is held; the series then."""
    series = Series()

    def resting() -> bool:
        nonlocal series
        series = scrape(url)
        busy = [
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            'vllm:kv_pages{state="in_use"}',
            "vllm:kv_pages_in_moves",
        ]
        return not any(series[name] for name in busy) and not series.get("vllm:kv_leases", 0)

    until(resting, f"{url} is at rest")
    return series


def ask(url: str, prompt: Sequence[int] | str, **fields: Any) -> dict[str, Any]:
    """A completion's JSON."""
    body = {**GREEDY, "prompt": prompt, **fields}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of(answer: Mapping[str, Any]) -> str:
    """What was generated."""
    return answer["choices"][0]["text"]


def split_of(answer: Mapping[str, Any]) -> tuple[int, int, int]:
    """Where the prompt's tokens came from: computed, hit, external."""
    details = answer["usage"]["prompt_tokens_details"]
    return details["local_compute"], details["local_cache_hit"], details["external_kv_transfer"]


def sources(change: Series) -> tuple[int, int, int]:
    """The same of a difference of scrapes."""
    return tuple(  # type: ignore[return-value]
        int(change[f'{BY_SOURCE}{{source="{source}"}}'])
        for source in ("local_compute", "local_cache_hit", "external_kv_transfer")
    )


def tiers(change: Series) -> tuple[int, int, int]:
    """Cached tokens by where they lay: device, host, p2p."""
    return tuple(  # type: ignore[return-value]
        int(change[f'{BY_TIER}{{source="{source}"}}']) for source in ("device", "host", "p2p")
    )


def prefill(url: str, prompt: Sequence[int], **fields: Any) -> dict[str, Any]:
    """P's `kv_transfer_params` for a prompt."""
    keep = {"do_remote_decode": True, "do_remote_prefill": False}
    answer = ask(url, prompt, **{**fields, "max_tokens": 1, "kv_transfer_params": keep})
    return answer["kv_transfer_params"]


class Prompts:
    """Token lists that share no page with each other: each begins with a number of its own.

    Args:
        salt: tells them from those of other runs against the same servers.
    """

    def __init__(self, salt: bytes) -> None:
        self._first = [1000 + byte for byte in salt]
        self._next = 0

    def take(self, length: int) -> list[int]:
        """A prompt of `length` tokens, at least 8."""
        self._next += 1
        own = [2000 + self._next // 200, 3000 + self._next % 200]
        body = [4000 + (self._next * 131 + place * 7) % 20000 for place in range(length)]
        return (self._first + own + body)[:length]
