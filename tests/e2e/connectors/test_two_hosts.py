"""P and D on hosts of their own: pages over a good link, a bad one, and one that breaks."""

import concurrent.futures
import contextlib
import json
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import HAS_NIXL
from tests.e2e.connectors.fleet import (
    FLAGS,
    PAGES_16,
    Node,
    Series,
    ask,
    at_rest,
    nixl,
    prefill,
    scrape,
    sources,
    split_of,
    stop_all,
    text_of,
    until,
)
from tests.e2e.connectors.hosts import Host, NoHosts, TwoHosts
from tests.e2e.connectors.wire import Wire

# Not marked `connectors`: those may not be skipped, and not every machine lets us make namespaces.
pytestmark = [pytest.mark.e2e, pytest.mark.slow]

TIMEOUT_S, LEASE_S = 20.0, 10.0
"""Deadline of a transfer to D; life of P's leases without D's heartbeats."""
COMPUTE_S = 60.0
"""For what D does after a deadline, on a busy machine."""
TWO_PAGES = 30
"""Tokens of prompts whose pages quarantine may hold: with more than 5% of the pool in it D deletes the agent
that reads, and a P that hears of the reads only afterwards has been seen to die inside UCX."""
FAILURES = "vllm:nixl_num_failed_transfers_total"
NOT_TOLD = "vllm:nixl_num_failed_notifications_total"
EXPIRED = "vllm:nixl_num_kv_expired_reqs_total"

