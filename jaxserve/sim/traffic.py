"""Recorded traffic: when requests came, how long they were, and what their prompts had in common.

Three kinds of file are read, told apart by their content:

- a record that `jaxserve serve --record FILE` wrote: every prompt, token by token;
- JSON lines in the open trace format of Mooncake (https://github.com/kvcache-ai/Mooncake, FAST'25):
  `{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [...]}`, one id for each 512
  tokens of the prompt begun; equal ids are equal tokens;
- the report of `jaxserve bench serve --json FILE --save-detailed`: lengths and times, prompts that have
  nothing in common.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from scheduler.record import Record, RecordError, decode, decode_inputs
from scheduler.state import initial_state
from scheduler.step import step
from scheduler.types import Request

BLOCK_TOKENS = 512
"""Tokens that one of a trace's hash ids stands for, in Mooncake's files."""

VOCABULARY = (1_000, 16_000)
"""Made token ids are from here: every usual vocabulary has them, and none is a control token."""


class TraceError(ValueError):
    """A file that is no trace; one line that says where and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenPrompt:
    """A prompt that is known."""

    ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Its length."""
        return len(self.ids)

    def token_ids(self) -> tuple[int, ...]:
        """Its tokens."""
        return self.ids


@dataclass(frozen=True, slots=True, kw_only=True)
class HashedPrompt:
    """A prompt of which only lengths and equal parts are known. Its tokens are made when they are needed.

    Attributes:
        num_tokens: its length.
        hash_ids: one per block; prompts with the same first ids have the same first tokens.
        block_tokens: length of a block; the last one may be cut.
    """

    num_tokens: int
    hash_ids: tuple[int | str, ...]
    block_tokens: int

    def __post_init__(self) -> None:
        wanted = -(-self.num_tokens // self.block_tokens)
        if len(self.hash_ids) != wanted:
            raise ValueError(
                f"{self.num_tokens} tokens are {wanted} blocks of {self.block_tokens}, got "
                f"{len(self.hash_ids)} hash ids"
            )

    def token_ids(self) -> tuple[int, ...]:
        """The same tokens for the same ids, in every process."""
        blocks = [_block(hash_id, self.block_tokens) for hash_id in self.hash_ids]
        return tuple(np.concatenate(blocks)[: self.num_tokens].tolist())


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request as it came.

    Attributes:
        at_s: seconds after the first one.
        prompt: its tokens, or what is known of them.
        output_tokens: how many were generated; the simulation generates as many.
        cache_salt: prompts of different salts share nothing.
    """

    at_s: float
    prompt: GivenPrompt | HashedPrompt
    output_tokens: int
    cache_salt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Traffic, in the order in which it came.

    Attributes:
        source: what kind of file it was, for reports.
        arrivals: the first is at 0 s.
        left_out: requests of the file that say nothing about load: failed ones, those that ended before
            their first token, and prefill servers' own.
    """

    source: str
    arrivals: tuple[Arrival, ...]
    left_out: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Of all requests."""
        return sum(arrival.prompt.num_tokens for arrival in self.arrivals)

    @property
    def output_tokens(self) -> int:
        """Of all requests."""
        return sum(arrival.output_tokens for arrival in self.arrivals)

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last."""
        return self.arrivals[-1].at_s

    def first(self, count: int) -> "Trace":
        """Only the first requests; at least one."""
        return replace(self, arrivals=self.arrivals[: max(1, count)])

    def faster(self, factor: float) -> "Trace":
        """The same requests at `factor` times the rate.

        Raises:
            ValueError: the factor is not positive.
        """
        if not factor > 0:
            raise ValueError(f"a rate cannot be multiplied by {factor}")
        return replace(
            self,
            arrivals=tuple(replace(arrival, at_s=arrival.at_s / factor) for arrival in self.arrivals),
        )


def read_trace(path: Path, *, block_tokens: int = BLOCK_TOKENS) -> Trace:
    """Reads any of the three kinds of file.

    Args:
        path: the file.
        block_tokens: tokens per hash id, of JSON lines.

    Raises:
        TraceError: it cannot be read, or is no trace.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from error
    try:
        if data.lstrip()[:1] != b"{":
            return from_record(decode(data))
        if _is_report(data):
            return from_report(data)
        return from_lines(data, block_tokens=block_tokens)
    except (TraceError, RecordError) as error:
        raise TraceError(f"{path}: {error}") from error


