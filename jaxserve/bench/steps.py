"""`jaxserve bench steps`: what steps cost here, for `jaxserve simulate`.

Every compiled shape is run by the real device with several contexts, in turns over all of them, so that a
slow spell of the machine does not fall on one alone; the median of the turns counts. Then a real engine loop
runs batches of decodes on a device whose steps take nothing: that is the host's part.
"""

import argparse
import itertools
import os
import platform
import queue
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from jaxserve.assemble import assemble
from jaxserve.batch import Bucket
from jaxserve.bench.datasets import random_prompts
from jaxserve.bench.engine import engine_options
from jaxserve.bench.options import at_least
from jaxserve.bench.pair import Pair, PairError, measure_pair
from jaxserve.bench.tables import grid, number
from jaxserve.config import EngineConfig
from jaxserve.dispatch import Executed, Pending, PromptSpan, SlotSetup
from jaxserve.loop import EngineLoop
from jaxserve.outputs import Delta
from jaxserve.sim.costs import (
    BucketCost,
    CostTable,
    EngineShape,
    Machine,
    Point,
    fit,
    fit_bucket,
    work_of,
    write_table,
)
from jaxserve.sim.timed import NoModel
from jaxserve.text import Tokenizer
from jaxserve.weights.smollm2 import default_cache_dir
from scheduler.types import Accepted, Inputs, Limits, Plan, Request, Rows, SamplingParams, SchedulerConfig

CONTEXTS = (64, 512, 2048)
HOST_PROMPT_TOKENS, HOST_OUTPUT_TOKENS = 16, 40
NOTHING = np.zeros(0, np.int32)


