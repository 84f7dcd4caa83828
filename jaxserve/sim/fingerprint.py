"""What decides the future of a small world, as one hash: two worlds with the same one go on alike.

Everything that a later event can read is in it: the scheduler's state of both engines, their pools byte by
byte, which moves are under way and how far, messages on their way with their content, timers, clients,
faults. Left out is what only counts up (steps, moves, calls, arrivals, agents, statistics); numbers of moves
and calls stand as what they are for, moments as seen from now.
"""

import hashlib
from typing import Any

from jaxserve.sim.device import SimDevice
from jaxserve.sim.engine import SimEngine
from jaxserve.sim.small_world import SmallWorld
from jaxserve.sim.steered import HOSTS, captured
from kv.ledger import Row
from kv.moves import Command, Event, Lease, Load, Store
from kv.transfer_fetch import Fetch as Transfer
from kv.transfer_peer import Peer
from kv.wire import Message, Welcome
from scheduler.state import SchedulerState, Sequence

Print = tuple[Any, ...] | str | bytes | int | float | bool | None


def fingerprint(world: SmallWorld) -> tuple[bytes, bytes]:
    """The hash of a world between two events, and the hash that it would have had without its fault: the same
    where it has had none."""
    told = repr(_parts(world)).encode()
    struck = b"" if world.fault is None else b"excused" if world.excused else b"struck"
    return _hash(struck + told), _hash(told)


def _hash(told: bytes) -> bytes:
    return hashlib.blake2b(told, digest_size=16).digest()


def _parts(world: SmallWorld) -> Print:
    return (
        sorted(world.open),
        world.ended,
        [_engine(engine) for engine in world.engines.values()],
        _timers(world),
        _transfers(world),
        sorted(
            (
                name,
                sorted(ask.tokens.items()),
                sorted(ask.text.items()),
                ask.params is None,
                ask.aborted,
                ask.lost,
            )
            for name, ask in world.clients.asks.items()
        ),
        sorted(world.clients.excuses),
        sorted(world.clients.struck),
        sorted(world.failed_steps),
        sorted(world.not_finite),
    )


def _device(engine: SimEngine) -> SimDevice:
    if not isinstance(engine.device, SimDevice):
        raise TypeError("an engine of a small world has a simulated device")
    return engine.device


def _engine(engine: SimEngine) -> Print:
    if not engine.alive:
        return "dead"
    core, now = engine.core, engine.clock()
    state, inbox, device = core.state, core.inbox, _device(engine)
    arrived = inbox._arrived
    return (
        engine.epoch,
        engine.paused,
        _state(state, now),
        [live.request.request_id for live in arrived.requests],
        list(arrived.aborts),
        arrived.nudged,
        [
            (
                name,
                live.admitted,
                live.left,
                live.failed,
                live.prefill_sent,
                live.prefill,
                [(index, tuple(one.output)) for index, one in live.sequences.items()],
            )
            for name, live in inbox._live.items()
        ],
        core._under_way is None,
        core.pause is None,
        engine._computing,
        [pool.tobytes() for pool in device.pools],
        None
        if device._step is None
        else (device._step.tokens.tobytes(), device._step.half, device._step.fate),
        sorted((slot, device._seeds[slot]) for slot in range(len(state.by_slot)) if slot in device._seeds),
        device._moved,
        sorted((_command(one) for one in engine._movers._unanswered.values()), key=str),
        len(engine._movers._unsafe),
        sorted(engine._movers._drivers),
        _rounds(engine, now),
    )


