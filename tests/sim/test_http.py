"""Connections between a simulated router and its servers, one fault at a time, and what comes of it."""

import json

import pytest

from jaxserve.router.route import BreakOff, GiveUp, PassRefusal
from jaxserve.sim.http import ROUTER, Break, Fate, Links, Unwell
from jaxserve.sim.server import Reply
from tests.sim.cluster import Cluster

GUESSED = {"p0": "prefill again", "d0": "decode again"}


class Spoiled(Links):
    """Links that a test spoils.

    Attributes:
        fates: of the next connections to a host; then they are well.
        cut: directions; no_files: hosts.
    """

    def __init__(self, **fates: list[Fate]) -> None:
        self.fates = fates
        self.cut: set[tuple[str, str]] = set()
        self.no_files: set[str] = set()

    def exchange(self, host: str) -> Fate:
        return self.fates[host].pop(0) if self.fates.get(host) else Fate()

    def blocked(self, here: str, there: str) -> bool:
        return (here, there) in self.cut

    def refuses(self, host: str) -> bool:
        return host in self.no_files


@pytest.mark.parametrize("where", Break)
@pytest.mark.parametrize("host", ["p0", "d0"])
def test_another_engine_is_asked_when_a_connection_breaks(host: str, where: Break):
    cluster = Cluster(links=Spoiled(**{host: [Fate(breaks=where, after_s=0.005)]}))
    cluster.ask(tokens=16)
    assert cluster.end() == [True]
    assert cluster.counts() == {GUESSED[host]: 1}
    asked = 2 if where is Break.UNSENT else 3
    assert cluster.clients.counts["asked"] == asked
    gone = cluster.clients.counts["aborted"]
    assert gone == (where is Break.WAITING), "a server that sees the break computes no further"


def test_a_stream_that_is_cut_short_is_broken_off():
    cluster = Cluster(links=Spoiled(d0=[Fate(breaks=Break.ANSWER)]))
    cluster.ask(stream=True, tokens=16)
    assert cluster.end() == [False]
    assert isinstance(cluster.told[0].end, BreakOff)


@pytest.mark.parametrize("host", ["p0", "d0"])
@pytest.mark.parametrize("away", [True, False])
def test_a_host_that_is_cut_off_is_given_up_by_its_health_checks(host: str, away: bool):
    links = Spoiled()
    cluster = Cluster(links=links)
    cluster.ask()
    if away:
        links.cut.add((ROUTER, host))  # before there is a connection
    else:
        cluster.asked(host)
        links.cut.add((host, ROUTER))
    cluster.until(lambda: not cluster.router.journeys)
    assert cluster.over == [True]
    assert cluster.counts() == {GUESSED[host]: 1}
    links.cut.clear()
    cluster.end()


def test_what_was_lost_in_a_short_cut_comes_after_it():
    links = Spoiled()
    cluster = Cluster(links=links)
    cluster.ask()
    cluster.asked("d0")
    links.cut.add(("d0", ROUTER))
    cluster.clockwork.after(0.15, "the link is mended", links.cut.clear)
    assert cluster.end() == [True]
    assert not cluster.counts()


def test_a_server_without_files_takes_connections_once_it_has_some():
    links = Spoiled()
    links.no_files.add("p0")
    cluster = Cluster(links=links)
    cluster.clockwork.after(0.5, "it has files again", links.no_files.clear)
    cluster.ask()
    assert cluster.end() == [True]


def test_a_router_without_files_says_so():
    links = Spoiled()
    links.no_files.add(ROUTER)
    cluster = Cluster(links=links)
    cluster.ask()
    assert cluster.end() == [False]
    assert isinstance(cluster.told[0].end, GiveUp)
    assert not cluster.clients.counts["asked"]


def test_a_delayed_request_is_served():
    cluster = Cluster(links=Spoiled(p0=[Fate(late_s=0.1)], d0=[Fate(late_s=0.1)]))
    cluster.ask()
    assert cluster.end() == [True] and not cluster.counts()
    assert cluster.clockwork.now > 0.2


def test_a_server_that_drains_is_well_and_says_503_and_when_to_come_again():
    cluster = Cluster()
    cluster.ask(tokens=16)
    cluster.asked("d0")
    engine, replies = cluster.engines["d0"], list[Reply | None]()
    engine.drain(30.0, lambda ended: None)
    assert engine.alive and cluster.clients.health(engine) == 200
    cluster.clients.serve(engine, b"{}", replies.append, stream=False, request_id=None)
    cluster.until(lambda: bool(replies))
    assert replies[0] is not None and (replies[0].status, replies[0].retry_after_s) == (503, 5)
    assert cluster.end() == [True]


def test_a_full_prefill_server_s_refusal_says_when_to_come_again():
    cluster = Cluster(queued=1)
    for _ in range(4):
        cluster.ask()
    cluster.end()
    refused = [told for told in cluster.told if isinstance(told.end, PassRefusal)]
    assert len(refused) == 2
    for told in refused:
        assert told.reply is not None and told.reply.status == 429 and told.reply.retry_after_s is not None
        assert json.loads(told.reply.body)["error"]["code"] == "queue_full"


@pytest.mark.parametrize(
    ("fate", "stopped", "found"),
    [
        (Fate(), False, 200),
        (Fate(breaks=Break.ANSWER), False, Unwell.REFUSED),
        (Fate(late_s=9.0), False, Unwell.UNANSWERED),
        (Fate(), True, Unwell.UNANSWERED),
    ],
)
def test_a_health_check_meets_what_a_request_would(fate: Fate, stopped: bool, found: int | Unwell):
    cluster = Cluster(links=Spoiled(d1=[fate]))
    if stopped:
        cluster.engines["d1"].pause()
    told: list[int | Unwell] = []
    assert cluster.clients.network is not None
    cluster.clients.network.http.check("decode", "d1", 3.0, told.append)
    cluster.until(lambda: bool(told))
    assert told == [found]
    assert cluster.clockwork.now <= 3.0 + 1e-6
