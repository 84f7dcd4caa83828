"""The protocol between engines that lend and borrow pages: one single-threaded state machine.

No thread, clock, socket or nixl in here: time is an argument, messages go through a `Channel`, and agents are
made by a callable, so that tests and a simulator drive the same object as the server does.

A page that a transfer may write stays with it until the transfer has ended or its agent has been deleted; a
page that arrived counts only after its owner has confirmed that nothing changed under the read, and after its
digest.
"""

from collections.abc import Callable, Sequence

from kv.channel import Channel, ChannelError
from kv.config import CONSUMER, PRODUCER, ConnectorConfig
from kv.driver import PageCopies, Region
from kv.moves import Command, Event, Lease, Load, Loaded, RemoteSource, Store, Stored, Track, Unlease, Untrack
from kv.transfer_agent import AgentError, MakeAgent, PoolAgent
from kv.transfer_leases import Leases
from kv.transfer_peer import Parts, Peer
from kv.transfer_plan import EngineFacts, memory
from kv.unexpected import Unexpected, raised
from kv.wire import Message

AGENTS_AGAIN_S = 1.0
"""Between attempts to make the agents that NIXL has refused."""
QUARANTINE_SHARE = 0.05
QUARANTINE_S = 600.0
QUARANTINE_LEAST_S = 20.0
"""Pages in quarantine, as a share of the pool, and for how long: beyond either, the agent of the peer that
keeps most of them there is deleted, which ends its transfers for certain. That is a last resort, and never
made earlier than the least: a peer that was only stopped, or cut off, was seen to die of it in UCX when it
came back within seconds (its answers met a closed socket), while left alone its reads just end."""