def _state(state: SchedulerState, now: float) -> Print:
    columns, pages = state.columns, state.pages
    slots = [slot for slot, sequence in enumerate(state.by_slot) if sequence is not None]
    flight = state.in_flight
    return (
        [_sequence(sequence, state) for sequence in sorted(state.sequences.values(), key=lambda s: s.order)],
        [_key(sequence) for sequence in state.running],
        [_key(sequence) for _, sequence in sorted(state.waiting, key=lambda entry: entry[0])],
        [None if sequence is None else _key(sequence) for sequence in state.by_slot],
        sorted(state.free_slots),
        [
            tuple(int(getattr(columns, name)[slot]) for name in _COLUMNS)
            + tuple(columns.tokens[slot, : columns.num_tokens[slot]].tolist())
            + tuple(tuple(table[slot].tolist()) for table in columns.page_tables)
            + tuple(int(first[slot]) for first in columns.first_page)
            for slot in slots
        ],
        None
        if flight is None
        else (
            flight.rows.slots.tolist(),
            flight.rows.starts.tolist(),
            flight.rows.lens.tolist(),
            (columns.epochs[flight.rows.slots] == flight.epochs).tolist(),
        ),
        pages.refs.tolist(),
        pages.generation.tolist(),
        list(pages._free),
        list(pages._idle),
        sorted(pages._borrowed),
        bytes(pages._cached),
        sorted(state.prefix.items()),
        [_row(row, now) for row in state.ledger],
        list(state.loading),
        [_key(sequence) for sequence in state.fetched],
        list(state.remotes),
        list(state.expired),
        state.connector is None,
    )


_COLUMNS = (
    "num_tokens", "num_prompt", "num_computed", "high_water", "max_tokens", "min_tokens", "num_pages",
    "named_pages",
)  # fmt: skip


def _key(sequence: Sequence) -> Print:
    return sequence.request.request_id, sequence.index, sequence.status.value


def _sequence(sequence: Sequence, state: SchedulerState) -> Print:
    fetch = sequence.fetch
    return (
        _key(sequence),
        sequence.slot,
        sequence.settled,
        sequence.hit,
        sequence.high_water,
        sequence.preemptions,
        sequence.prefilled,
        sequence.remote,
        sequence.asked_again,
        sorted(sequence.external.items()),
        len(sequence.names),
        sequence.tokens.tolist(),
        None
        if fetch is None
        else (
            fetch.pages,
            fetch.hit,
            sorted(_move(move_id, state) for move_id in fetch.moves),
            fetch.segments,
            fetch.tokens,
            fetch.sources,
            fetch.error,
        ),
    )


def _move(move_id: int, state: SchedulerState) -> str:
    row = state.ledger.get(move_id)
    return "over" if row is None else repr((row.kind.value, row.pages, row.quarantined))


def _row(row: Row, now: float) -> Print:
    deadline = _after(row.deadline_s, now) if row.kind.value == "lease" else None
    return (_command(row.move), row.pages, deadline, row.quarantined, row.void)


def _command(command: Command) -> Print:
    match command:
        case Load():
            return ("load", command.request_id, command.first_page, command.pages, repr(command.source))
        case Store():
            return ("store", command.pages, command.slots)
        case Lease():
            return ("lease", command.request_id, command.pages, command.generations)
        case _:
            return (type(command).__name__, command.request_id)


def _after(moment: float | None, now: float) -> float | None:
    """A moment, seen from now; what has passed has passed."""
    return None if moment is None else max(0.0, round(moment - now, 6))


# Transfers.


def _rounds(engine: SimEngine, now: float) -> Print:
    rounds = engine.rounds[0]
    transfers, desk, channel, state = rounds.transfers, rounds._desk, rounds.channel, engine.core.state
    leases = transfers._leases
    return (
        [_command(command) for command in desk._commands],
        [_event(event, state) for event in desk._events],
        sorted((_move(move_id, state), unanswered) for move_id, unanswered in desk._open.items()),
        desk.ended,
        [_event(event, state) for event in transfers._events],
        sorted(transfers._sources),
        None if transfers._serving is None else transfers._serving.name,
        transfers._spare is None,
        _after(transfers._agents_due, now),
        [_peer(peer, state, now) for _, peer in sorted(transfers._peers.items())],
        sorted(
            (name, row.generations, sorted(row.digests.items()), row.read)
            for name, row in leases._leases.items()
        ),
        [(name, page) for name, _, page in leases._undigested],
        _after(leases._reading_until, now),
        [_call(number, engine) for number in sorted({*channel._waiting, *transfers._calls})],
        [(_call(number, engine), _content(answer)) for number, answer in channel._outbox],
        channel.closed,
    )


