"""The side of a peer whose pages are read: answers questions about leases. Single-threaded, no clock."""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from kv.config import CONSUMER
from kv.digest import DIGEST_NAME, digest_rows
from kv.driver import PageCopies, Region
from kv.moves import Event, Lease, LeaseRead, LeaseTouched
from kv.transfer_agent import PoolAgent
from kv.transfer_plan import EngineFacts, memory
from kv.types import DUMMY_PAGE
from kv.wire import (
    PROTOCOL,
    Confirm,
    Confirmed,
    Done,
    DoneAnswer,
    Heartbeat,
    HeartbeatAnswer,
    Hello,
    Message,
    Refused,
    Welcome,
)

DIGESTS_PER_POLL = 8
READING_S = 2.0
"""A peer that asked something reads for about so long; then only its next message shows that it does."""
READING_POLL_S = 2e-4
LEASED_POLL_S = 0.02
"""UCX over TCP serves a read only while the agent is polled: often while a peer reads, else for its knock."""


class _Lease:
    """A lease. Attributes: generations: page -> generation, per group; digests: page -> digest, once known;
    read: a peer has said that it is done."""

    def __init__(self, lease: Lease) -> None:
        self.generations = tuple(
            dict(zip(pages, generations, strict=True))
            for pages, generations in zip(lease.pages, lease.generations, strict=True)
        )
        self.digests: dict[int, bytes] = {}
        self.read = False