class Transfers:
    """Carries out loads from peers and lends pages to them.

    Attributes:
        ignored: answers and messages that came for what is over.
        recycled: agents deleted for the quarantine's sake.
    """

    def __init__(
        self,
        *,
        make_agent: MakeAgent,
        channel: Channel,
        copies: PageCopies,
        regions: Sequence[Region],
        facts: EngineFacts,
        config: ConnectorConfig,
        quarantine_pages_max: int | None = None,
        unexpected: Unexpected = raised,
    ) -> None:
        """Args:
            make_agent: makes an agent of a name; one per peer, and one to be read from.
            quarantine_pages_max: None: QUARANTINE_SHARE of the pool, at least one page.
            unexpected: see `PoolAgent`.

        Raises:
            AgentError: no agent can be made.
        """
        self._make_agent, self._unexpected = make_agent, unexpected
        self._channel = channel
        self._copies = copies
        self._facts = facts
        self._config = config
        self._regions = tuple(regions)
        self._quarantine_pages_max = (
            max(1, int(regions[0].num_pages * QUARANTINE_SHARE))
            if quarantine_pages_max is None
            else quarantine_pages_max
        )
        self._events: list[Event] = []
        self._calls: dict[int, Callable[[Message | ChannelError, float], None]] = {}
        self._heard: list[tuple[int, Message]] | None = None
        self._peers: dict[tuple[str, str, int], Peer] = {}
        self._sources: dict[str, RemoteSource] = {}
        self._agents_made = 0
        self._leases = Leases(
            facts, copies, self._events.append, digest=config.digest, lease_s=config.lease_s
        )
        self._serving: PoolAgent | None = None
        self._spare: PoolAgent | None = None
        self._ignored = 0
        self._agents_due: float | None = None
        self.recycled = 0
        self._make_agents()

    def hear(self) -> None:
        """Fetches what peers have asked. `poll` answers it.

        With commands from another thread: hear, then take the commands and `start` them, then poll. Then a
        peer's question is never answered with a lease whose end was ordered before the question came.
        """
        if self._heard is None:
            self._heard = []
        self._heard += self._channel.asked()

    def start(self, commands: Sequence[Command], now: float) -> None:
        """Begins moves."""
        for command in commands:
            match command:
                case Lease():
                    self._leases.begin(command)
                case Unlease():
                    self._leases.end(command.request_id)
                case Track():
                    self._sources[command.request_id] = command.source
                    self._peer(command.source).track(command.request_id, command.source, now)
                case Untrack():
                    source = self._sources.pop(command.request_id, None)
                    if source is None:
                        self._ignored += 1
                    else:
                        self._peer(source).untrack(command.request_id, source)
                case Load():
                    self._load(command, now)
                case Store():
                    self._events.append(Stored(move_id=command.move_id, error="peers take no stores"))

    def poll(self, now: float) -> list[Event]:
        """Answers peers, moves everything on, and returns what has happened."""
        if self._agents_due is not None and now >= self._agents_due:
            self._make_agents_again(now)
        if self._heard is None:
            self.hear()
        heard, self._heard = self._heard or [], None
        for number, message in heard:
            self._channel.answer(number, self._leases.answer(message, self._serving, self._regions, now))
        self._leases.settle(now)
        if self._serving is not None and self._leases.wants_progress:
            self._ignored += self._serving.progress()
        for number, answer in self._channel.answers():
            then = self._calls.pop(number, None)
            if then is None:
                self._ignored += 1
            else:
                then(answer, now)
        for peer in self._peers.values():
            peer.advance(now)
        self._keep_quarantine(now)
        self._leases.digest_some()
        events = self._events[:]
        self._events.clear()
        return events

    def next_wake(self, now: float) -> float | None:
        """When to poll again though nothing comes; 0: soon, a transfer is under way. None: never."""
        times = [peer.next_wake(now) for peer in self._peers.values()]
        times += [self._leases.next_wake(now), self._agents_due]
        if self._events:
            times.append(0.0)
        return min((time for time in times if time is not None), default=None)

    def pool_moved(self, regions: Sequence[Region]) -> None:
        """Nobody reads or writes the old place after this; leases are void, loads have failed safely."""
        self._end_all("the page buffer has moved")
        self._regions = tuple(regions)
        self._peers.clear()
        self._copies.pool_moved(regions)
        self._agents_due = 0.0
        for request_id, source in self._sources.items():  # who waits to be read is still to be kept alive
            self._peer(source).track(request_id, source, 0.0)

    def close(self) -> None:
        """Ends everything. Nobody touches the pool after this."""
        self._end_all("the engine stops")
        self._peers.clear()
        self._channel.close()

    @property
    def quarantined_pages(self) -> int:
        """Pages that transfers given up may still write."""
        return sum(stuck.num_pages for peer in self._peers.values() for stuck in peer.stuck)

    @property
    def ignored(self) -> int:
        """See the class."""
        return self._ignored + self._leases.ignored + sum(peer.late for peer in self._peers.values())

    def _end_all(self, error: str) -> None:
        for peer in self._peers.values():
            self._ignored += peer.late
            peer.end_all(error)
        self._leases.void()
        for agent in (self._serving, self._spare):
            if agent is not None:
                agent.destroy()
        self._serving = self._spare = None

    def _make_agents(self) -> None:
        """What the role needs from the start: making an agent takes half a second."""
        if self._config.role != CONSUMER and self._serving is None:
            self._serving = self._agent("serve")
        if self._config.role != PRODUCER and self._spare is None:
            self._spare = self._agent("read")

    def _make_agents_again(self, now: float) -> None:
        """After the pool has moved. What NIXL cannot do now it may be able to do later; until then peers are
        refused, and loads fail."""
        try:
            self._make_agents()
            self._agents_due = None
        except AgentError:
            self._agents_due = now + AGENTS_AGAIN_S

    def _agent(self, purpose: str) -> PoolAgent:
        self._agents_made += 1
        name = f"{self._facts.engine_id}-{self._facts.epoch[:8]}-{purpose}-{self._agents_made}"
        return PoolAgent(self._make_agent, name, self._regions, memory(self._regions), self._unexpected)

    def _take_agent(self) -> PoolAgent:
        agent, self._spare = self._spare, None
        return agent if agent is not None else self._agent("read")

    def _ask(
        self,
        host: str,
        port: int,
        message: Message,
        timeout_s: float,
        then: Callable[[Message | ChannelError, float], None],
    ) -> None:
        self._calls[self._channel.call(host, port, message, timeout_s=timeout_s)] = then

    def _peer(self, source: RemoteSource) -> Peer:
        key = (source.engine_id, source.host, source.port)
        if key not in self._peers:
            for old in [k for k, peer in self._peers.items() if k[1:] == key[1:] and peer.idle]:
                self._peers.pop(old).destroy("another engine listens there now")
            parts = Parts(
                facts=self._facts,
                regions=self._regions,
                copies=self._copies,
                take_agent=self._take_agent,
                ask=self._ask,
                emit=self._events.append,
                lease_s=self._config.lease_s,
                timeout_s=self._config.transfer_timeout_s,
                digest=self._config.digest,
            )
            self._peers[key] = Peer(*key, parts)
        return self._peers[key]

    def _load(self, load: Load, now: float) -> None:
        if self._config.role == PRODUCER or not isinstance(load.source, RemoteSource):
            error = "a producer borrows no pages"
            self._events.append(Loaded(move_id=load.move_id, num_pages=0, error=error, stage="handshake"))
            return
        self._peer(load.source).load(load, load.source, now)

    def _keep_quarantine(self, now: float) -> None:
        while True:
            full = self.quarantined_pages > self._quarantine_pages_max
            least = QUARANTINE_LEAST_S if full else QUARANTINE_S
            old = [p for p in self._peers.values() if any(now - s.since_s >= least for s in p.stuck)]
            if not old:
                return
            worst = max(old, key=_stuck_pages)
            worst.destroy("the peer's agent was deleted to end transfers that hang")
            self.recycled += 1


def _stuck_pages(peer: Peer) -> int:
    return sum(stuck.num_pages for stuck in peer.stuck)
