"""The side that reads: one peer, the loads from it, and the agent that only they use. Single-threaded."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from kv.channel import ChannelError
from kv.driver import PageCopies, Region
from kv.moves import Event, Load, NotificationFailed, RemoteSource, Safe
from kv.transfer_agent import AgentError, PoolAgent
from kv.transfer_fetch import Fetch, Stage, Stuck
from kv.transfer_plan import EngineFacts, mismatch
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

CALL_S = 5.0
"""Deadline of one question, where the load's own is not earlier."""
KNOCK_S = 1.0
"""While reading, the peer is told so often: it serves quickly only while it knows."""
SILENT_HEARTBEATS = 2
"""So many without an answer in a row: the peer is held to be stopped."""
MIN_LEASE_S = 0.6
"""A peer that names a shorter life of its leases gets no more heartbeats than for this."""
STAGING_BYTES = 32 << 20
STUCK_POLL_S = 0.1

Ask = Callable[[str, int, Message, float, Callable[[Message | ChannelError, float], None]], None]
"""(host, port, message, timeout_s, what to do with the answer)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What all peers of an engine use. `take_agent` makes or hands out an agent with the pool registered."""

    facts: EngineFacts
    regions: tuple[Region, ...]
    copies: PageCopies
    take_agent: Callable[[], PoolAgent]
    ask: Ask
    emit: Callable[[Event], None]
    lease_s: float
    timeout_s: float
    digest: bool


