"""What can come next in a small world, and what its faults do.

What can come:

- an engine's turn, the end of its step, a client's next action: whatever is due now;
- an engine's round of transfers, with the first k of the messages on their way to it, and with or without
  its transfer being over by then. A message does nothing but wait for the round that hears it, and a
  finished transfer for the round that polls it: that they come at any time before is the same as that they
  come with the round. Messages of one direction arrive in their order, unless a fault lets one be overtaken;
  what was sent before time has passed is here when a stopped engine goes on;
- time passes, to the next timer; only when nothing else is left, or as a fault of one engine's clock;
- what a fault has left open: a dead engine begins a new life, a stopped one goes on, a transfer that nobody
  waits for writes late. Each of them at any time later, or never;
- one fault.
"""

from collections import Counter
from collections.abc import Callable, Iterator

from jaxserve.sim.engine import SimEngine
from jaxserve.sim.laws import Broken
from jaxserve.sim.small_world import SmallWorld
from jaxserve.sim.steered import (
    CLIENTS,
    ENGINE_FAULTS,
    HOSTS,
    LEASE_S,
    MESSAGE_FAULTS,
    MOST_WAITS,
    PARTS,
    TIMEOUT_S,
    TRAVEL_S,
    Option,
    Scheduled,
    captured,
    other,
)
from kv.channel import ChannelError


def options(world: SmallWorld) -> list[Option]:
    """All that can happen now; empty: it is over, and nothing is left.

    Raises:
        Broken: it does not end.
    """
    world.clockwork.sweep()
    return [] if world.quiet() else _Coming(world).options()


def option(world: SmallWorld, label: str) -> Option:
    """That which is called so. Labels are the same in a world and in its copies; options are not.

    Raises:
        LookupError: nothing of this name can happen now.
    """
    for found in options(world):
        if found.label == label:
            return found
    raise LookupError(label)


