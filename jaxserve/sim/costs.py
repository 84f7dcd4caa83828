"""What a step, a transfer and a request over HTTP cost, as a table that was measured.

A step runs in one compiled shape, its bucket, whatever it holds of it (`jaxserve/batch.py`); what it holds
matters to attention alone. So a bucket's time is

    base + by_context * (longest context of its rows of one token) + by_pair * (pairs of its chunks)

where a pair is a token of a prompt chunk and a token that it attends to. The three are fitted to measured
points, none below zero. On top comes what the host does between two steps: a fixed part, and one per row.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from jaxserve.batch import Bucket, choose
from scheduler.types import Rows

FORMAT = "jaxserve-step-costs-1"

LATENESS_S = 0.0001
"""Between the wake-up of a thread and its work. Not measured: a transfer's messages are, with it."""

Seconds = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class CostError(ValueError):
    """A cost table that cannot be used; one line that says where and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step's time depends on, beside its bucket.

    Attributes:
        context: of its rows of one token, the longest; with that token.
        pairs: of its longer rows, each token with each that it attends to.
    """

    context: Count
    pairs: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A measured step. `seconds`: median of its repetitions."""

    work: Work
    seconds: Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketCost:
    """The time of one compiled shape.

    Attributes:
        tokens, rows: the shape.
        base_s: of an empty one.
        by_context_s: per token of the longest context of rows of one token.
        by_pair_s: per pair of the chunks.
        points: what these were fitted to.
    """

    tokens: Annotated[int, msgspec.Meta(ge=1)]
    rows: Annotated[int, msgspec.Meta(ge=1)]
    base_s: Seconds
    by_context_s: Seconds
    by_pair_s: Seconds
    points: tuple[Point, ...] = ()

    def seconds(self, work: Work) -> float:
        """Of a step in this shape."""
        return self.base_s + self.by_context_s * work.context + self.by_pair_s * work.pairs

    @property
    def worst_error(self) -> float:
        """The largest distance of a measured point from the fit, as a share of the point."""
        return max((abs(self.seconds(p.work) / p.seconds - 1) for p in self.points), default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferCost:
    """Pages from a prefill engine to a decode engine.

    Attributes:
        fixed_s: of one transfer, however small.
        bytes_per_s: of its content; digests at both ends and the copy count as one.
        message_s: one message of the protocol, one way.
        lending: what a prefill engine's steps take over those of an engine that lends nothing: while peers
            read, its transfers have a thread that polls, which costs steps that have no other core.
    """

    fixed_s: Seconds
    bytes_per_s: Positive
    message_s: Seconds
    lending: Annotated[float, msgspec.Meta(ge=1)] = 1.0

    def seconds(self, num_bytes: int) -> float:
        """Of a transfer, without the messages around it."""
        return self.fixed_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpCost:
    """A request's time outside the engines: HTTP, JSON, tokenizer, queues of threads.

    Attributes:
        server_s: at one server, from the client to its engine and back to the first token.
        router_s: what a router in front of prefill and decode adds to both servers' own.
    """

    server_s: Seconds
    router_s: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where the table was measured, in words, and with how many cores."""

    processor: str
    cores: int
    python: str
    jax: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShape:
    """The engine whose steps were measured: its buckets and pages follow from these.

    Attributes:
        page_bytes: of one page over all layers.
    """

    model: str
    dtype: str
    page_size: Annotated[int, msgspec.Meta(ge=1)]
    page_bytes: Annotated[int, msgspec.Meta(ge=1)]
    num_pages: Annotated[int, msgspec.Meta(ge=2)]
    max_num_seqs: Annotated[int, msgspec.Meta(ge=1)]
    max_num_batched_tokens: Annotated[int, msgspec.Meta(ge=1)]
    max_model_len: Annotated[int, msgspec.Meta(ge=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTable:
    """Measured costs of one model on one machine.

    Attributes:
        format: FORMAT.
        measured: when and with what command, for people.
        host_s, host_row_s: of the host between two steps: fixed, and per row. Of a server, where a pair was
            measured: then telling clients is part of it.
        transfer, http: None: not measured; a simulation of several engines needs them.

    Raises:
        ValueError: another format, or buckets that no engine of this shape has.
    """

    format: str = FORMAT
    measured: str = ""
    machine: Machine
    engine: EngineShape
    buckets: tuple[BucketCost, ...]
    host_s: Seconds
    host_row_s: Seconds
    transfer: TransferCost | None = None
    http: HttpCost | None = None

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"unknown format {self.format!r}, expected {FORMAT!r}")
        shapes = [(bucket.tokens, bucket.rows) for bucket in self.buckets]
        if len(set(shapes)) != len(shapes):
            raise ValueError("a bucket appears twice")
        rows, tokens = self.engine.max_num_seqs, self.engine.max_num_batched_tokens
        if not any(own[0] >= tokens and own[0] > own[1] >= rows for own in shapes):
            raise ValueError(f"no bucket holds a step of {tokens} tokens in {rows} rows")


def work_of(rows: Rows) -> Work:
    """What a plan's rows mean for attention."""
    ends = rows.starts + rows.lens
    single = rows.lens == 1
    starts, lens = rows.starts[~single].astype(np.int64), rows.lens[~single].astype(np.int64)
    pairs = lens * starts + lens * (lens + 1) // 2
    return Work(context=int(ends[single].max(initial=0)), pairs=int(pairs.sum()))


def step_clock(table: CostTable) -> Callable[[Rows], float]:
    """How long a step of these rows takes, from one step's end to the next one's."""
    costs = {Bucket(tokens=own.tokens, rows=own.rows): own for own in table.buckets}
    buckets = list(costs)

    def seconds(rows: Rows) -> float:
        own = costs[choose(buckets, rows)]
        return own.seconds(work_of(rows)) + table.host_s + table.host_row_s * len(rows)

    return seconds


def fit_bucket(bucket: Bucket, points: Sequence[Point]) -> BucketCost:
    """The cost of a shape from its measured points: least squares of the relative errors, none negative.

    Raises:
        ValueError: there is no point.
    """
    if not points:
        raise ValueError(f"{bucket} was not measured")
    columns = [[1.0, point.work.context, point.work.pairs] for point in points]
    base, by_context, by_pair = fit(columns, [point.seconds for point in points])
    return BucketCost(
        tokens=bucket.tokens,
        rows=bucket.rows,
        base_s=base,
        by_context_s=by_context,
        by_pair_s=by_pair,
        points=tuple(points),
    )


def fit(columns: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[float, ...]:
    """Factors, none negative, of few columns, with the least sum of squared relative errors.

    Every subset of columns is solved, the best one without a negative factor wins: that is exact.

    Args:
        columns: `[points][factors]`.
        seconds: `[points]`, each positive.
    """
    target = np.asarray(seconds, np.float64)
    scaled = np.asarray(columns, np.float64) / target[:, None]
    count = scaled.shape[1]
    lengths = np.linalg.norm(scaled, axis=0)
    usable = [column for column in range(count) if lengths[column] > 0]
    best, best_error = np.zeros(count), float(len(target))
    for size in range(1, len(usable) + 1):
        for chosen in itertools.combinations(usable, size):
            part = scaled[:, chosen] / lengths[list(chosen)]
            solved, _, rank, _ = np.linalg.lstsq(part, np.ones(len(target)), rcond=None)
            error = float(((part @ solved - 1) ** 2).sum())
            if rank == size and (solved >= 0).all() and error < best_error * (1 - 1e-9):
                best, best_error = np.zeros(count), error
                best[list(chosen)] = solved / lengths[list(chosen)]
    return tuple(float(factor) for factor in best)


def read_table(path: Path) -> CostTable:
    """Reads a table.

    Raises:
        CostError: it cannot be read, or is none.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=CostTable)
    except OSError as error:
        raise CostError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CostError(f"{path} is no table of step costs: {error}") from error


def write_table(path: Path, table: CostTable) -> None:
    """Writes a table, a line per entry.

    Raises:
        CostError: the file cannot be written.
    """
    plain: Mapping[str, Any] = msgspec.to_builtins(table)
    try:
        path.write_text(json.dumps(plain, indent=1) + "\n")
    except OSError as error:
        raise CostError(f"{path}: {error.strerror}") from error
