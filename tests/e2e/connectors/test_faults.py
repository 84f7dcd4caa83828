"""A prefill server that dies, stops, restarts or forgets: D gives the right text, and says what it did."""

import os
import signal
import socket
from collections.abc import Callable, Generator
from pathlib import Path

import httpx
import pytest

from tests.e2e.connectors.fleet import (
    GREEDY,
    PAGES_16,
    Node,
    Plan,
    Series,
    ask,
    at_rest,
    nixl,
    pool_pages,
    prefill,
    scrape,
    sources,
    split_of,
    start,
    stop_all,
    text_of,
    until,
)

pytestmark = [pytest.mark.e2e, pytest.mark.connectors, pytest.mark.timeout(900)]

FAILURES = "vllm:nixl_num_failed_transfers_total"
EXPIRED = "vllm:nixl_num_kv_expired_reqs_total"

STALE = "vllm:kv_stale_reads_total"

Starter = Callable[..., Node]


@pytest.fixture
def start_producer(free_port: Callable[[], int], tmp_path: Path) -> Generator[Starter, None, None]:
    """Starts prefill servers that the test may do anything to."""
    nodes: list[Node] = []

    def begin(side_channel_port: int = 0, **extra: object) -> Node:
        plan = Plan(name="producer", config=nixl("kv_producer", **extra), page_size=16, num_pages=PAGES_16)
        nodes.append(start(plan, free_port(), tmp_path, side_channel_port))
        return nodes[-1]

    yield begin
    stop_all(nodes)


def decode(node: Node, prompt: list[int], params: dict) -> tuple[dict, Series]:
    """D's answer, and how its numbers changed."""
    before = at_rest(node.url)
    answer = ask(node.url, prompt, kv_transfer_params=params)
    return answer, at_rest(node.url) - before


def assert_computed(answer: dict, change: Series, length: int, failure: str = FAILURES) -> None:
    """D computed all of it, after a failure."""
    assert split_of(answer) == sources(change) == (length, 0, 0)
    assert change["vllm:prompt_tokens_total"] == length
    assert change["vllm:prompt_tokens_cached_total"] == 0
    assert change[failure] >= 1


def assert_fetched(answer: dict, change: Series, length: int) -> None:
    """D computed nothing of it."""
    assert split_of(answer) == sources(change) == (0, 0, length)
    assert change[FAILURES] == 0


def test_a_killed_p_is_computed_for_and_its_next_life_is_another_peer(
    decoders, start_producer, prompts, free_port
):
    """Killed between prefill and read; then a new process on the same side channel port."""
    recomputes, fails = decoders
    port = free_port()
    producer = start_producer(port)
    met, first, second, third = (prompts.take(length) for length in (40, 45, 50, 55))
    expected = {len(prompt): text_of(ask(producer.url, prompt)) for prompt in (first, second, third)}
    for node in decoders:
        answer, change = decode(node, met, prefill(producer.url, met))
        assert_fetched(answer, change, 40)
    kept = {len(prompt): prefill(producer.url, prompt) for prompt in (first, second, third)}
    producer.server.process.kill()
    producer.server.process.wait()

    answer, change = decode(recomputes, first, kept[45])
    assert_computed(answer, change, 45)
    assert text_of(answer) == expected[45]

    before = at_rest(fails.url)
    body = {**GREEDY, "prompt": third, "kv_transfer_params": kept[55]}
    refused = httpx.post(f"{fails.url}/v1/completions", json=body, timeout=120)
    assert refused.status_code == 500 and refused.json()["error"]["message"]
    change = at_rest(fails.url) - before
    assert sources(change) == (0, 0, 0) and change[FAILURES] >= 1
    assert change['vllm:request_success_total{finished_reason="error"}'] == 1
    direct = ask(fails.url, third)
    assert text_of(direct) == expected[55] and split_of(direct) == (55, 0, 0), "the server lives on"

    successor = start_producer(port)
    answer, change = decode(recomputes, second, kept[50])
    assert_computed(answer, change, 50)
    assert text_of(answer) == expected[50]
    fresh = prompts.take(60)
    params = prefill(successor.url, fresh)
    assert params["remote_port"] == port
    answer, change = decode(recomputes, fresh, params)
    assert_fetched(answer, change, 60)
    assert text_of(answer) == text_of(ask(successor.url, fresh))