def _event(event: Event, state: SchedulerState) -> Print:
    told = {name: getattr(event, name) for name in event.__struct_fields__ if name != "move_id"}
    for timing in ("at_s", "seconds", "post_seconds"):
        told.pop(timing, None)
    move_id = getattr(event, "move_id", None)
    return (
        type(event).__name__,
        None if move_id is None else _move(move_id, state),
        sorted(told.items(), key=str),
    )


def _peer(peer: Peer, state: SchedulerState, now: float) -> Print:
    agent = peer._agent
    return (
        peer.engine_id,
        sorted(peer.tracked.items(), key=lambda entry: entry[0]),
        [
            (_move(stuck.move_id, state), stuck.num_pages, round(now - stuck.since_s, 6))
            for stuck in peer.stuck
        ],
        _content(peer._welcome),
        None if agent is None else len(agent._transfers),
        peer._greeting,
        peer._suspect,
        peer._silent,
        _after(peer._heartbeat_at, now),
        round(now - peer._knocked_at, 6) if peer._reading else None,
        [_transfer(fetch, state, now) for fetch in peer._fetches],
    )


def _transfer(fetch: Transfer, state: SchedulerState, now: float) -> Print:
    return (
        _move(fetch.load.move_id, state),
        fetch.stage.value,
        fetch.greeted,
        fetch.retries,
        _after(fetch.deadline, now),
        fetch.batch,
        fetch._verified,
        fetch._good,
        fetch._digests,
        fetch.source,
    )


def _call(number: int, engine: SimEngine) -> Print:
    """What a call is about: who takes its answer."""
    channel, then = engine.rounds[0].channel, engine.rounds[0].transfers._calls.get(number)
    waiting = number in channel._waiting
    if then is None:
        return ("nobody", waiting)
    told = captured(then) if then.__name__ == "answered" else {}
    fetch = told.get("fetch")
    current = None
    if fetch is not None:
        peers = engine.rounds[0].transfers._peers.values()
        current = fetch.turn == told.get("turn") and any(fetch in peer._fetches for peer in peers)
    done = told.get("request_id")
    return (then.__qualname__, current, done, waiting)


def _content(message: Message | Exception | None) -> Print:
    """A message without addresses, which differ from run to run."""
    if isinstance(message, Welcome):
        return ("Welcome", message.epoch, message.agent_name)
    return repr(message)


def _timers(world: SmallWorld) -> Print:
    events: list[Print] = []
    links: dict[str, list[Print]] = {host: [] for host in HOSTS}
    for timer in world.clockwork.pending:
        if timer.cancelled or timer.idle or (timer.owner is not None and not timer.owner.alive):
            continue
        if timer.kind == "message":
            told = captured(timer.action)
            caller = told["caller"]
            number = told["number"]
            content = told["data"] if "data" in told else _content(told["answer"])
            epoch = caller.end.epoch
            known = world.engines[caller.end.host]
            about = _call(number, known) if known.epoch == epoch else "a life that is over"
            here = timer.at < world.clockwork.now
            links[timer.to].append((timer.label, epoch, about, content, here))
        else:
            whose = world.whose(timer)
            events.append((timer.label, whose, _after(timer.at, world.clockwork.now)))
    return (links, sorted(events, key=str))


def _transfers(world: SmallWorld) -> Print:
    places = {}
    for engine in world.engines.values():
        for index, pool in enumerate(_device(engine).pools):
            places[pool.ctypes.data] = (engine.host, index, pool.nbytes)
    lives = world.nixl._lives

    def place(address: int) -> Print:
        for start, (host, index, size) in places.items():
            if start <= address < start + size:
                return (host, index, address - start)
        return "a pool that was left"

    return (
        sorted((life.name, life.state) for life in lives.values() if life.state != "deleted"),
        [
            (
                lives[one.reader].name,
                lives[one.reader].state,
                lives[one.source].state,
                [(place(target), place(source)) for target, source, _ in one.copies],
                one.written,
                repr(one.fault),
                one.polls <= one.polls_left,
                world.transfer_time < one.ends_at,
            )
            for one in world.nixl._transfers
            if not one.ended
        ],
    )
