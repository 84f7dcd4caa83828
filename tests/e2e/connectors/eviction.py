"""The first prompt, many others, the first prompt again: it left the device, and came back from the host."""

import concurrent.futures

from tests.e2e.connectors.fleet import (
    HOST_BYTES,
    Node,
    Prompts,
    Series,
    ask,
    at_rest,
    pool_pages,
    scrape,
    sources,
    split_of,
    text_of,
    tiers,
    until,
)


def assert_change(change: Series, *, compute: int, hit: int, external: int, tier: str = "p2p") -> None:
    """Every series that counts prompt tokens says the same, and failures there were none."""
    assert sources(change) == (compute, hit, external)
    assert tiers(change) == (hit, external if tier == "host" else 0, external if tier == "p2p" else 0)
    assert change["vllm:prompt_tokens_total"] == compute + hit + external
    assert change["vllm:prompt_tokens_cached_total"] == hit + external
    assert change["vllm:prefix_cache_queries_total"] == compute + hit + external
    assert change["vllm:prefix_cache_hits_total"] == hit
    assert change["vllm:external_prefix_cache_queries_total"] == compute + external
    assert change["vllm:external_prefix_cache_hits_total"] == external
    assert change["vllm:nixl_num_failed_transfers_total"] == 0


def evict_and_restore(node: Node, prompts: Prompts, *, others: int, router_url: str = "") -> None:
    """Fills a server's pool twice over, and asks its first prompt again."""
    size = node.page_size
    length = 3 * size + 2
    prompt = prompts.take(length)
    loaded, stored = HOST_BYTES[node.host_tier]
    before = at_rest(node.url)
    first = ask(node.url, prompt)
    until(lambda: (scrape(node.url) - before)[stored] >= 3 * node.page_bytes, "the host tier has its pages")

    begun = at_rest(node.url)
    count = max(others, 2 * pool_pages(node.url))
    fillers = [prompts.take(size + 1) for _ in range(count)]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        done = list(threads.map(lambda filler: ask(node.url, filler, max_tokens=1), fillers))
    full = at_rest(node.url)
    assert [split_of(answer) for answer in done] == [(size + 1, 0, 0)] * count
    # The census: what entered the cache, less what it grew by, has left it; the oldest goes first.
    entered = count * (size + 1 - 1) // size
    grown = full['vllm:kv_pages{state="idle"}'] - begun['vllm:kv_pages{state="idle"}']
    assert entered >= 2 * pool_pages(node.url)
    assert entered - grown >= begun['vllm:kv_pages{state="idle"}'] >= 3, "all that was cached has left"

    until(lambda: scrape(node.url)["vllm:kv_pages_in_moves"] == 0, "nothing is stored any more")
    before = at_rest(node.url)
    again = ask(node.url, prompt)
    restored = at_rest(node.url) - before
    hit = 3 * size
    assert split_of(again) == (length - hit, 0, hit)
    assert_change(restored, compute=length - hit, hit=0, external=hit, tier="host")
    assert restored[loaded] == 3 * node.page_bytes
    assert text_of(again) == text_of(first)
    if router_url:
        assert text_of(ask(router_url, prompt)) == text_of(first)
        at_rest(node.url)
