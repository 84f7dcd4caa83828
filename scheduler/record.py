"""Steps as bytes: what went in, and a digest that proves what came out.

A record is a header (configuration and limits) and one entry per step: the encoded inputs and a digest,
chained over every byte before it and the plan. Replaying the inputs through `step` must give the same
digests, in any process; one changed byte anywhere breaks the chain.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import msgspec
import numpy as np

from kv.moves import Event
from scheduler.state import SchedulerState, initial_state
from scheduler.step import step
from scheduler.types import Inputs, Limits, Outcome, Plan, Request, SchedulerConfig, Stop

FORMAT = "jaxserve-record-3"
DIGEST_BYTES = 16


class RecordError(ValueError):
    """A record that cannot be read, or whose replay differs."""


class WireOutcome(msgspec.Struct, frozen=True, array_like=True):
    """An outcome with its tokens as little-endian int32 bytes."""

    step_id: int
    tokens: bytes
    error: str | None


class Header(msgspec.Struct, frozen=True):
    """The first entry of a record.

    Attributes:
        engine: what of the engine the tokens depend on, by name; nothing here reads it.
    """

    format: str
    config: SchedulerConfig
    limits: Limits
    engine: dict[str, str | int | bool]


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One step's inputs."""

    arrivals: tuple[Request, ...]
    aborts: tuple[str, ...]
    stops: tuple[Stop, ...]
    outcome: WireOutcome | None
    reset_prefix_cache: bool
    reset_connectors: bool
    events: tuple[Event, ...]
    pool_moved: bool
    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What a replay saw: it proves something only about what the record holds."""

    steps: int
    tokens: int
    preempted: int
    aborted: int
    digest: str
    cut_bytes: int


def canonical(value: Any) -> Any:
    """A value as nested lists of plain values: the same in every process."""
    if isinstance(value, np.ndarray):
        return [value.dtype.str, list(value.shape), np.ascontiguousarray(value).tobytes()]
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, *(canonical(getattr(value, entry.name)) for entry in fields(value))]
    if isinstance(value, tuple | list):
        return [canonical(entry) for entry in value]
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A record as read.

    Attributes:
        start: digest of the header, where the chain begins.
        entries: per step the encoded inputs and the digest written beside them.
        cut_bytes: at the end, of a frame that was never finished: the process was killed.
    """

    header: Header
    start: bytes
    entries: tuple[tuple[bytes, bytes], ...]
    cut_bytes: int


def digest(previous: bytes, inputs: bytes, plan: Plan) -> bytes:
    """Chains one step's encoded inputs and its plan onto the digest of all before it."""
    decided = msgspec.msgpack.encode(canonical(plan))
    framed = len(inputs).to_bytes(8, "little") + inputs + decided
    return hashlib.blake2b(previous + framed, digest_size=DIGEST_BYTES).digest()


def encode_header(
    config: SchedulerConfig, limits: Limits, engine: Mapping[str, str | int | bool] | None = None
) -> tuple[bytes, bytes]:
    """The first frame of a record, and the digest that the chain begins with. `engine`: see `Header`."""
    header = Header(format=FORMAT, config=config, limits=limits, engine=dict(engine or {}))
    payload = msgspec.msgpack.encode(header)
    start = hashlib.blake2b(payload, digest_size=DIGEST_BYTES).digest()
    return _frame(start + payload), start


def encode_inputs(inputs: Inputs) -> bytes:
    """One step's inputs as bytes."""
    outcome = inputs.outcome
    wire = None
    if outcome is not None:
        tokens = np.ascontiguousarray(outcome.tokens, "<i4").tobytes()
        wire = WireOutcome(step_id=outcome.step_id, tokens=tokens, error=outcome.error)
    entry = Entry(
        arrivals=inputs.arrivals,
        aborts=inputs.aborts,
        stops=inputs.stops,
        outcome=wire,
        reset_prefix_cache=inputs.reset_prefix_cache,
        reset_connectors=inputs.reset_connectors,
        events=inputs.events,
        pool_moved=inputs.pool_moved,
        now_s=inputs.now_s,
    )
    return msgspec.msgpack.encode(entry)


