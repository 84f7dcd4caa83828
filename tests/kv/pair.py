"""Two engines' transfers over the fake NIXL and the fake channel, on real bytes in NumPy pools."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from jaxserve.sim.fake_nixl import FakeNixlNetwork
from kv.config import CONSUMER, LEASE_S, NIXL, PRODUCER, ConnectorConfig
from kv.driver import Region
from kv.moves import Event, Lease, Load, Loaded, RemoteSource
from kv.transfer_plan import EngineFacts
from kv.transfers import Transfers
from tests.kv.fake_channel import FakeWire

NUM_PAGES = 64
LAYERS, HEADS, DIM, ITEM = 2, 2, 4, 2
PORT_P, PORT_D = 1, 2


class Pool:
    """Pages in NumPy: uint8 `[NUM_PAGES, page_bytes]`, random, and `kv.driver.PageCopies` over them."""

    def __init__(self, page_size: int, seed: int) -> None:
        self.shape = (LAYERS, 2, HEADS, page_size, DIM)
        page_bytes = int(np.prod(self.shape)) * ITEM
        self.rows = np.random.default_rng(seed).integers(0, 256, (NUM_PAGES, page_bytes), dtype=np.uint8)

    @property
    def region(self) -> Region:
        return Region(address=self.rows.ctypes.data, page_bytes=self.rows.shape[1], num_pages=NUM_PAGES)

    def read(self, pages: Sequence[int], out: np.ndarray) -> None:
        out[:] = self.rows[list(pages)]

    def write(self, pages: Sequence[int], rows: np.ndarray) -> None:
        self.rows[list(pages)] = rows

    def pool_moved(self, regions: Sequence[Region]) -> None:
        assert list(regions) == [self.region]

    def tokens(self, pages: Sequence[int]) -> np.ndarray:
        """What attention sees: uint16 `[layers, 2, heads, tokens, dim]`."""
        views = [self.rows[page].view(np.uint16).reshape(self.shape) for page in pages]
        return np.concatenate(views, axis=3)


class Engine:
    """One engine's transfers and pool."""

    def __init__(
        self,
        network: FakeNixlNetwork,
        wire: FakeWire,
        *,
        name: str,
        port: int,
        page_size: int = 4,
        role: str = PRODUCER,
        epoch: str = "0" * 32,
        compat: str = "same",
        config: ConnectorConfig | None = None,
        quarantine_pages_max: int | None = 2,
    ) -> None:
        self.pool = Pool(page_size, seed=port)
        self.port = port
        self.facts = EngineFacts(
            engine_id=name,
            epoch=epoch,
            compat=compat,
            role=role,
            page_size=page_size,
            page_shape=self.pool.shape,
            item_bytes=ITEM,
        )
        self.transfers = Transfers(
            make_agent=network.agent,
            channel=wire.channel(port),
            copies=self.pool,
            regions=[self.pool.region],
            facts=self.facts,
            config=config or ConnectorConfig(kind=NIXL, role=role),
            quarantine_pages_max=quarantine_pages_max,
        )
        self.events: list[Event] = []

    def lease(
        self, request_id: str, pages: Sequence[int], num_tokens: int, generation: int = 7
    ) -> RemoteSource:
        """Leases pages, and says where they are."""
        lists, generations = (tuple(pages),), ((generation,) * len(pages),)
        lease = Lease(
            move_id=0,
            connector=0,
            request_id=request_id,
            pages=lists,
            generations=generations,
            num_tokens=num_tokens,
        )
        self.transfers.start([lease], 0.0)
        return RemoteSource(
            engine_id=self.facts.engine_id,
            epoch=self.facts.epoch,
            host="p",
            port=self.port,
            request_id=request_id,
            pages=lists,
            generations=generations,
            num_tokens=num_tokens,
            page_size=self.facts.page_size,
        )


class Pair:
    """P and D. Attributes: p, d."""

    def __init__(
        self,
        *,
        p_page: int = 4,
        d_page: int = 4,
        digest: bool = True,
        d_compat: str = "same",
        p_role: str = PRODUCER,
        p_lease_s: float = LEASE_S,
        quarantine_pages_max: int = 2,
    ) -> None:
        self.network, self.wire = FakeNixlNetwork(), FakeWire()
        config = ConnectorConfig(kind=NIXL, role=CONSUMER, digest=digest)
        self.p = Engine(
            self.network,
            self.wire,
            name="P",
            port=PORT_P,
            page_size=p_page,
            role=p_role,
            config=replace(config, role=p_role, lease_s=p_lease_s),
        )
        self.d = Engine(
            self.network,
            self.wire,
            name="D",
            port=PORT_D,
            page_size=d_page,
            role=CONSUMER,
            config=config,
            compat=d_compat,
            quarantine_pages_max=quarantine_pages_max,
        )

    def restart_p(self) -> None:
        """P comes back under the same address, as another life with other pages."""
        self.network.kill(self.serving)
        self.p = Engine(self.network, self.wire, name="P", port=PORT_P, epoch="1" * 32)

    @property
    def serving(self) -> str:
        return next(name for name in self.network.agents if name.startswith("P-") and "serve" in name)

    @property
    def reading(self) -> list[str]:
        return [name for name in self.network.agents if name.startswith("D-") and "read" in name]

    def tick(self, seconds: float = 0.0) -> list[Event]:
        """Both engines poll once; returns D's events."""
        self.wire.now += seconds
        self.p.events += self.p.transfers.poll(self.wire.now)
        news = self.d.transfers.poll(self.wire.now)
        self.d.events += news
        return news

    def run(self, ticks: int = 40, seconds: float = 0.001) -> list[Event]:
        """D's events of many polls."""
        return [event for _ in range(ticks) for event in self.tick(seconds)]

    def until_read(self) -> None:
        """On until a transfer has been posted."""
        for _ in range(20):
            self.tick()
            if self.d.transfers.next_wake(self.wire.now) == 0.0 and self.network._transfers:
                return
        raise AssertionError("no transfer was posted")

    def load(
        self, source: RemoteSource, pages: Sequence[int], *, move_id: int = 1, first: int = 0, tokens: int = 0
    ) -> None:
        """Orders a load of everything from page position `first` on."""
        size = self.d.facts.page_size
        load = Load(
            move_id=move_id,
            connector=0,
            request_id=f"d{move_id}",
            first_page=first,
            pages=(tuple(pages),),
            num_tokens=tokens or min(source.num_tokens - first * size, len(pages) * size),
            source=source,
        )
        self.d.transfers.start([load], self.wire.now)


def only_loaded(events: Sequence[Event]) -> Loaded:
    """The single `Loaded` among events."""
    (loaded,) = [event for event in events if isinstance(event, Loaded)]
    return loaded
