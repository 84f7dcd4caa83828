"""Many seeds, several at a time: the laws hold in all of them, or the seed is named that shows otherwise."""

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from tqdm import tqdm

from jaxserve.sim.cover import Met, table, thin
from jaxserve.sim.draw import draw
from jaxserve.sim.faults import NAMES
from jaxserve.sim.law_names import law_name
from jaxserve.sim.world import Failed, Ran, World

SEEDS_PER_JOB = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A seed that breaks a law.

    Attributes:
        asked: events that the run was to have. events: those that it had.
        last: what happened before, one line per event.
    """

    seed: int
    asked: int
    events: int
    law: str
    trace: str
    message: str
    last: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class Summary:
    """What many seeds came to. Attributes: seconds: of wall-clock time."""

    seeds: int = 0
    events: int = 0
    virtual_s: float = 0.0
    lives: int = 0
    seconds: float = 0.0
    met: Met = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)

    def add(self, ran: Ran | Failure) -> None:
        """One more seed."""
        self.seeds += 1
        self.events += ran.events
        if isinstance(ran, Failure):
            self.failures.append(ran)
            return
        self.virtual_s += ran.virtual_s
        self.lives += ran.lives
        self.met.update(ran.met)
        self.counts.update(ran.counts)
        self.tokens.update(ran.tokens)


def run_seed(seed: int, events: int) -> Ran | Failure:
    """One world."""
    try:
        return World(seed, draw).run(events)
    except Failed as failed:
        return Failure(
            seed=seed,
            asked=events,
            events=failed.events,
            law=failed.law,
            trace=failed.trace,
            message=str(failed),
            last=tuple(failed.last),
        )
    except Exception as error:  # while the world was built: its engines did not come up
        return Failure(
            seed=seed,
            asked=events,
            events=0,
            law="I17",
            trace="",
            message=f"seed {seed}, before the first event: {type(error).__name__}: {error}",
            last=(),
        )


def run_seeds(
    seeds: Sequence[int], *, events: int, jobs: int | None = None, progress: bool = False
) -> Summary:
    """Runs worlds, each of `events` events and what it takes to come to rest.

    Args:
        jobs: processes; None: one per core, 1: none but this one.
    """
    began, summary = time.perf_counter(), Summary()
    with tqdm(total=len(seeds), unit="seed", disable=not progress) as bar:
        for ran in _all(seeds, events, jobs or os.cpu_count() or 1):
            summary.add(ran)
            bar.update()
            if isinstance(ran, Failure):
                bar.write(ran.message)
    summary.seconds = time.perf_counter() - began
    return summary


def _all(seeds: Sequence[int], events: int, jobs: int) -> Iterator[Ran | Failure]:
    if jobs == 1 or len(seeds) <= SEEDS_PER_JOB:
        for seed in seeds:
            yield run_seed(seed, events)
        return
    batches = [seeds[first : first + SEEDS_PER_JOB] for first in range(0, len(seeds), SEEDS_PER_JOB)]
    # Spawned, not forked: JAX may have started threads in this process.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for done in pool.map(_batch, batches, [events] * len(batches)):
            yield from done


def _batch(seeds: Iterable[int], events: int) -> list[Ran | Failure]:
    return [run_seed(seed, events) for seed in seeds]


def summary_text(summary: Summary, *, least: int) -> str:
    """The report: speed, what requests came to, which faults met which states, and every failure.

    Args:
        least: pairs of fault and state that met more rarely are named.
    """
    speed = summary.events / summary.seconds if summary.seconds else 0.0
    lines = [
        f"{_many(summary.seeds, 'seed')}, {_many(summary.events, 'event')} in {summary.seconds:,.1f} s: "
        f"{speed:,.0f} events per second ({summary.virtual_s / 3600:,.1f} hours of virtual time, "
        f"{summary.lives:,} lives of engines)",
        "requests: " + ", ".join(f"{what} {count:,}" for what, count in summary.counts.items()),
        "prompt tokens: " + ", ".join(f"{source} {count:,}" for source, count in summary.tokens.items()),
        "",
        "How often a fault (X) met a request in each state; P computes prompts, D generates; docs/testing.md",
        *table(summary.met, NAMES),
    ]
    rare = thin(summary.met, NAMES, least)
    if rare:
        lines += ["", f"met less than {least} times: " + ", ".join(f"{f} {s} ({n})" for f, s, n in rare)]
    for failure in summary.failures:
        lines += ["", failure.message, f"    {failure.law}: {law_name(failure.law)}"]
        lines += [*(f"    {line}" for line in failure.last), _how(failure)]
    over = f"; {_many(len(rare), 'pair')} of fault and state met too rarely" if rare else ""
    lines += ["", f"{len(summary.failures)} of {_many(summary.seeds, 'seed')} broke a law{over}"]
    return "\n".join(lines)


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _how(failure: Failure) -> str:
    again = f"jaxserve simulate --seeds 1 --first-seed {failure.seed} --events {failure.asked}"
    return f"    trace {failure.trace}; again with: {again}"