class _Coming:
    """Of one world that is not over."""

    def __init__(self, world: SmallWorld) -> None:
        self._world = world

    def options(self) -> list[Option]:
        """All that can happen now."""
        found = [*self._due()]
        if self._world.hasty:
            told = [option for option in found if option.touches in CLIENTS]
            if told:
                return told[:1]
        opened = [Option(label, self._once(label), PARTS) for label in self._world.open]
        if not found:
            found += self._time_passes()
        found += opened
        if not found:
            raise Broken("I12", f"nothing can happen any more, and requests ended as {self._world.ended}")
        # A fault comes last: by then it is known how a world goes on that has got over it.
        return [*found, *self._faults()] if self._world.fault is None else found

    def _due(self) -> Iterator[Option]:
        clockwork, named = self._world.clockwork, Counter[str]()
        for timer in clockwork.pending:
            paused = timer.owner is not None and timer.owner.paused
            if timer.kind == "event" and timer.at <= clockwork.now and not paused:
                client = self._world.whose(timer)
                label = timer.label if client is None else f"{timer.label}, client {client}"
                named[label] += 1
                yield Option(
                    f"{label} ({named[label]})",
                    lambda timer=timer: clockwork.take(timer),
                    self._touched(timer, client),
                )
        for engine in self._world.engines.values():
            coming = [timer for timer in clockwork.pending if timer.to == engine.host]
            if not engine.alive:
                for timer in coming[:1]:
                    label = f"{timer.label} finds nobody"
                    yield Option(label, lambda timer=timer: clockwork.take(timer), PARTS)
            elif not engine.paused:
                yield from self._rounds(engine, coming)

    def _touched(self, timer: Scheduled, client: int | None) -> frozenset[str]:
        """What a due event touches."""
        host = getattr(timer.owner, "host", None)
        if host is not None:
            return frozenset((host, "lent")) if host == "prefill" else frozenset((host,))
        if client is None:
            return PARTS
        if self._world.tells(timer):
            return frozenset((f"client {client}",))
        asks = {"client 0 asks": "prefill", "client 1 asks": self._world.variant.second}
        return frozenset((asks.get(timer.label, "decode"), f"client {client}"))

    def _rounds(self, engine: SimEngine, coming: list[Scheduled]) -> Iterator[Option]:
        now = self._world.clockwork.now
        due = any(
            timer.kind == "round" and timer.owner is engine and timer.at <= now
            for timer in self._world.clockwork.pending
        )
        polls = self._readable(engine)
        here, there = engine.host, other(engine.host)
        touches = frozenset((here, f"last>{there}", *(("lent",) if here == "decode" else ())))
        least = max((number for number, timer in enumerate(coming, 1) if timer.at < now), default=0)
        for heard in range(least, len(coming) + 1):
            label = f"{here} round, {heard} heard"
            parts = touches | {f"first>{here}"} if heard else touches
            if heard or due:
                yield Option(label, lambda n=heard: self._round(engine, coming[:n], ends=False), parts)
            if polls:
                over = f"{label}, its transfer over"
                yield Option(over, lambda n=heard: self._round(engine, coming[:n], ends=True), parts)

    def _round(self, engine: SimEngine, heard: list[Scheduled], *, ends: bool) -> None:
        for timer in heard:
            self._world.clockwork.take(timer)
        if ends:
            self._world.transfer_time += 2.0
        rounds = engine.rounds[0]
        rounds.wake()
        timer = rounds._timer
        if not isinstance(timer, Scheduled):
            raise TypeError("a round that was asked for has no timer")
        self._world.clockwork.take(timer)

    def _readable(self, engine: SimEngine) -> bool:
        """A poll of one of this engine's transfers would bring something."""
        lives, peers = self._world.nixl._lives, engine.rounds[0].transfers._peers.values()
        if not any(peer.stuck or peer._reading for peer in peers):
            return False
        for transfer in self._world.nixl._transfers:
            if lives[transfer.reader].name in engine.agents():
                source = lives[transfer.source].state
                over = source in ("dead", "deleted")
                if over or (source == "alive" and not transfer.fault.never_ends and not transfer.ended):
                    return True
        return False

    def _time_passes(self) -> Iterator[Option]:
        times = [
            timer.at
            for timer in self._world.clockwork.pending
            if timer.kind != "message" and (timer.owner is None or not timer.owner.paused)
        ]
        if times:
            yield Option("time passes", lambda: self._pass(min(times)), PARTS)

    def _pass(self, until: float) -> None:
        self._world.clockwork.now = max(self._world.clockwork.now, until)
        self._world.waits += 1
        if self._world.waits > MOST_WAITS:
            raise Broken("I12", f"it does not end; requests ended as {self._world.ended}")

    def _once(self, label: str) -> Callable[[], None]:
        return lambda: self._world.open.pop(label)()

    # Faults.

    def _faults(self) -> Iterator[Option]:
        allowed = self._world.variant.faults
        for engine in self._world.engines.values():
            host = engine.host
            for fault in ENGINE_FAULTS:
                if fault not in allowed:
                    continue
                if fault == "kill unheard" and not any(t.to == host for t in self._world.clockwork.pending):
                    continue
                if fault == "clock" and not self._has_deadlines(engine):
                    continue
                parts = {host} if fault == "clock" else {host, "lent"}
                if fault.startswith("kill"):
                    parts |= {"client 0", "client 1", f"first>{host}", f"last>{host}"}
                yield self._fault(f"{fault} {host}", parts, lambda e=engine, f=fault: self._strike(f, e))
        for client in range(2):
            if "leave" in allowed and self._world.ended[client] is None:
                ask = self._world.clients.asks.get(f"request-{client}")
                parts = {f"client {client}", *(() if ask is None else (ask.engine.host,))}
                yield self._fault(f"leave {client}", parts, lambda c=client: self._leave(c))
        for host in HOSTS:
            yield from self._message_faults(
                [timer for timer in self._world.clockwork.pending if timer.to == host]
            )

    def _message_faults(self, queue: list[Scheduled]) -> Iterator[Option]:
        named = Counter[str]()
        for timer in queue:
            named[timer.label] += 1
            for fault in MESSAGE_FAULTS:
                if fault not in self._world.variant.faults:
                    continue
                if fault == "overtaken" and timer is queue[-1]:
                    continue
                if fault == "break" and not timer.label.startswith("message"):
                    continue
                parts = {f"first>{timer.to}"}
                if fault != "lose":
                    parts.add(f"last>{other(timer.to) if fault == 'break' else timer.to}")
                label = f"{fault} {timer.label} ({named[timer.label]})"
                yield self._fault(label, parts, lambda t=timer, f=fault: self._spoil(f, t))

    def _fault(self, label: str, parts: set[str], action: Callable[[], None]) -> Option:
        def strike() -> None:
            self._world.fault = label
            action()

        return Option(label, strike, frozenset(parts), fault=True)

    def _has_deadlines(self, engine: SimEngine) -> bool:
        peers = engine.rounds[0].transfers._peers.values()
        return bool(len(engine.core.state.ledger) or any(not peer.idle for peer in peers))

    def _strike(self, fault: str, engine: SimEngine) -> None:
        host = engine.host
        if fault == "clock":
            engine.offset += max(LEASE_S, TIMEOUT_S) + 1.0
            engine.wake()
            engine.rounds[0].wake()
        elif fault == "stop":
            engine.pause()
            self._world.open[f"{host} goes on"] = engine.resume
        else:
            if fault == "kill unheard":
                for timer in self._world.clockwork.pending:
                    timer.cancelled = timer.cancelled or timer.to == host
            engine.kill()
            self._world.clients.connection_lost(engine)
            self._world.open[f"{host} begins a new life"] = lambda: self._world.start(host)

    def _leave(self, client: int) -> None:
        ask = self._world.clients.asks.get(f"request-{client}")
        if ask is not None:
            self._world.clients.abort(ask)
            return
        for timer in self._world.clockwork.pending:  # between the two steps, or before the first
            if timer.kind == "event" and timer.owner is None:
                timer.cancelled = timer.cancelled or self._world.whose(timer) == client
        self._world.ended[client] = "left"

    def _spoil(self, fault: str, timer: Scheduled) -> None:
        pending = self._world.clockwork.pending
        if fault == "twice":
            self._world.clockwork.after(TRAVEL_S, timer.label, timer.action, timer.owner)
            return
        pending.remove(timer)
        if fault == "overtaken":
            pending.append(timer)
        elif fault == "break":
            told = captured(timer.action)
            self._world.wire._tell(
                told["caller"], told["number"], TRAVEL_S, ChannelError("the connection broke")
            )
