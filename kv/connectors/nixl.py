"""NixlConnector's decisions: a prompt's pages are pulled from the peer that computed them, and leased to it.

Semantics of vLLM's NixlConnector in pull mode: the reader asks for all of the prompt beyond its local hit,
once per request; the computing side keeps a finished request's pages until they are read or the lease ends.
"""

from collections.abc import Sequence

from kv.config import CONSUMER, PRODUCER, ConnectorConfig
from kv.connectors.base import Answer, FullPages, LeaseOrder, Offer, Query, StoreOrder
from kv.moves import P2P, Command, HostSource, PageLists, RemoteSource, Track, Untrack


class NixlConnector:
    """Stateless: what is under way is in the ledger, what a request came with is in its sequence."""

    __slots__ = ("_index", "_role")

    supports_hma = True

    def __init__(self, config: ConnectorConfig, *, index: int) -> None:
        self._index, self._role = index, config.role

    def arrived(self, request_id: str, remote: RemoteSource | None) -> Sequence[Command]:
        """Heartbeats begin with the arrival, since a request may wait longer than its lease."""
        if remote is None or self._role == PRODUCER:
            return ()
        return (Track(connector=self._index, request_id=request_id, source=remote),)

    def lookup(self, query: Query) -> Answer:
        """The rest of the prompt, the last token among it: it is computed again, but not for lack of KV."""
        remote = query.remote
        if remote is None or self._role == PRODUCER:
            return ()
        tokens = remote.num_tokens - query.num_computed
        if tokens <= 0 or remote.num_tokens > query.num_tokens:
            return ()
        return (
            Offer(
                connector=self._index,
                tier=P2P,
                num_tokens=tokens,
                first_page=query.num_computed // query.page_size,
                source=remote,
            ),
        )

    def allocated(self, request_id: str, pages: PageLists, offers: Sequence[Offer]) -> None:
        """Nothing to remember."""

    def load_ended(self, source: RemoteSource | HostSource, num_pages: int | None = None) -> None:
        """Nothing to forget."""

    def offer(self, pages: FullPages) -> Sequence[StoreOrder]:
        """Peers come and read; nothing is sent ahead."""
        return ()

    def offer_idle(self, idle: Sequence[tuple[int, int, bytes]]) -> Sequence[StoreOrder]:
        """Nothing is sent ahead."""
        return ()

    def stored(self, slots: Sequence[int], ok: bool) -> None:
        """It orders no stores."""
        raise ValueError("NixlConnector has ordered no store")

    def finished(self, request_id: str, *, wants_lease: bool, completed: bool) -> LeaseOrder | None:
        """The pages of a prompt that was computed for a peer stay; those of an aborted request do not."""
        if not wants_lease or not completed or self._role == CONSUMER:
            return None
        return LeaseOrder(connector=self._index)

    def released(self, request_id: str, remote: RemoteSource | None) -> Sequence[Command]:
        """The peer may end its lease."""
        if remote is None or self._role == PRODUCER:
            return ()
        return (Untrack(connector=self._index, request_id=request_id),)

    def take_outcomes(self) -> Sequence[tuple[int, str, int]]:
        """It stores nothing."""
        return ()

    def tiers(self) -> Sequence[tuple[int, int, int, int, int]]:
        """It has no tier of its own."""
        return ()

    def reset(self) -> None:
        """It caches nothing."""

    def check(self) -> None:
        """It holds nothing."""