def encode_entry(inputs: bytes, chained: bytes) -> bytes:
    """The frame of one step: its digest, then its encoded inputs."""
    return _frame(chained + inputs)


def decode(data: bytes) -> Record:
    """Reads a record. A last frame that was never finished is left out and counted.

    Raises:
        RecordError: not a record, or a damaged one.
    """
    frames, cut = _frames(data)
    if not frames:
        raise RecordError("the record is empty")
    start, payload = frames[0][:DIGEST_BYTES], frames[0][DIGEST_BYTES:]
    if hashlib.blake2b(payload, digest_size=DIGEST_BYTES).digest() != start:
        raise RecordError("this is no record, or its header is damaged")
    try:
        header = msgspec.msgpack.decode(payload, type=Header)
    except (msgspec.MsgspecError, ValueError) as error:
        raise RecordError(f"the header cannot be read: {error}") from error
    if header.format != FORMAT:
        raise RecordError(f"unknown record format {header.format!r}, expected {FORMAT!r}")
    entries = tuple((frame[DIGEST_BYTES:], frame[:DIGEST_BYTES]) for frame in frames[1:])
    return Record(header=header, start=start, entries=entries, cut_bytes=cut)


def decode_inputs(data: bytes) -> Inputs:
    """The inverse of `encode_inputs`.

    Raises:
        RecordError: the bytes hold no inputs.
    """
    try:
        entry = msgspec.msgpack.decode(data, type=Entry)
    except (msgspec.MsgspecError, ValueError) as error:
        raise RecordError(f"the record is damaged: {error}") from error
    outcome = None
    if entry.outcome is not None:
        tokens = np.frombuffer(entry.outcome.tokens, "<i4").astype(np.int32)
        outcome = Outcome(step_id=entry.outcome.step_id, tokens=tokens, error=entry.outcome.error)
    return Inputs(
        arrivals=entry.arrivals,
        aborts=entry.aborts,
        stops=entry.stops,
        outcome=outcome,
        reset_prefix_cache=entry.reset_prefix_cache,
        reset_connectors=entry.reset_connectors,
        events=entry.events,
        pool_moved=entry.pool_moved,
        now_s=entry.now_s,
    )


def replay(record: Record, taken: Callable[[Inputs, Plan], None] | None = None) -> Replayed:
    """Runs the recorded inputs through `step` and compares every digest.

    Args:
        taken: given every step that is the same, in turn; may raise RecordError too.

    Raises:
        RecordError: a step that cannot be run again, or whose digest differs; the message names it.
    """
    state: SchedulerState = initial_state(record.header.config)
    chained, steps, tokens, preempted, aborted = record.start, 0, 0, 0, 0
    for number, (data, wanted) in enumerate(record.entries, 1):
        inputs = decode_inputs(data)
        try:
            state, plan = step(state, inputs, record.header.limits)
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise RecordError(f"step {number} cannot be run again: {error}") from error
        chained = digest(chained, data, plan)
        if chained != wanted:
            raise RecordError(f"step {number} differs from the record")
        if taken is not None:
            taken(inputs, plan)
        steps, tokens = steps + 1, tokens + len(plan.rows.tokens)
        preempted += len(plan.preempted)
        aborted += sum(ended.reason == "abort" for ended in plan.finished)
    return Replayed(
        steps=steps,
        tokens=tokens,
        preempted=preempted,
        aborted=aborted,
        digest=chained.hex(),
        cut_bytes=record.cut_bytes,
    )


def _frame(payload: bytes) -> bytes:
    """The payload after its length, which is written twice, so that damage never looks like a cut."""
    size = len(payload).to_bytes(4, "little")
    return size + size + payload


def _frames(data: bytes) -> tuple[list[bytes], int]:
    """Whole frames, and the bytes of an unfinished one at the end."""
    frames, place = [], 0
    while place + 8 <= len(data):
        size = data[place : place + 4]
        if size != data[place + 4 : place + 8]:
            raise RecordError(f"the record is damaged at byte {place}")
        end = place + 8 + int.from_bytes(size, "little")
        if end > len(data):
            break
        frames.append(data[place + 8 : end])
        place = end
    return frames, len(data) - place