class _Line(msgspec.Struct, frozen=True):
    """One request of an open trace; keys beyond these mean nothing here."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Annotated[int, msgspec.Meta(ge=1)]
    output_length: Annotated[int, msgspec.Meta(ge=1)]
    hash_ids: tuple[int | str, ...]


def from_lines(data: bytes, *, block_tokens: int = BLOCK_TOKENS) -> Trace:
    """Reads JSON lines in Mooncake's format. Empty lines are skipped, order does not matter.

    Raises:
        TraceError: a line that is none, or there is no line; the message has its number.
    """
    decoder = msgspec.json.Decoder(_Line)
    arrivals: list[Arrival] = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            read = decoder.decode(line)
            prompt = HashedPrompt(
                num_tokens=read.input_length, hash_ids=read.hash_ids, block_tokens=block_tokens
            )
        except (ValueError, RecursionError) as error:
            raise TraceError(f"line {number}: {error}") from error
        arrivals.append(Arrival(at_s=read.timestamp / 1000, prompt=prompt, output_tokens=read.output_length))
    return _trace("trace of hashed prompts", arrivals)


def from_record(record: Record) -> Trace:
    """Reads what a server recorded. Its scheduler runs again, which says how long the answers were.

    A request came when the step that took it in was decided: up to one step later than at the door. One of
    several sequences counts as one request with the longest of them; one that was still running at the end
    of the record counts with what it had.

    Raises:
        TraceError: there is no request in it.
        RecordError: it is damaged.
    """
    seen: dict[str, tuple[float, Request]] = {}
    outputs: dict[str, dict[int, int]] = {}
    owners: dict[int, tuple[str, int]] = {}
    state = initial_state(record.header.config)
    for number, (data, _) in enumerate(record.entries, 1):
        inputs = decode_inputs(data)
        try:
            state, plan = step(state, inputs, record.header.limits)
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise RecordError(f"step {number} cannot be run again: {error}") from error
        for request in inputs.arrivals:
            seen[request.request_id] = (inputs.now_s, request)
            outputs[request.request_id] = {}
        for slot in plan.accepted.slots:
            request_id, index = owners[int(slot)]
            outputs[request_id][index] = outputs[request_id].get(index, 0) + 1
        for gone in (*plan.finished, *plan.preempted):
            if gone.slot is not None:
                owners.pop(gone.slot, None)
        for entry in plan.admitted:
            owners[entry.slot] = (entry.request_id, entry.index)
    arrivals = []
    for request_id, (now_s, request) in seen.items():
        if request.lease or not outputs[request_id]:
            continue
        prompt = GivenPrompt(ids=request.prompt_token_ids)
        longest = max(outputs[request_id].values())
        arrivals.append(
            Arrival(at_s=now_s, prompt=prompt, output_tokens=longest, cache_salt=request.cache_salt)
        )
    if not arrivals and any(request.lease for _, request in seen.values()):
        raise TraceError("this is the record of a prefill server; that of its decode server has the answers")
    return _trace("record of a server", arrivals, left_out=len(seen) - len(arrivals))


class _Sent(msgspec.Struct, frozen=True):
    """One request of a report; see `jaxserve.bench.stats.RequestRecord`."""

    start: float
    end: float
    prompt_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    output_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    error: str | None = None


class _Endpoint(msgspec.Struct, frozen=True):
    label: str = ""
    requests: list[list[_Sent]] | None = None


class _Report(msgspec.Struct, frozen=True):
    endpoints: Annotated[list[_Endpoint], msgspec.Meta(min_length=1)]


def from_report(data: bytes) -> Trace:
    """Reads the first endpoint of a report of `jaxserve bench serve`, its rounds one after another.

    A report does not hold the prompts: each becomes one that shares nothing with another.

    Raises:
        TraceError: not such a report, or one without the requests.
    """
    try:
        first = msgspec.json.decode(data, type=_Report).endpoints[0]
    except (ValueError, RecursionError) as error:
        raise TraceError(f"not a report of `jaxserve bench serve`: {error}") from error
    if first.requests is None:
        raise TraceError("the report holds no requests: it must be written with --save-detailed")
    arrivals: list[Arrival] = []
    began, count = 0.0, 0
    for sent in first.requests:
        origin = min((request.start for request in sent), default=0.0)
        for request in sent:
            count += 1
            if request.error is not None or request.prompt_tokens is None or not request.output_tokens:
                continue
            hash_id = f"request {count}"
            prompt = HashedPrompt(
                num_tokens=request.prompt_tokens, hash_ids=(hash_id,), block_tokens=request.prompt_tokens
            )
            at_s = began + request.start - origin
            arrivals.append(Arrival(at_s=at_s, prompt=prompt, output_tokens=request.output_tokens))
        began += max((request.end for request in sent), default=origin) - origin
    return _trace("report of a benchmark", arrivals, left_out=count - len(arrivals))


def _trace(source: str, arrivals: list[Arrival], *, left_out: int = 0) -> Trace:
    """Arrivals in order, counted from the first."""
    if not arrivals:
        raise TraceError("there is no request in it")
    arrivals.sort(key=lambda arrival: arrival.at_s)
    begin = arrivals[0].at_s
    moved = tuple(replace(arrival, at_s=arrival.at_s - begin) for arrival in arrivals)
    return Trace(source=source, arrivals=moved, left_out=left_out)


def _is_report(data: bytes) -> bool:
    """One JSON object with "endpoints", and not one object per line."""
    try:
        return "endpoints" in msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError):
        return False


def _block(hash_id: int | str, tokens: int) -> np.ndarray:
    """int64 `[tokens]`, the tokens that a hash id stands for; a shorter block begins a longer one."""
    seed = f"{type(hash_id).__name__} {hash_id}".encode()
    drawn = np.frombuffer(hashlib.shake_128(seed).digest(4 * tokens), "<u4").astype(np.int64)
    low, high = VOCABULARY
    return low + drawn % (high - low)