@pytest.mark.parametrize("met", [pytest.param(False, marks=pytest.mark.slow), True], ids=["unmet", "met"])
def test_a_stopped_p_is_waited_for_no_longer_than_the_deadline(decoders, start_producer, prompts, met):
    """D computes; when P goes on, nothing was harmed: pages come back and the next prompt is fetched."""
    node, _ = decoders
    producer = start_producer()
    if met:
        early = prompts.take(33)
        assert_fetched(*decode(node, early, prefill(producer.url, early)), 33)
    prompt = prompts.take(70)
    expected = text_of(ask(producer.url, prompt))
    params = prefill(producer.url, prompt)
    os.kill(producer.pid, signal.SIGSTOP)
    before = at_rest(node.url)
    answer = ask(node.url, prompt, kv_transfer_params=params)
    stopped = scrape(node.url)
    os.kill(producer.pid, signal.SIGCONT)
    assert split_of(answer) == sources(stopped - before) == (70, 0, 0)
    assert (stopped - before)[FAILURES] >= 1
    assert text_of(answer) == expected
    at_rest(node.url)
    at_rest(producer.url)

    later = prompts.take(48)
    assert_fetched(*decode(node, later, prefill(producer.url, later)), 48)
    again = ask(node.url, prompt)
    assert text_of(again) == expected and split_of(again) == (6, 64, 0)
    assert producer.server.process.poll() is None


def test_pages_of_an_expired_lease_that_others_have_reused_are_no_answer(decoders, start_producer, prompts):
    """The lease ends unread, other prompts take its pages, and then D comes with the parameters."""
    node, _ = decoders
    producer = start_producer(kv_lease_duration=1)
    prompt = prompts.take(70)
    early = prompts.take(20)
    decode(node, early, prefill(producer.url, early))
    begun = at_rest(producer.url)
    params = prefill(producer.url, prompt)
    until(lambda: (scrape(producer.url) - begun)[EXPIRED] == 1, "the lease has expired")
    at_rest(producer.url)
    for _ in range(pool_pages(producer.url) // 4 + 1):
        ask(producer.url, prompts.take(70), max_tokens=1)
    answer, change = decode(node, prompt, params)
    assert_computed(answer, change, 70, failure=STALE)
    alone = ask(producer.url, prompt)
    assert split_of(alone) == (70, 0, 0), "its pages had been reused"
    assert text_of(answer) == text_of(alone)


@pytest.mark.parametrize("key", ["remote_host", "remote_port", "remote_block_ids", "remote_lease"])
def test_forged_parameters_are_refused_and_nobody_is_called(pair16, prompts, key):
    """400, and no connection to the address that they name."""
    prompt = prompts.take(40)
    genuine = prefill(pair16.prefill.url, prompt)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        port = listener.getsockname()[1]
        lease = genuine["remote_lease"]
        forged = {
            "remote_host": {"remote_host": "localhost", "remote_port": port},
            "remote_port": {"remote_port": port},
            "remote_block_ids": {
                "remote_port": port,
                "remote_block_ids": [[page + 1 for page in group] for group in genuine["remote_block_ids"]],
            },
            "remote_lease": {"remote_port": port, "remote_lease": lease[:-4] + lease[:4]},
        }[key]
        body = {**GREEDY, "prompt": prompt, "kv_transfer_params": {**genuine, **forged}}
        before = scrape(pair16.decode.url)
        refused = httpx.post(f"{pair16.decode.url}/v1/completions", json=body, timeout=60)
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["param"] == "kv_transfer_params"
        genuine_answer = ask(pair16.decode.url, prompt, kv_transfer_params=genuine)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert split_of(genuine_answer) == (0, 0, 40), "the true ones are still good"
    assert (at_rest(pair16.decode.url) - before)["vllm:prompt_tokens_total"] == 40
    at_rest(pair16.prefill.url)
