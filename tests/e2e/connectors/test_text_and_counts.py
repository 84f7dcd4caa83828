"""Prompts through P and D: the text of P alone, and every number exact, for pages of 16, 128 and both."""

import json
import threading

import httpx
import pytest

from tests.e2e import plain_proxy
from tests.e2e.connectors.fleet import (
    GREEDY,
    Node,
    Pair,
    Series,
    ask,
    at_rest,
    prefill,
    scrape,
    sources,
    split_of,
    text_of,
    tiers,
)

pytestmark = [pytest.mark.e2e, pytest.mark.connectors, pytest.mark.timeout(900)]

VLLM_KEYS = {
    *("do_remote_prefill", "do_remote_decode", "remote_block_ids", "remote_engine_id", "remote_request_id"),
    *("remote_host", "remote_port", "tp_size", "dcp_size", "pp_size", "remote_num_tokens"),
    *("remote_blocks_expiry_time", "remote_registration_generation", "transfer_mode"),
    "remote_prefill_cached_tokens",
}
PATHS = ["16", "128", "16 to 128"]
LENGTHS = {"16": (9, 16, 17, 64), "128": (100, 128, 129, 512), "16 to 128": (100, 128, 129, 512)}


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Pair:
    """The pair that a path names; prompts of one pair's P may go to the other's D."""
    if request.param != "16 to 128":
        return request.getfixturevalue(f"pair{request.param}")
    small, large = request.getfixturevalue("pair16"), request.getfixturevalue("pair128")
    return Pair(prefill=small.prefill, decode=large.decode)


@pytest.mark.parametrize(
    ("pair", "length"), [(path, length) for path in PATHS for length in LENGTHS[path]], indirect=["pair"]
)
def test_text_and_numbers_of_a_cold_prompt_are_exact(pair, prompts, length):
    """The plain proxy's flow: P first, then D with P's parameters."""
    prompt = prompts.take(length)
    before_p, before_d = at_rest(pair.prefill.url), at_rest(pair.decode.url)
    answer = plain_proxy.complete(
        pair.prefill.url, pair.decode.url, "/v1/completions", {**GREEDY, "prompt": prompt}
    )
    assert answer.status_code == 200, answer.text
    on_p, on_d = at_rest(pair.prefill.url) - before_p, at_rest(pair.decode.url) - before_d
    assert_prefilled_cold(on_p, length)
    assert_fetched(on_d, length, 0, pair.prefill)
    answer = answer.json()
    assert split_of(answer) == (0, 0, length)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, "P's number: P computed all"
    assert answer["usage"]["prompt_tokens"] == length
    alone = ask(pair.prefill.url, prompt)
    assert text_of(answer) == text_of(alone) and text_of(alone)


@pytest.mark.parametrize("pair", ["16", "128"], indirect=True)
def test_text_through_the_router_is_that_of_p_alone(pair, prompts):
    for length in LENGTHS[str(pair.prefill.page_size)]:
        prompt = prompts.take(length)
        before_p, before_d = at_rest(pair.prefill.url), at_rest(pair.decode.url)
        answer = ask(pair.router_url, prompt)
        on_p, on_d = at_rest(pair.prefill.url) - before_p, at_rest(pair.decode.url) - before_d
        assert_prefilled_cold(on_p, length)
        assert_fetched(on_d, length, 0, pair.prefill)
        assert split_of(answer) == (0, 0, length)
        assert text_of(answer) == text_of(ask(pair.prefill.url, prompt))


def assert_prefilled_cold(on_p: Series, length: int) -> None:
    """P computed all of it, once, and generated one token."""
    assert sources(on_p) == (length, 0, 0) and tiers(on_p) == (0, 0, 0)
    assert on_p["vllm:prompt_tokens_total"] == length
    assert on_p["vllm:generation_tokens_total"] == 1
    assert on_p["vllm:prefix_cache_queries_total"] == length and not on_p["vllm:prefix_cache_hits_total"]
    assert on_p["vllm:external_prefix_cache_hits_total"] == 0
    assert on_p["vllm:nixl_num_kv_expired_reqs_total"] == 0


def assert_fetched(on_d: Series, length: int, hit: int, prefill: Node) -> None:
    """D read what it did not have, whole pages of P's, and computed nothing that counts."""
    assert sources(on_d) == (0, hit, length - hit) and tiers(on_d) == (hit, 0, length - hit)
    assert on_d["vllm:prompt_tokens_total"] == on_d["vllm:prompt_tokens_cached_total"] == length
    assert on_d["vllm:generation_tokens_total"] == GREEDY["max_tokens"]
    assert on_d["vllm:prefix_cache_queries_total"] == length
    assert on_d["vllm:prefix_cache_hits_total"] == hit
    assert on_d["vllm:external_prefix_cache_queries_total"] == length - hit
    assert on_d["vllm:external_prefix_cache_hits_total"] == length - hit
    pages = prefill.pages(length) - hit // prefill.page_size
    assert on_d["vllm:nixl_bytes_transferred_sum"] == pages * prefill.page_bytes
    # NIXL joins the descriptors of neighbours.
    assert 1 <= on_d["vllm:nixl_num_descriptors_sum"] <= pages
    assert on_d["vllm:nixl_bytes_transferred_count"] == 1
    for name in ("nixl_num_failed_transfers", "nixl_num_failed_notifications", "kv_digest_failures"):
        assert on_d[f"vllm:{name}_total"] == 0, name
    assert on_d["vllm:kv_stale_reads_total"] == on_d["vllm:kv_transfer_retries_total"] == 0


