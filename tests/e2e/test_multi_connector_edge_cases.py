"""MultiConnector of NIXL and a host tier on both sides: warm, half warm and cold decode, and eviction on P.

Runs against a pair of its own, or, where PREFILL_URL and DECODE_URL say so, against servers that somebody
else started: see run_multi_connector_edge_case_test.sh. Nobody may use them meanwhile: every number is exact.
"""

import os

import pytest

from tests.e2e import plain_proxy
from tests.e2e.connectors.eviction import assert_change, evict_and_restore
from tests.e2e.connectors.fleet import (
    GREEDY,
    Pair,
    Prompts,
    Series,
    ask,
    at_rest,
    describe,
    split_of,
    text_of,
)

pytestmark = [pytest.mark.e2e, pytest.mark.connectors]

OTHERS = 100


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest) -> Pair:
    """The servers of the environment, else our own."""
    if "PREFILL_URL" not in os.environ:
        return request.getfixturevalue("pair16")
    return Pair(
        prefill=describe(os.environ["PREFILL_URL"]),
        decode=describe(os.environ["DECODE_URL"]),
        router_url=os.environ["ROUTER_URL"],
    )


def through_both(pair: Pair, prompt: list[int]) -> tuple[dict, Series, Series]:
    """The plain proxy's flow: D's answer, and how the numbers of P and of D changed."""
    before_p, before_d = at_rest(pair.prefill.url), at_rest(pair.decode.url)
    body = {**GREEDY, "prompt": prompt}
    answer = plain_proxy.complete(pair.prefill.url, pair.decode.url, "/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json(), at_rest(pair.prefill.url) - before_p, at_rest(pair.decode.url) - before_d


def test_cold_decode_no_cache_hit_metrics(pair: Pair, prompts: Prompts) -> None:
    """P computes all of it; on D all of it is external, and the last token's second run is not counted."""
    length = 4 * pair.decode.page_size + 5
    prompt = prompts.take(length)
    answer, on_p, on_d = through_both(pair, prompt)
    assert_change(on_p, compute=length, hit=0, external=0)
    assert_change(on_d, compute=0, hit=0, external=length)
    assert on_d["vllm:nixl_bytes_transferred_sum"] == pair.prefill.pages(length) * pair.prefill.page_bytes
    assert split_of(answer) == (0, 0, length)
    assert text_of(answer) == text_of(ask(pair.prefill.url, prompt))


def test_full_decode_gpu_cache_hit_metrics(pair: Pair, prompts: Prompts) -> None:
    """The same prompt again: D has its whole pages and reads the rest; asked directly, it computes it."""
    size = pair.decode.page_size
    length = 3 * size + 2
    prompt = prompts.take(length)
    cold, _, _ = through_both(pair, prompt)
    warm, on_p, on_d = through_both(pair, prompt)
    hit = 3 * size
    p_hit = (length - 1) // pair.prefill.page_size * pair.prefill.page_size
    assert_change(on_p, compute=length - p_hit, hit=p_hit, external=0)
    assert_change(on_d, compute=0, hit=hit, external=length - hit)
    rest = pair.prefill.pages(length) - hit // pair.prefill.page_size
    assert on_d["vllm:nixl_bytes_transferred_sum"] == rest * pair.prefill.page_bytes
    assert split_of(warm) == (0, hit, length - hit)
    assert warm["usage"]["prompt_tokens_details"]["cached_tokens"] == p_hit, "P's number"

    before = at_rest(pair.decode.url)
    direct = ask(pair.decode.url, prompt)
    assert_change(at_rest(pair.decode.url) - before, compute=length - hit, hit=hit, external=0)
    assert text_of(cold) == text_of(warm) == text_of(direct) == text_of(ask(pair.prefill.url, prompt))


def test_partial_decode_gpu_cache_hit_metrics(pair: Pair, prompts: Prompts) -> None:
    """D has the beginning from a direct request, which it computed; only what follows comes from P."""
    size = pair.decode.page_size
    prompt = prompts.take(4 * size - 3)
    begun, length = prompt[: 2 * size], len(prompt)
    before = at_rest(pair.decode.url)
    direct = ask(pair.decode.url, begun, max_tokens=1)
    assert_change(at_rest(pair.decode.url) - before, compute=2 * size, hit=0, external=0)
    assert split_of(direct) == (2 * size, 0, 0)
    answer, on_p, on_d = through_both(pair, prompt)
    assert_change(on_p, compute=length, hit=0, external=0)
    assert_change(on_d, compute=0, hit=2 * size, external=length - 2 * size)
    rest = pair.prefill.pages(length) - 2 * size // pair.prefill.page_size
    assert on_d["vllm:nixl_bytes_transferred_sum"] == rest * pair.prefill.page_bytes
    assert text_of(answer) == text_of(ask(pair.prefill.url, prompt))


def test_a_prompt_that_left_the_device_of_p_comes_back_from_its_host_tier(
    pair: Pair, prompts: Prompts
) -> None:
    """After 100 other prompts at least, worth twice the pool at least, the first one again."""
    node = pair.prefill
    evict_and_restore(node, prompts, others=OTHERS, router_url=pair.router_url)