class Peer:
    """One peer at one address.

    Attributes:
        tracked: leases to keep alive: request -> source.
        stuck: transfers given up, or failed, that may still write.
        late: answers that nobody waits for any more.
    """

    def __init__(self, engine_id: str, host: str, port: int, parts: Parts) -> None:
        self.engine_id, self.host, self.port = engine_id, host, port
        self.tracked: dict[str, RemoteSource] = {}
        self.stuck: list[Stuck] = []
        self.late = 0
        self._parts = parts
        self._fetches: list[Fetch] = []
        self._agent: PoolAgent | None = None
        self._welcome: Welcome | None = None
        self._staging: np.ndarray | None = None
        self._free_rows: list[int] = []
        self._greeting = False
        self._suspect = False
        self._silent = 0
        self._asking = False
        self._heartbeat_at: float | None = None
        self._knocked_at = 0.0

    # What the step orders.

    def load(self, load: Load, source: RemoteSource, now: float) -> None:
        """Begins a load."""
        fetch = Fetch(load, source, self._parts.facts.page_size, now + self._parts.timeout_s)
        self._fetches.append(fetch)
        if self._parts.facts.page_size != source.page_size and len(load.pages) > 1:
            self._end(fetch, "pages of several groups cannot be regrouped", "handshake")

    def track(self, request_id: str, source: RemoteSource, now: float) -> None:
        """Keeps a lease alive, and shakes hands early."""
        self.tracked[request_id] = source
        if self._heartbeat_at is None:
            self._heartbeat_at = now + self._heartbeat_s
        if self._agent is None and not self._greeting:
            self._greet(min(CALL_S, self._parts.timeout_s))  # a load would wait for it as long as that

    def untrack(self, request_id: str, source: RemoteSource) -> None:
        """Tells the peer that the lease may end."""
        self.tracked.pop(request_id, None)

        def answered(answer: Message | ChannelError, now: float) -> None:
            if not isinstance(answer, DoneAnswer):
                self._parts.emit(NotificationFailed(request_id=request_id))

        done = Done(epoch=source.epoch, request_ids=(source.request_id,))
        self._parts.ask(self.host, self.port, done, CALL_S, answered)

    # What time brings.

    def advance(self, now: float) -> None:
        """Moves everything on as far as it goes."""
        for stuck in list(self.stuck):
            self._look_at(stuck)
        self._drop_suspect()
        for fetch in list(self._fetches):
            if fetch not in self._fetches:  # ended with another
                continue
            if now >= fetch.deadline:
                self._give_up(fetch, now, f"no end within {self._parts.timeout_s:g} s")
            elif fetch.stage is Stage.HANDSHAKE:
                self._shake_hands(fetch, now)
            if fetch in self._fetches and fetch.stage is Stage.POST:
                self._post(fetch, now)
            if fetch in self._fetches and fetch.stage is Stage.TRANSFER:
                self._check(fetch, now)
        if self._heartbeat_at is not None and now >= self._heartbeat_at:
            self._heartbeat_at = now + self._heartbeat_s if self.tracked else None
            self._beat(self.tracked.values())

    def next_wake(self, now: float) -> float | None:
        """When `advance` has something to do; 0: soon. None: not before an answer."""
        times = [fetch.deadline for fetch in self._fetches]
        if any(fetch.stage is Stage.TRANSFER or fetch.fresh for fetch in self._fetches):
            times.append(0.0)
        if self.stuck:
            times.append(now + STUCK_POLL_S)
        if self._heartbeat_at is not None:
            times.append(self._heartbeat_at)
        return min(times, default=None)

    @property
    def _heartbeat_s(self) -> float:
        """Between heartbeats: six in the life of a lease, the peer's where it has said how long that is."""
        welcome = self._welcome
        lease_s = self._parts.lease_s if welcome is None else min(self._parts.lease_s, welcome.lease_s)
        return max(lease_s, MIN_LEASE_S) / 6

    @property
    def idle(self) -> bool:
        """Nothing would be lost with this object but a handshake."""
        return not (self._fetches or self.stuck or self.tracked or self._greeting)

    def destroy(self, error: str) -> None:
        """Deletes the agent; whatever was under way can write no more. The next load shakes hands anew."""
        if self._agent is not None:
            self._agent.destroy()
        self._agent = self._welcome = self._staging = None
        self._free_rows = []
        self._suspect = False
        for stuck in self.stuck:
            if stuck.num_pages:
                self._parts.emit(Safe(move_id=stuck.move_id))
        self.stuck.clear()
        for fetch in list(self._fetches):
            fetch.rows, fetch.failed = [], None
            if fetch.stage is Stage.TRANSFER:
                self._end(fetch, error, "transfer")
            elif fetch.stage is Stage.POST or (fetch.stage is Stage.VERIFY and fetch.staged):
                fetch.restart()

    def end_all(self, error: str) -> None:
        """Deletes the agent and fails every load, safely."""
        self.destroy(error)
        for fetch in list(self._fetches):
            self._end(fetch, error, fetch.stage.broken)

    # Handshake.

    def _greet(self, timeout_s: float) -> None:
        facts = self._parts.facts
        self._greeting = True
        hello = Hello(protocol=PROTOCOL, compat=facts.compat, engine_id=facts.engine_id, epoch=facts.epoch)
        self._parts.ask(self.host, self.port, hello, min(timeout_s, CALL_S), self._greeted)

    def _shake_hands(self, fetch: Fetch, now: float) -> None:
        if self._greeting or self._suspect:
            fetch.greeted = fetch.greeted or self._greeting
        elif self._welcome is not None and self._welcome.epoch == fetch.source.epoch:
            fetch.stage = Stage.POST
        elif fetch.greeted and self._welcome is not None:
            self._end(fetch, "the peer has been restarted since: its lease is void", "handshake")
        else:
            fetch.greeted = True
            self._greet(fetch.deadline - now)

    def _greeted(self, answer: Message | ChannelError, now: float) -> None:
        self._greeting = False
        waiting = [fetch for fetch in self._fetches if fetch.stage is Stage.HANDSHAKE and fetch.greeted]
        error, final = None, True
        if isinstance(answer, ChannelError):
            error, final = f"handshake: {answer}", False
        elif isinstance(answer, Refused):
            error = f"handshake refused ({answer.code}): {answer.reason}"
        elif not isinstance(answer, Welcome):
            error = f"handshake: {type(answer).__name__} is no answer"
        elif answer.engine_id != self.engine_id:
            error = f"engine {answer.engine_id} listens where {self.engine_id} was expected"
        else:
            parts = self._parts
            error = mismatch(parts.facts, parts.regions, answer, digest=parts.digest)
            if error is None and answer != self._welcome:
                error = self._meet(answer)
            if self._heartbeat_at is not None:
                self._heartbeat_at = min(self._heartbeat_at, now + self._heartbeat_s)
        for fetch in waiting:
            if error is not None:
                self._fail(fetch, now, error, "handshake", final=final)

    def _meet(self, welcome: Welcome) -> str | None:
        """A new agent for this life of the peer. Returns what went wrong."""
        if self._welcome is not None and self._welcome.epoch != welcome.epoch:
            self._void()
        else:
            self.destroy("the peer's pool has moved")
        page_bytes = welcome.regions[0][1]
        ratio = self._parts.facts.page_size // welcome.page_size
        try:
            agent = self._parts.take_agent()
        except AgentError as error:
            return str(error)
        if ratio > 1:
            wanted = ratio * self._parts.regions[0].num_pages  # more could never be of use
            rows = max(ratio, min(STAGING_BYTES // page_bytes, wanted))
            self._staging = np.zeros((rows, page_bytes), np.uint8)
            self._free_rows = list(range(rows))
        try:
            agent.meet(welcome, self._staging)
        except AgentError as error:
            agent.destroy()
            return str(error)
        self._agent, self._welcome = agent, welcome
        return None

    def _void(self) -> None:
        """The peer has begun another life: nothing of the old one holds."""
        old = self._welcome.epoch if self._welcome is not None else None
        self.destroy("the peer has been restarted")
        for fetch in [fetch for fetch in self._fetches if fetch.source.epoch == old]:
            self._end(fetch, "the peer has been restarted: its lease is void", fetch.stage.broken)
        self.tracked = {name: source for name, source in self.tracked.items() if source.epoch != old}

    # Transfer.

    @property
    def _reading(self) -> bool:
        return any(fetch.stage is Stage.TRANSFER for fetch in self._fetches)

    def _post(self, fetch: Fetch, now: float) -> None:
        assert self._agent is not None and self._welcome is not None
        if self._silent >= SILENT_HEARTBEATS:  # a read would only end up in quarantine: ask first
            if not self._asking:
                self._asking = True
                self._beat([fetch.source])
            return
        fetch.take_batch(self._free_rows if self._staging is not None else None)
        if not fetch.batch:
            if fetch.finished:
                self._end(fetch, fetch.short, "transfer" if fetch.short else "")
            return  # else it waits for staging rows
        pages = [page for piece in fetch.batch for page in piece.pages]
        if max(pages) >= self._welcome.regions[0][2]:
            self._end(fetch, f"the peer has no page {max(pages)}", "transfer")
            return
        shards = range(len(self._parts.regions))
        per_shard = self._parts.regions[0].num_pages
        targets = fetch.rows if self._staging is not None else [piece.target for piece in fetch.batch]
        local = [shard * per_shard + target for shard in shards for target in targets]
        remote = [shard * self._welcome.regions[0][2] + page for shard in shards for page in pages]
        self._beat([fetch.source])
        self._knocked_at = now
        try:
            fetch.transfer = self._agent.post(local, remote)
        except AgentError as error:
            self._lost(fetch, now, str(error))
            return
        fetch.stage = Stage.TRANSFER

    def _check(self, fetch: Fetch, now: float) -> None:
        assert self._agent is not None
        try:
            measured = self._agent.ended(fetch.transfer)
        except AgentError as error:
            self._lost(fetch, now, str(error))
            return
        if measured is None:
            if now >= self._knocked_at + KNOCK_S:
                self._knocked_at = now
                self._beat([fetch.source])
            return
        fetch.measured(measured)
        fetch.stage = Stage.VERIFY
        groups = range(len(fetch.load.pages))
        confirm = Confirm(
            epoch=fetch.source.epoch,
            request_id=fetch.source.request_id,
            pages=tuple(
                tuple(p for piece in fetch.batch if piece.group == g for p in piece.pages) for g in groups
            ),
            generations=tuple(
                tuple(n for piece in fetch.batch if piece.group == g for n in piece.generations)
                for g in groups
            ),
            digests=self._parts.digest,
        )
        turn = fetch.turn

        def answered(answer: Message | ChannelError, now: float) -> None:
            if fetch in self._fetches and fetch.turn == turn:
                self._confirmed(fetch, answer, now)
            else:
                self.late += 1

        self._parts.ask(self.host, self.port, confirm, min(CALL_S, fetch.deadline - now), answered)
        if self._parts.digest:  # while the peer answers
            fetch.digest(self._parts.copies, self._parts.facts, self._staging)

    def _lost(self, fetch: Fetch, now: float, error: str) -> None:
        """A transfer failed. UCX does not mend a broken connection, and what a post had asked for before it
        failed for another reason may still be written (measured, where memory ran out): the agent goes when
        nobody else uses it, and until then nobody gets the targets."""
        self._suspect = True
        fetch.failed = Stuck(fetch.load.move_id, None, self._pool_pages(fetch), [], now)
        fetch.stage, fetch.rows = Stage.POST, []
        self._drop_suspect()
        self._fail(fetch, now, error, "transfer", final=False)

    def _drop_suspect(self) -> None:
        if self._suspect and not self._reading:
            self.destroy("the peer's connection has failed")

    def _pool_pages(self, fetch: Fetch) -> int:
        """Pages of the pool that its transfer writes."""
        return 0 if self._staging is not None else len(fetch.batch)

    # Verification.

    def _confirmed(self, fetch: Fetch, answer: Message | ChannelError, now: float) -> None:
        if isinstance(answer, ChannelError):
            self._fail(fetch, now, f"the peer did not confirm: {answer}", "transfer", final=False)
            return
        if not isinstance(answer, Confirmed) or answer.epoch != fetch.source.epoch:
            reason = f"{answer.code}: {answer.reason}" if isinstance(answer, Refused) else "no confirmation"
            self._fail(fetch, now, f"the peer's pages are stale: {reason}", "verify", final=True)
            if isinstance(answer, Refused) and answer.code == "epoch" and self._welcome is not None:
                self._greet(CALL_S)
            return
        bad = fetch.settle(answer.digests if self._parts.digest else None)
        facts = self._parts.facts
        if self._staging is not None:
            fetch.write_staged(self._parts.copies, self._staging, facts)
        self._free(fetch)
        if bad:
            self._fail(fetch, now, f"{bad} pages differ from what the peer holds", "verify", final=False)
        elif fetch.finished:
            self._end(fetch, fetch.short, "transfer" if fetch.short else "")
        else:
            fetch.next_batch()

    # Heartbeats.

    def _beat(self, sources: Iterable[RemoteSource]) -> None:
        by_epoch: dict[str, list[str]] = {}
        for source in sources:
            by_epoch.setdefault(source.epoch, []).append(source.request_id)
        for epoch, names in by_epoch.items():
            message = Heartbeat(epoch=epoch, request_ids=tuple(names))
            self._parts.ask(self.host, self.port, message, CALL_S, self._heard)

    def _heard(self, answer: Message | ChannelError, now: float) -> None:
        self._asking = False
        if isinstance(answer, ChannelError):
            self._silent += 1
            if self._silent >= SILENT_HEARTBEATS:
                for fetch in list(self._fetches):
                    self._give_up(fetch, now, "the peer does not answer heartbeats")
            return
        self._silent = 0
        if isinstance(answer, HeartbeatAnswer):
            if self._welcome is not None and answer.epoch != self._welcome.epoch:
                self._void()
            gone = set(answer.gone)
            self.tracked = {k: v for k, v in self.tracked.items() if v.request_id not in gone}

    # Ends.

    def _look_at(self, stuck: Stuck) -> None:
        assert self._agent is not None
        if stuck.transfer is None:
            return
        try:
            if self._agent.ended(stuck.transfer) is None:
                return
        except AgentError:
            self._suspect = True
            self.stuck[self.stuck.index(stuck)] = replace(stuck, transfer=None)
            return
        self.stuck.remove(stuck)
        self._free_rows += stuck.rows
        if stuck.num_pages:
            self._parts.emit(Safe(move_id=stuck.move_id))

    def _give_up(self, fetch: Fetch, now: float, error: str) -> None:
        """Past its deadline: targets of a transfer under way stay in quarantine until it ends."""
        if fetch.stage is not Stage.TRANSFER:
            self._end(fetch, error, fetch.stage.broken)
            return
        targets = self._pool_pages(fetch)
        self.stuck.append(Stuck(fetch.load.move_id, fetch.transfer, targets, fetch.rows, now))
        fetch.rows = []
        self._end(fetch, error, "transfer", safe=not targets)

    def _fail(self, fetch: Fetch, now: float, error: str, stage: str, *, final: bool) -> None:
        """Nobody waits for a transfer of it. Tries once more, unless that cannot help."""
        self._free(fetch)
        if final or fetch.retries or now >= fetch.deadline:
            self._end(fetch, error, stage)
        else:
            fetch.retries = 1
            fetch.restart()

    def _free(self, fetch: Fetch) -> None:
        self._free_rows += fetch.rows
        fetch.rows = []

    def _end(self, fetch: Fetch, error: str | None, stage: str, *, safe: bool = True) -> None:
        self._free(fetch)
        self._fetches.remove(fetch)
        if fetch.failed is not None and fetch.failed.num_pages:
            self.stuck.append(fetch.failed)
            safe = False
        self._parts.emit(fetch.loaded(error, stage, safe=safe))