def test_parameters_have_vllms_keys(pair16, prompts):
    """In a full answer, and in the last chunk of a stream with the reason of the end."""
    node = pair16.prefill
    prompt = prompts.take(40)
    body = {**GREEDY, "prompt": prompt, "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
    full = httpx.post(f"{node.url}/v1/completions", json=body, timeout=300).json()["kv_transfer_params"]
    with httpx.stream(
        "POST", f"{node.url}/v1/completions", json={**body, "stream": True}, timeout=300
    ) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    carriers = [chunk for chunk in chunks if chunk.get("kv_transfer_params")]
    assert len(carriers) == 1 and carriers[0]["choices"][0]["finish_reason"] == "length"
    streamed = carriers[0]["kv_transfer_params"]
    for params in (full, streamed):
        assert params.keys() >= VLLM_KEYS
        assert params["do_remote_prefill"] is True and params["do_remote_decode"] is False
        assert [len(group) for group in params["remote_block_ids"]] == [3]
        assert params["remote_num_tokens"] == 40
        answer = ask(pair16.decode.url, prompt, kv_transfer_params=params)
        assert text_of(answer) == text_of(ask(node.url, prompt))
    assert full["remote_prefill_cached_tokens"] == 0 and streamed["remote_prefill_cached_tokens"] == 32
    at_rest(node.url)
    at_rest(pair16.decode.url)


def test_a_burst_of_prompts_is_counted_and_answered_one_by_one(pair16, prompts):
    """More than fit at once: whoever waits, and for how long, changes no number and no text."""
    asked = [prompts.take(20 + 3 * index) for index in range(12)]
    before_p, before_d = at_rest(pair16.prefill.url), at_rest(pair16.decode.url)
    answers: dict[int, dict] = {}

    def send(index: int) -> None:
        answers[index] = ask(pair16.router_url, asked[index])

    threads = [threading.Thread(target=send, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    on_p, on_d = at_rest(pair16.prefill.url) - before_p, at_rest(pair16.decode.url) - before_d
    total = sum(map(len, asked))
    assert sources(on_p) == (total, 0, 0) and sources(on_d) == (0, 0, total)
    pages = sum(pair16.prefill.pages(len(prompt)) for prompt in asked)
    assert on_d["vllm:nixl_bytes_transferred_sum"] == pages * pair16.prefill.page_bytes
    for index, prompt in enumerate(asked):
        assert split_of(answers[index]) == (0, 0, len(prompt))
        assert text_of(answers[index]) == text_of(ask(pair16.prefill.url, prompt))


def test_pages_of_p_that_are_larger_than_ds_are_refused_with_the_reason(pair16, pair128, prompts):
    """D computes the prompt instead, says so in its numbers, and names the cause in its log."""
    prompt = prompts.take(150)
    before = at_rest(pair16.decode.url)
    params = prefill(pair128.prefill.url, prompt)
    answer = ask(pair16.decode.url, prompt, kv_transfer_params=params)
    after = at_rest(pair16.decode.url) - before
    assert split_of(answer) == sources(after) == (150, 0, 0)
    assert after["vllm:nixl_num_failed_transfers_total"] == 1
    assert after["vllm:nixl_bytes_transferred_sum"] == 0
    assert "128" in pair16.decode.server.log.read_text()
    assert text_of(answer) == text_of(ask(pair128.prefill.url, prompt))
    at_rest(pair128.prefill.url)


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_role_refuses_the_other_ones_work(pair16, prompts, side):
    """400 that names the role, nothing counted, no load begun."""
    prompt = prompts.take(20)
    node = getattr(pair16, side)
    source = {**prefill(pair16.prefill.url, prompt)} if side == "prefill" else {"do_remote_decode": True}
    before = scrape(node.url)
    body = {**GREEDY, "prompt": prompt, "kv_transfer_params": source}
    refused = httpx.post(f"{node.url}/v1/completions", json=body, timeout=60)
    assert refused.status_code == 400
    assert ("kv_producer" if side == "prefill" else "kv_consumer") in refused.json()["error"]["message"]
    assert (scrape(node.url) - before)["vllm:prompt_tokens_total"] == 0
    if side == "prefill":
        ask(pair16.decode.url, prompt, kv_transfer_params=source)  # D ends the lease
    at_rest(pair16.prefill.url)
