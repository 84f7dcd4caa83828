"""The real protocol on every rank of a pair of engines, over the fake NIXL."""

from collections.abc import Sequence

import numpy as np

from jaxserve.sim.fake_nixl import FakeNixlNetwork, Fault
from kv.config import CONSUMER, PRODUCER
from kv.driver import Region
from kv.moves import Command, Event, Lease, LeaseRead, Load, NotificationFailed, RemoteSource, Track, Untrack
from kv.ranks import Ranks
from tests.kv.fake_channel import FakeWire
from tests.kv.pair import Engine, only_loaded

P_PORT, D_PORT = 100, 200


class Driven:
    """Transfers of one rank as a driver, on the wire's clock."""

    def __init__(self, engine: Engine, wire: FakeWire) -> None:
        self.engine, self.wire = engine, wire

    def start(self, commands: Sequence[Command]) -> None:
        self.engine.transfers.start(commands, self.wire.now)

    def poll(self) -> Sequence[Event]:
        return self.engine.transfers.poll(self.wire.now)

    def pool_moved(self, regions: Sequence[Region]) -> None:
        self.engine.transfers.pool_moved(regions)

    def close(self) -> None:
        self.engine.transfers.close()


class RankedPair:
    """P and D of `count` ranks each: rank `r` of P listens on port `P_PORT + r`."""

    def __init__(self, count: int) -> None:
        self.wire = FakeWire()
        self.networks = [FakeNixlNetwork() for _ in range(count)]
        self.p_ranks = [self._rank(rank, "P", PRODUCER, P_PORT) for rank in range(count)]
        self.d_ranks = [self._rank(rank, "D", CONSUMER, D_PORT) for rank in range(count)]
        self.p = Ranks([Driven(engine, self.wire) for engine in self.p_ranks])
        self.d = Ranks([Driven(engine, self.wire) for engine in self.d_ranks])

    def _rank(self, rank: int, name: str, role: str, port: int) -> Engine:
        return Engine(self.networks[rank], self.wire, name=name, port=port + rank, role=role)

    def lease(self, name: str, pages: tuple[int, ...]) -> RemoteSource:
        generations = ((7,) * len(pages),)
        tokens = 4 * len(pages)
        lease = Lease(
            move_id=1,
            connector=0,
            request_id=name,
            pages=(pages,),
            generations=generations,
            num_tokens=tokens,
        )
        self.p.start([lease])
        facts = self.p_ranks[0].facts
        return RemoteSource(
            engine_id=facts.engine_id, epoch=facts.epoch, host="p", port=P_PORT, request_id=name,
            pages=(pages,), generations=generations, num_tokens=tokens, page_size=facts.page_size,
        )  # fmt: skip

    def order(self, source: RemoteSource, targets: tuple[int, ...]) -> None:
        """D tracks and loads what is leased."""
        load = Load(
            move_id=1, connector=0, request_id="d", first_page=0, pages=(targets,),
            num_tokens=source.num_tokens, source=source,
        )  # fmt: skip
        self.d.start([Track(connector=0, request_id="d", source=source), load])

    def run(self, seconds: float = 0.001) -> tuple[list[Event], list[Event]]:
        """Events of P and of D of many polls."""
        p: list[Event] = []
        d: list[Event] = []
        for _ in range(60):
            self.wire.now += seconds
            p += self.p.poll()
            d += self.d.poll()
        return p, d


def test_ranks_load_the_same_pages_each_from_its_own_peer_and_the_lease_is_read_once() -> None:
    pair = RankedPair(3)
    source = pair.lease("r", (5, 9))
    pair.order(source, (20, 10))
    touched, news = pair.run()
    loaded = only_loaded(news)
    page_bytes = pair.p_ranks[0].pool.rows.shape[1]
    assert (loaded.num_pages, loaded.error, loaded.num_bytes) == (2, None, 3 * 2 * page_bytes)
    for mine, peer in zip(pair.d_ranks, pair.p_ranks, strict=True):
        assert np.array_equal(mine.pool.rows[[20, 10]], peer.pool.rows[[5, 9]])
    assert not any(isinstance(event, LeaseRead) for event in touched)
    pair.d.start([Untrack(connector=0, request_id="d")])
    assert [event.request_id for event in pair.run()[0] if isinstance(event, LeaseRead)] == ["r"]


def test_one_rank_whose_bytes_are_wrong_fails_the_load_of_all() -> None:
    pair = RankedPair(2)
    pair.networks[1].faults = [Fault(flips_bit=True), Fault(flips_bit=True)]
    source = pair.lease("r", (5,))
    pair.order(source, (20,))
    loaded = only_loaded(pair.run()[1])
    assert (loaded.num_pages, loaded.stage, loaded.digest_failures, loaded.retries) == (0, "verify", 2, 1)


def test_a_rank_whose_peer_is_gone_fails_alone_and_the_lease_stays_unread() -> None:
    pair = RankedPair(2)
    source = pair.lease("r", (5, 9))
    pair.wire.listeners[P_PORT + 1].close()
    pair.order(source, (20, 10))
    loaded = only_loaded(pair.run()[1])
    assert (loaded.num_pages, loaded.stage, loaded.safe) == (0, "handshake", True)
    pair.d.start([Untrack(connector=0, request_id="d")])
    p, d = pair.run()
    assert d == [NotificationFailed(request_id="d")]
    assert not any(isinstance(event, LeaseRead) for event in p), "rank 1's peer never read it"