class Steps(Protocol):
    """What runs plans; `jaxserve.device.Device` does."""

    buckets: list[Bucket]

    def start(self, plan: Plan, setups: Sequence[SlotSetup], spans: Sequence[PromptSpan]) -> Pending: ...

    def wait(self, pending: Pending) -> Executed: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Rows to measure in a bucket. Attributes: rows: (start, length) each, those of one token first."""

    bucket: Bucket
    rows: tuple[tuple[int, int], ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags."""
    add = parser.add_argument
    add("model", help="what `jaxserve serve` takes")
    add("--output", type=Path, required=True, metavar="FILE", help="where the table goes")
    add(
        "--engine",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of Engine, e.g. max_num_seqs=64; repeat it for more",
    )
    add(
        "--contexts",
        type=at_least(1),
        nargs="+",
        default=list(CONTEXTS),
        metavar="N",
        help="tokens before those that a step computes (default: %(default)s)",
    )
    add("--repetitions", type=at_least(1), default=7, metavar="N", help="turns (default: %(default)s)")
    add(
        "--pair",
        nargs=3,
        metavar=("ROUTER", "PREFILL", "DECODE"),
        help="URLs of a router and the two idle servers behind it, of the same model: measures HTTP and "
        "transfers, too",
    )
    add("--disable-tqdm", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Measure, write and print; 0, or 2 if the arguments will not do."""
    try:
        config = EngineConfig(model=args.model, log_stats=False, **engine_options(args.engine))
    except (ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not args.output.parent.is_dir():
        print(f"error: --output: there is no folder {args.output.parent}", file=sys.stderr)
        return 2
    parts = assemble(config, config.cache_dir or default_cache_dir(os.environ), lambda line: None)
    parts.device.compile()
    scheduler = parts.scheduler
    shapes = [
        shape
        for bucket in parts.device.buckets
        for shape in shapes_of(bucket, args.contexts, max_len=scheduler.max_model_len)
    ]
    turns = args.repetitions * len(shapes)
    with tqdm(total=turns, unit="step", disable=args.disable_tqdm, dynamic_ncols=True) as bar:
        costs = measure_steps(
            parts.device,
            shapes,
            page_size=scheduler.page_size,
            num_pages=scheduler.num_pages,
            repetitions=args.repetitions,
            done=bar.update,
        )
    host_s, host_row_s = measure_host(scheduler, parts.limits, tokenizer=parts.tokenizer)
    table = CostTable(
        measured=f"{datetime.now(UTC):%Y-%m-%d}, {command_of(args)}",
        machine=machine(),
        engine=EngineShape(
            model=args.model,
            dtype=parts.dtype,
            page_size=scheduler.page_size,
            page_bytes=parts.spec.page_bytes,
            num_pages=scheduler.num_pages,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=parts.limits.max_num_batched_tokens,
            max_model_len=scheduler.max_model_len,
        ),
        buckets=tuple(costs),
        host_s=host_s,
        host_row_s=host_row_s,
    )
    write_table(args.output, table)
    if args.pair is not None:
        router, prefill, decode = (url.rstrip("/") for url in args.pair)
        try:
            table = measure_pair(Pair(router=router, prefill=prefill, decode=decode), table)
        except PairError as error:
            print(f"error: {error}; {args.output} has the steps alone", file=sys.stderr)
            return 2
        write_table(args.output, table)
    print(table_text(table))
    return 0


def command_of(args: argparse.Namespace) -> str:
    """The command as others may want to repeat it: without this machine's files and addresses."""
    words = ["jaxserve", "bench", "steps", args.model, "--output", "FILE"]
    words += [word for option in args.engine for word in ("--engine", option)]
    words += ["--contexts", *map(str, args.contexts), "--repetitions", str(args.repetitions)]
    return shlex.join(words + ([] if args.pair is None else ["--pair", "ROUTER", "PREFILL", "DECODE"]))


def shapes_of(bucket: Bucket, contexts: Iterable[int], *, max_len: int) -> list[Shape]:
    """What is measured of a bucket, each once: full of decodes; or one chunk, several, or one and decodes."""
    size, room = bucket.tokens, bucket.rows
    fitting = sorted({min(context, max_len - 1) for context in contexts})
    found: dict[tuple[tuple[int, int], ...], None] = {}
    if size == room:
        for context in fitting:
            found[((context, 1),) * room] = None
    else:
        longest = min(size, max_len)
        several = max(1, min(room, size // 16))
        found[((0, longest),)] = None
        found[((0, size // several),) * several] = None
        for context in fitting:
            found[((min(context, max_len - longest), longest),)] = None
            singles = min(room - 1, size // 2)
            if singles and size - singles <= max_len:
                found[(*((context, 1),) * singles, (0, size - singles))] = None
    return [Shape(bucket=bucket, rows=rows) for rows in found]


def rows_of(shape: Shape, *, page_size: int, num_pages: int) -> Rows:
    """The rows as a plan has them. Every row has pages of its own, as far as the pool goes."""
    starts, lens = (np.array(column, np.int32) for column in zip(*shape.rows, strict=True))
    counts = -(-(starts + lens) // page_size)
    table = np.zeros((len(starts), int(counts.max())), np.int32)
    places = np.cumsum(counts) - counts
    for row, count in enumerate(counts):
        table[row, :count] = 1 + (places[row] + np.arange(count)) % (num_pages - 1)
    return Rows(
        slots=np.arange(len(starts), dtype=np.int32),
        starts=starts,
        lens=lens,
        samples=np.ones(len(starts), bool),
        num_outputs=np.zeros(len(starts), np.int32),
        tokens=np.full(int(lens.sum()), 1000, np.int32),
        page_tables=(table,),
    )


def measure_steps(
    device: Steps,
    shapes: Sequence[Shape],
    *,
    page_size: int,
    num_pages: int,
    repetitions: int,
    done: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[BucketCost]:
    """One cost per bucket. The first turn is not counted.

    Raises:
        RuntimeError: a step failed.
    """
    all_rows = [rows_of(shape, page_size=page_size, num_pages=num_pages) for shape in shapes]
    seconds: list[list[float]] = [[] for _ in shapes]
    for turn in range(repetitions + 1):
        for place, rows in enumerate(all_rows):
            plan = Plan(
                step_id=turn * len(shapes) + place + 1,
                rows=rows,
                accepted=Accepted(rows=NOTHING, slots=NOTHING, tokens=NOTHING),
            )
            began = clock()
            executed = device.wait(device.start(plan, [], []))
            took = clock() - began
            if executed.outcome.error is not None:
                raise RuntimeError(executed.outcome.error)
            if turn:
                seconds[place].append(took)
                done()
    points: dict[Bucket, list[Point]] = {}
    for shape, rows, own in zip(shapes, all_rows, seconds, strict=True):
        point = Point(work=work_of(rows), seconds=statistics.median(own))
        points.setdefault(shape.bucket, []).append(point)
    return [fit_bucket(bucket, own) for bucket, own in points.items()]


def measure_host(scheduler: SchedulerConfig, limits: Limits, *, tokenizer: Tokenizer) -> tuple[float, float]:
    """Seconds of the host between two steps, fixed and per row: of an engine loop whose steps take nothing,
    the median per number of rows."""
    most = limits.max_num_seqs
    columns: list[list[float]] = []
    seconds: list[float] = []
    for rows in sorted({1, max(1, most // 4), most}):
        taken: list[tuple[float, int]] = []

        def keep(inputs: Inputs, plan: Plan, taken: list[tuple[float, int]] = taken) -> None:
            taken.append((inputs.now_s, len(plan.rows) if len(plan.rows) == len(plan.rows.tokens) else 0))

        loop = EngineLoop(
            scheduler,
            limits,
            NoModel(scheduler.num_pages, scheduler.page_size),
            tokenizer,
            max_num_queued_reqs=rows,
            recorder=keep,
            log_stats=False,
        )
        try:
            _serve(loop, rows)
        finally:
            loop.close()
        gaps = [after - before for (before, count), (after, _) in itertools.pairwise(taken) if count == rows]
        columns.append([1.0, float(rows)])
        seconds.append(max(1e-6, statistics.median(gaps)))
    fixed, per_row = fit(columns, seconds)
    return fixed, per_row


def _serve(loop: EngineLoop, rows: int) -> None:
    """So many requests at once, to their ends."""
    told: queue.SimpleQueue[Delta] = queue.SimpleQueue()
    sampling = SamplingParams(max_tokens=HOST_OUTPUT_TOKENS, temperature=0.0, ignore_eos=True, seed=0)
    for index, prompt in enumerate(random_prompts(rows, HOST_PROMPT_TOKENS, seed=0)):
        ids = prompt.token_ids or ()
        loop.submit(Request(request_id=f"host-{index}", prompt_token_ids=ids, sampling=sampling), told.put)
    left = rows
    while left:
        left -= told.get().finish_reason is not None


def machine() -> Machine:
    """This one."""
    names = [
        line.partition(":")[2].strip()
        for line in _text(Path("/proc/cpuinfo")).splitlines()
        if line.startswith("model name")
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Machine(
        processor=names[0] if names else platform.processor() or platform.machine(),
        cores=cores or 1,
        python=platform.python_version(),
        jax=version("jax"),
    )


def table_text(table: CostTable) -> str:
    """A table for a terminal, in milliseconds."""
    rows = [["bucket", "empty", "per 1,000 tokens of context", "per million pairs", "worst fit"]]
    for own in table.buckets:
        parts = (own.base_s, own.by_context_s * 1e3, own.by_pair_s * 1e6)
        name = f"{own.tokens} tokens, {own.rows} rows"
        rows.append([name, *(number(part * 1e3) for part in parts), f"{own.worst_error:.0%}"])
    lines = ["milliseconds", grid(rows)]
    lines.append(f"host: {number(table.host_s * 1e3)} per step, {number(table.host_row_s * 1e3)} per row")
    if table.transfer is not None:
        transfer = table.transfer
        lines.append(
            f"transfer: {number(transfer.fixed_s * 1e3)} and {number(transfer.bytes_per_s / 1e9)} GB/s; "
            f"{number(transfer.message_s * 1e3)} per message; lending makes steps "
            f"{number(transfer.lending)} times as long"
        )
    if table.http is not None:
        lines.append(
            f"HTTP: {number(table.http.server_s * 1e3)} per server, "
            f"{number(table.http.router_s * 1e3)} for a router"
        )
    return "\n".join(lines)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
