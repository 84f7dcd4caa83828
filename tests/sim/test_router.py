"""A simulated cluster behind the product's router: two engines of each role, one fault at a time."""

import pytest

from tests.sim.cluster import DECODE, PREFILL, Cluster


@pytest.mark.parametrize("stream", [False, True])
def test_engines_take_turns_and_each_decode_engine_reads(stream: bool):
    cluster = Cluster()
    for _ in range(4):
        cluster.ask(stream=stream)
    assert cluster.end() == [True] * 4
    assert not cluster.counts()
    for name in DECODE:
        stats = cluster.engines[name].core.stats.prompts
        assert (stats.external_kv_transfer, stats.total) == (18, 18)
    assert all(cluster.engines[name].core.stats.prompts.total == 18 for name in PREFILL)


@pytest.mark.parametrize("stream", [False, True])
def test_another_prefill_engine_is_asked_when_one_dies(stream: bool):
    cluster = Cluster()
    cluster.ask(stream=stream)
    cluster.asked("p0")
    cluster.kill("p0")
    assert cluster.end() == [True]
    assert cluster.counts() == {"prefill again": 1}
    assert cluster.engines["d0"].core.stats.prompts.external_kv_transfer == 9


def test_a_decode_engine_computes_where_no_prefill_engine_lives():
    cluster = Cluster()
    for name in PREFILL:
        cluster.kill(name)
    cluster.ask()
    assert cluster.end() == [True]
    cluster.ask()
    assert cluster.end() == [True, True]
    assert cluster.counts() == {"prefill again": 1, "prefill_failed": 1, "no_prefill_server": 1}
    assert sum(cluster.engines[name].core.stats.prompts.computed for name in DECODE) == 18


def test_another_decode_engine_reads_the_same_lease_when_one_dies():
    cluster = Cluster()
    cluster.ask()
    cluster.asked("d0")
    cluster.kill("d0")
    assert cluster.end() == [True]
    assert cluster.counts() == {"decode again": 1}
    assert cluster.engines["d1"].core.stats.prompts.external_kv_transfer == 9
    assert cluster.engines["p0"].core.stats.prompts.total == 9, "the prompt is computed once"


def test_nobody_goes_on_with_a_stream_that_has_begun():
    cluster = Cluster()
    cluster.ask(stream=True, tokens=16)
    ask = cluster.asked("d0")
    cluster.until(lambda: any(journey.begun for journey in cluster.router.journeys))
    assert not ask.over
    cluster.kill("d0")
    assert cluster.end() == [False]
    assert not cluster.counts() and not cluster.engines["d1"].core.stats.prompts.total


@pytest.mark.parametrize("host", ["p0", "d0"])
def test_an_engine_that_falls_silent_is_given_up_and_forgets_the_request_when_it_goes_on(host: str):
    cluster = Cluster()
    cluster.ask()
    cluster.asked(host)
    cluster.engines[host].pause()
    cluster.until(lambda: not cluster.router.journeys)
    assert cluster.over == [True]
    assert cluster.counts() == {"prefill again" if host == "p0" else "decode again": 1}
    assert cluster.clients.asks, "it has not heard of it yet"
    cluster.engines[host].resume()
    cluster.end()
    assert cluster.clients.counts["aborted"] + cluster.clients.counts["right"] == 3


@pytest.mark.parametrize("host", ["p0", "d0"])
def test_a_client_that_leaves_is_not_served_further(host: str):
    cluster = Cluster()
    cluster.ask(tokens=16)
    cluster.clients.abort(cluster.asked(host))
    assert cluster.end() == [False]
    assert not cluster.counts() and cluster.clients.counts["asked"] == (1 if host == "p0" else 2)


def test_an_engine_that_ends_keeps_its_promises_and_new_requests_go_elsewhere():
    cluster = Cluster()
    cluster.ask()
    cluster.asked("p0")
    closed: list[float] = []
    engine = cluster.engines["p0"]
    engine.drain(30.0, lambda ended: closed.append(cluster.clockwork.now))
    assert engine.draining is not None and engine.draining_until == engine.clock() + 30.0
    cluster.asked("d0")
    assert engine.alive and engine.core.num_leases == 1, "it waits for its reader"
    cluster.ask()
    cluster.ask()
    assert cluster.end() == [True] * 3
    assert closed and not engine.alive and not engine.has_aborted
    assert closed[0] < 5.0, "as soon as its pages have been read"
    assert sum(cluster.engines[name].core.stats.prompts.external_kv_transfer for name in DECODE) == 27
    assert cluster.counts() == {"prefill again": 1}


def test_an_engine_whose_time_is_over_tells_its_requests_and_another_serves_them():
    cluster = Cluster()
    cluster.ask(tokens=16)
    cluster.asked("d0")
    engine = cluster.engines["d0"]
    engine.drain(0.02, lambda ended: None)
    assert cluster.end() == [True]
    assert engine.has_aborted and not engine.alive and cluster.clients.counts["aborted"] == 1
    assert cluster.counts() == {"decode again": 1}


def test_a_prefill_engine_that_is_full_refuses_for_the_router():
    """As every server does: the client is told to come again, and no other engine is loaded further."""
    cluster = Cluster(queued=1)
    for _ in range(4):
        cluster.ask()
    ended = cluster.end()
    assert sorted(ended) == [False, False, True, True]
    assert cluster.clients.counts["refused"] == 2 and not cluster.counts()