class Leases:
    """The live leases, by request.

    Digests are computed when a lease begins, a few per poll, so that they are ready when a peer asks and the
    first token does not wait for them.
    """

    def __init__(
        self,
        facts: EngineFacts,
        copies: PageCopies,
        emit: Callable[[Event], None],
        *,
        digest: bool,
        lease_s: float,
    ) -> None:
        self._facts = facts
        self._copies = copies
        self._emit = emit
        self._digest = digest
        self._lease_s = lease_s
        self._leases: dict[str, _Lease] = {}
        self._undigested: deque[tuple[str, _Lease, int]] = deque()
        self._reading_until = 0.0
        self.ignored = 0

    def __len__(self) -> int:
        return len(self._leases)

    def begin(self, lease: Lease) -> None:
        """Peers may read these pages."""
        row = _Lease(lease)
        self._leases[lease.request_id] = row
        if self._digest:
            pages = {page for group in row.generations for page in group} - {DUMMY_PAGE}
            self._undigested.extend((lease.request_id, row, page) for page in sorted(pages))

    def end(self, request_id: str) -> None:
        """Who asks from now on learns that the pages are not there."""
        self._leases.pop(request_id, None)

    def void(self) -> None:
        """No lease holds any more."""
        self._leases.clear()
        self._undigested.clear()

    def digest_some(self) -> None:
        """Computes the next few digests."""
        while self._undigested:
            request_id, row, _ = self._undigested[0]
            if self._leases.get(request_id) is row:
                pages = [entry[2] for entry in list(self._undigested)[:DIGESTS_PER_POLL] if entry[1] is row]
                self._digest_pages(row, [page for page in pages if page not in row.digests])
                for _ in pages:
                    self._undigested.popleft()
                return
            self._undigested.popleft()

    def next_wake(self, now: float) -> float | None:
        """When there is something to do again; None: not before something comes."""
        if self._undigested:
            return 0.0
        if now < self._reading_until:
            return now + READING_POLL_S
        return now + LEASED_POLL_S if self._leases else None

    @property
    def wants_progress(self) -> bool:
        """A peer may be reading, or about to connect."""
        return bool(self._leases) or self._reading_until > 0.0

    def settle(self, now: float) -> None:
        """Forgets readers that have been silent."""
        if now >= self._reading_until:
            self._reading_until = 0.0

    def answer(
        self, message: Message, agent: PoolAgent | None, regions: Sequence[Region], now: float
    ) -> Message:
        """The answer to a peer's message. `agent`: that peers read from; None: none."""
        self._reading_until = now + READING_S
        match message:
            case Hello():
                return self._welcome(message, agent, tuple(regions))
            case Heartbeat():
                return self._touch(message, now)
            case Confirm():
                return self._confirm(message)
            case Done():
                if message.epoch == self._facts.epoch:
                    self._finish(message.request_ids, now)
                return DoneAnswer(epoch=self._facts.epoch)
            case _:
                self.ignored += 1
                return Refused(code="malformed", reason=f"{type(message).__name__} is no question")

    def _welcome(self, hello: Hello, agent: PoolAgent | None, regions: tuple[Region, ...]) -> Message:
        facts = self._facts
        if hello.protocol != PROTOCOL:
            reason = f"we speak protocol {PROTOCOL}, you {hello.protocol}"
            return Refused(code="protocol", reason=reason)
        if facts.role == CONSUMER:
            return Refused(code="compat", reason=f"engine {facts.engine_id} is a consumer: it lends no pages")
        if agent is None:
            return Refused(code="lease", reason=f"engine {facts.engine_id} can lend no pages for now")
        if hello.compat != facts.compat:
            reason = f"other model, KV dtype or version: compatibility {hello.compat} here {facts.compat}"
            return Refused(code="compat", reason=reason)
        return Welcome(
            protocol=PROTOCOL,
            engine_id=facts.engine_id,
            epoch=facts.epoch,
            agent_name=agent.name,
            agent_metadata=agent.metadata(),
            regions=tuple((r.address, r.page_bytes, r.num_pages, r.device_id) for r in regions),
            memory=memory(regions),
            page_size=facts.page_size,
            page_shape=facts.page_shape,
            item_bytes=facts.item_bytes,
            digest=DIGEST_NAME if self._digest else "",
            lease_s=self._lease_s,
        )

    def _touch(self, heartbeat: Heartbeat, now: float) -> Message:
        ids = heartbeat.request_ids
        known = heartbeat.epoch == self._facts.epoch
        alive = tuple(name for name in ids if known and name in self._leases)
        if alive:
            self._emit(LeaseTouched(request_ids=alive, at_s=now))
        gone = tuple(name for name in ids if not known or name not in self._leases)
        return HeartbeatAnswer(epoch=self._facts.epoch, gone=gone)

    def _finish(self, request_ids: Sequence[str], now: float) -> None:
        """A lease is in force until the step ends it. Of one that is over the step wants to hear too: it was
        read too late."""
        for name in request_ids:
            row = self._leases.get(name)
            if row is not None and row.read:
                self.ignored += 1
                continue
            if row is not None:
                row.read = True
            self._emit(LeaseRead(request_id=name, at_s=now))

    def _confirm(self, confirm: Confirm) -> Message:
        if confirm.epoch != self._facts.epoch:
            return Refused(code="epoch", reason="this engine has been restarted since")
        row = self._leases.get(confirm.request_id)
        if row is None:
            return Refused(code="lease", reason=f"no lease for request {confirm.request_id}: read or expired")
        if not len(confirm.pages) == len(confirm.generations) <= len(row.generations):
            return Refused(code="malformed", reason="page groups do not fit the lease")
        for held, pages, generations in zip(
            row.generations, confirm.pages, confirm.generations, strict=False
        ):
            if len(pages) != len(generations):
                return Refused(code="malformed", reason="pages and generations differ in number")
            for page, generation in zip(pages, generations, strict=True):
                if page != DUMMY_PAGE and held.get(page) != generation:
                    return Refused(code="generation", reason=f"page {page} is not of generation {generation}")
        digests: tuple[tuple[bytes, ...], ...] = ()
        if confirm.digests:
            asked = {page for group in confirm.pages for page in group} - {DUMMY_PAGE}
            self._digest_pages(row, sorted(asked - row.digests.keys()))
            digests = tuple(tuple(row.digests.get(page, b"") for page in group) for group in confirm.pages)
        return Confirmed(epoch=self._facts.epoch, digests=digests)

    def _digest_pages(self, row: _Lease, pages: list[int]) -> None:
        if pages:
            row.digests.update(zip(pages, page_digests(self._copies, self._facts, pages), strict=True))


def page_digests(copies: PageCopies, facts: EngineFacts, pages: Sequence[int]) -> list[bytes]:
    """Digests of pages of the pool, a few pages in hand at a time."""
    page_bytes = int(np.prod(facts.page_shape)) * facts.item_bytes
    rows = np.empty((min(len(pages), DIGESTS_PER_POLL), page_bytes), np.uint8)
    digests: list[bytes] = []
    for first in range(0, len(pages), DIGESTS_PER_POLL):
        some = pages[first : first + DIGESTS_PER_POLL]
        copies.read(some, rows[: len(some)])
        digests += digest_rows(rows[: len(some)])
    return digests