# The kernel under both hosts is one, and UCX would see that and go through its memory.
ENVIRON = {"UCX_TLS": "tcp"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Apart:
    """A prefill and a decode server, and the wire between their hosts; P's end is the first."""

    prefill: Node
    decode: Node
    wire: Wire


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[TwoHosts]:
    """Two hosts, where this machine can have them."""
    if not HAS_NIXL:
        pytest.skip("nixl is not installed")
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(TwoHosts())
        except NoHosts as reason:
            pytest.skip(f"no network namespaces here: {reason}")
        yield hosts


@pytest.fixture(scope="module")
def servers(
    two_hosts: TwoHosts, smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Apart, None, None]:
    """One server on each host, with a key that they share."""
    folder = tmp_path_factory.mktemp("hosts")
    key = folder / "kv.key"
    key.touch(mode=0o600)
    key.write_bytes(b"a key of the two hosts, 32 bytes.")
    configs = (
        nixl("kv_producer", kv_lease_duration=LEASE_S),
        nixl("kv_consumer", transfer_timeout=TIMEOUT_S),
    )

    def start(host: Host, config: dict[str, Any]) -> Node:
        arguments = [
            *(str(smollm2_path), "--served-model-name", "smollm2", *FLAGS),
            *("--page-size", "16", "--num-gpu-blocks-override", str(PAGES_16)),
            *("--kv-transfer-config", json.dumps(config), "--kv-auth-key-file", str(key)),
            *("--nixl-side-channel-host", host.link_address),
        ]
        server = host.start(arguments, 8000, folder / f"{config['kv_role']}.txt", ENVIRON)
        return Node(url=server.url, page_size=16, server=server)

    with concurrent.futures.ThreadPoolExecutor() as threads:
        asked = [threads.submit(start, *pair) for pair in zip(two_hosts.hosts, configs, strict=True)]
    nodes = [future.result() for future in asked if future.exception() is None]
    try:
        for future in asked:
            future.result()
        yield Apart(prefill=nodes[0], decode=nodes[1], wire=two_hosts.wire)
    finally:
        two_hosts.wire.be()
        codes = stop_all(nodes)
    assert codes == [0, 0]


@pytest.fixture
def apart(servers: Apart) -> Iterator[Apart]:
    """The servers and a wire without faults, before and after."""
    servers.wire.be()
    yield servers
    servers.wire.be()


def decode(apart: Apart, prompt: list[int], params: dict[str, Any]) -> tuple[dict[str, Any], Series]:
    """D's answer, and how its numbers had changed by then."""
    before = at_rest(apart.decode.url)
    began = time.monotonic()
    answer = ask(apart.decode.url, prompt, kv_transfer_params=params)
    assert time.monotonic() - began < TIMEOUT_S + COMPUTE_S
    return answer, scrape(apart.decode.url) - before


def assert_fetched(apart: Apart, prompt: list[int]) -> None:
    """D has all of the prompt from P, over the wire, and says what P would say."""
    params = prefill(apart.prefill.url, prompt)
    carried = apart.wire.carried_bytes
    answer, change = decode(apart, prompt, params)
    assert split_of(answer) == sources(change) == (0, 0, len(prompt))
    # That P could not be told of an earlier request's end may be found out only now.
    assert change[FAILURES] == change[NOT_TOLD]
    moved = apart.prefill.pages(len(prompt)) * apart.prefill.page_bytes
    assert apart.wire.carried_bytes - carried >= moved, "the pages took another way"
    assert text_of(answer) == text_of(ask(apart.prefill.url, prompt))
    at_rest(apart.decode.url)
    at_rest(apart.prefill.url)


def assert_computed(
    apart: Apart, prompt: list[int], params: dict[str, Any], expected: str, *, quarantined: int
) -> None:
    """D computes the prompt. While the wire is broken all pages come back, but for those that a read which
    nobody can end may still write; these do when the wire is mended, and then D fetches again."""
    expired = scrape(apart.prefill.url)[EXPIRED]
    answer, change = decode(apart, prompt, params)
    assert text_of(answer) == expected
    assert split_of(answer) == sources(change) == (len(prompt), 0, 0)
    assert change[FAILURES] >= 1

    def only_quarantine() -> bool:
        series = scrape(apart.decode.url)
        return (
            series['vllm:kv_pages{state="in_use"}']
            == series["vllm:kv_pages_in_moves"]
            == series["vllm:kv_pages_quarantined"]
            == quarantined
        )

    until(only_quarantine, f"of D's pages {quarantined} are in quarantine and the others free or cached")
    assert at_rest(apart.prefill.url)[EXPIRED] == expired + 1, "nobody has told P: its lease ends by itself"
    assert apart.wire.broken
    apart.wire.be()
    at_rest(apart.decode.url)


def test_a_link_that_breaks_before_they_ever_met(apart, prompts):
    """D knows P's address from the client alone, and cannot reach it."""
    prompt = prompts.take(50)
    expected = text_of(ask(apart.prefill.url, prompt))
    params = prefill(apart.prefill.url, prompt)
    apart.wire.break_now()
    assert_computed(apart, prompt, params, expected, quarantined=0)
    assert_fetched(apart, prompts.take(45))


def test_pages_come_from_the_other_host(apart, prompts):
    """One page, several, and several requests at once."""
    for length in (16, 40, 100):
        assert_fetched(apart, prompts.take(length))
    many = [prompts.take(length) for length in (30, 40, 50, 60)]
    expected = [text_of(ask(apart.prefill.url, prompt)) for prompt in many]
    kept = [prefill(apart.prefill.url, prompt) for prompt in many]
    with concurrent.futures.ThreadPoolExecutor() as threads:
        answers = list(
            threads.map(lambda n: ask(apart.decode.url, many[n], kv_transfer_params=kept[n]), range(4))
        )
    assert [text_of(answer) for answer in answers] == expected
    assert [split_of(answer) for answer in answers] == [(0, 0, len(prompt)) for prompt in many]
    at_rest(apart.decode.url)
    at_rest(apart.prefill.url)


def test_a_link_that_breaks_after_the_prefill(apart, prompts):
    """They have met: D finds a silent connection."""
    assert_fetched(apart, prompts.take(33))
    prompt = prompts.take(TWO_PAGES)
    expected = text_of(ask(apart.prefill.url, prompt))
    params = prefill(apart.prefill.url, prompt)
    apart.wire.break_now()
    assert_computed(apart, prompt, params, expected, quarantined=2)
    assert_fetched(apart, prompts.take(45))


def test_a_link_that_breaks_during_a_load(apart, prompts):
    """Some of the pages' bytes have arrived, and then nothing more."""
    assert_fetched(apart, prompts.take(33))
    prompt = prompts.take(TWO_PAGES)
    expected = text_of(ask(apart.prefill.url, prompt))
    params = prefill(apart.prefill.url, prompt)
    apart.wire.break_after(apart.prefill.page_bytes)
    assert_computed(apart, prompt, params, expected, quarantined=2)
    assert_fetched(apart, prompts.take(45))


def test_a_link_that_breaks_for_a_moment_costs_nothing(apart, prompts):
    """Shorter than any deadline: what was lost is sent again."""
    prompt = prompts.take(70)
    expected = text_of(ask(apart.prefill.url, prompt))
    params = prefill(apart.prefill.url, prompt)
    apart.wire.break_after(apart.prefill.page_bytes)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        asked = threads.submit(ask, apart.decode.url, prompt, kv_transfer_params=params)
        until(lambda: apart.wire.broken, "the wire has broken")
        apart.wire.be()
        answer = asked.result()
    assert text_of(answer) == expected
    assert split_of(answer) == (0, 0, 70)
    at_rest(apart.decode.url)
    at_rest(apart.prefill.url)


def test_a_far_away_host_behind_a_lossy_link(apart, prompts):
    """50 ms each way and 1% of the frames lost: TCP mends it, no deadline passes."""
    apart.wire.be(delay_s=0.05, loss=0.01)
    lost = apart.wire.lost
    for length in (20, 40, 60):
        assert_fetched(apart, prompts.take(length))
    assert apart.wire.lost > lost
