"""All interleavings of a small world with at most one fault, enumerated.

Depth first: a state in which several things can happen is kept (`jaxserve.sim.snapshot`), and
brought back for each of them. What need not be followed:

- a state that was met before: all that can follow was, or will be, explored from there. States count as the
  same only where all is equal that decides the future (`jaxserve.sim.fingerprint`);
- sleep sets (Godefroid, "Partial-Order Methods for the Verification of Concurrent Systems", 1996): of two
  events that touch nothing in common, only one order is run. That leaves out runs, no states. A state is
  remembered with what was asleep when it was explored, and is explored further when it is met with less
  asleep;
- a world that has got over its fault: all is as in a state that was met without a fault, from where all that
  can follow, and more, is explored;
- that a client learns how its request has ended comes at once: nothing but its own leaving could come before
  it and make a difference. That leaves out states, no ends.

Tests compare counts of states, or the ends, with and without each of them. There is no bound on the length of
a run. What events are, and what is not told apart, is said in `jaxserve.sim.small_events`.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from jaxserve.sim.fingerprint import fingerprint
from jaxserve.sim.small_events import option, options
from jaxserve.sim.small_world import SmallWorld
from jaxserve.sim.snapshot import Snapshot
from jaxserve.sim.steered import FAULTS, HOSTS, Option, Variant
from jaxserve.sim.world import Complaints


@dataclass(frozen=True, slots=True, kw_only=True)
class Explored:
    """An exploration that broke no law.

    Attributes:
        runs: from the start to an end, or to a state met before.
        ends: of these, runs to the end.
        events: in all runs, those repeated from run to run among them.
        states: different ones.
        longest: events of the longest run.
        last: hashes of the states in which it ended, faults left out, for tests.
    """

    runs: int
    ends: int
    events: int
    states: int
    longest: int
    last: frozenset[bytes]

    def __str__(self) -> str:
        return (
            f"{self.runs:,} runs ({self.ends:,} to the end), {self.events:,} events, {self.states:,} states"
        )


class Found(AssertionError):
    """An interleaving that breaks a law. Attributes: steps: what happened, one after another."""

    def __init__(self, variant: Variant, steps: list[str], broken: BaseException) -> None:
        told = "\n  ".join(steps)
        super().__init__(f"{variant}: {type(broken).__name__}: {broken}\n  {told}")
        self.variant, self.steps, self.broken = variant, steps, broken


@dataclass(slots=True)
class _Node:
    """A state with what is left to be tried in it.

    Attributes:
        events: to be tried, in this order; at: the next.
        given: what the next one does, choice by choice; then, the first of what it can do.
        asleep: events that were explored elsewhere, see `explore`.
        world: as it is here, until it has gone on; snapshot: to come back; None: there is one way on.
    """

    events: list[Option]
    asleep: list[Option]
    world: SmallWorld | None
    snapshot: Snapshot | None
    at: int = 0
    given: tuple[int, ...] = ()

    def again(self) -> SmallWorld:
        """The world as it is here."""
        world, self.world = self.world, None
        if world is not None:
            return world
        if self.snapshot is None:
            raise RuntimeError("a world that has gone on cannot be had again")
        return self.snapshot.back()

    def asleep_after(self, chosen: Option) -> dict[str, Option]:
        """What need not follow an event."""
        return {
            option.label: option for option in (*self.asleep, *self.events[: self.at]) if option.apart(chosen)
        }

    def next(self, choices: "Choices") -> None:
        """On to what has not been tried."""
        self.given = choices.others()
        self.at += not self.given


class Choices:
    """What an event does where it can do several things: what is given, then the first of each."""

    def __init__(self, given: tuple[int, ...]) -> None:
        self._given = given
        self._made: list[tuple[int, int]] = []
        self.labels: list[str] = []

    def __call__(self, labels: list[str]) -> int:
        """Which of these happens."""
        number = len(self._made)
        chosen = self._given[number] if number < len(self._given) else 0
        self._made.append((chosen, len(labels)))
        self.labels.append(labels[chosen])
        return chosen

    def others(self) -> tuple[int, ...]:
        """What to choose next time; empty: everything was."""
        made = self._made[:]
        while made and made[-1][0] + 1 == made[-1][1]:
            made.pop()
        return (*(chosen for chosen, _ in made[:-1]), made[-1][0] + 1) if made else ()


def explore(
    variant: Variant,
    look: Callable[[int, int], None] = lambda events, states: None,
    *,
    commuting: bool = True,
    recovered: bool = True,
    hasty: bool = True,
) -> Explored:
    """Runs a small world in every way that it can go.

    Args:
        look: called after each event, with how many there were, and how many states.
        commuting: False: also tries both orders of two events that have nothing in common, for tests.
        recovered: False: also follows a world that has got over its fault, for tests.
        hasty: see `SmallWorld`.

    Raises:
        Found: an interleaving breaks a law.
    """
    seen: dict[bytes, frozenset[str]] = {}
    path: list[_Node] = []
    steps: list[list[str]] = []
    last: set[bytes] = set()
    runs = ends = events = longest = 0
    with Complaints() as complaints, _seldom_collected():
        _begin(SmallWorld(variant, complaints, hasty=hasty), path, {}, None)
        while path:
            node = path[-1]
            del steps[len(path) - 1 :]
            if node.at == len(node.events):
                path.pop()
                continue
            event, choices = node.events[node.at], Choices(node.given)
            asleep = node.asleep_after(event) if commuting else {}
            steps.append([event.label])
            try:
                world = node.again()
                world.happen(option(world, event.label), choices)
                steps[-1] += choices.labels
                node.next(choices)
                world.check()
                events, longest = events + 1, max(longest, len(path))
                (state, unstruck), sleeps = fingerprint(world), frozenset(asleep)
                only = None
                if recovered and state != unstruck and unstruck in seen:
                    only = frozenset()
                elif state in seen:
                    only = seen[state] - sleeps
                    seen[state] &= sleeps
                else:
                    seen[state] = sleeps
                look(events, len(seen))
                if (only is not None and not only) or not _begin(world, path, asleep, only):
                    runs += 1
                    if only is None and not options(world):
                        world.finish()
                        ends += 1
                        last.add(unstruck)
            except Exception as error:
                raise Found(variant, [label for step in steps for label in step], error) from error
    return Explored(
        runs=runs, ends=ends, events=events, states=len(seen), longest=longest, last=frozenset(last)
    )


@contextmanager
def _seldom_collected() -> Generator[None]:
    """Worlds that were left behind are all the garbage there is."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _begin(
    world: SmallWorld, path: list[_Node], asleep: dict[str, Option], only: frozenset[str] | None
) -> bool:
    """Makes a state the path's next. False: nothing is to be tried in it."""
    events = [
        found.bare()
        for found in options(world)
        if found.label not in asleep and (only is None or found.label in only)
    ]
    if not events:
        return False
    snapshot = Snapshot(world) if len(events) > 1 or world.can_choose else None
    path.append(_Node(events, list(asleep.values()), world, snapshot))
    return True


def main(arguments: list[str] | None = None) -> int:
    """`python -m jaxserve.sim.exhaustive`: explores small worlds, and prints the counts."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxserve.sim.exhaustive",
        description="All interleavings of 2 requests, 1 prefill and 1 decode engine with 3 pages each, one "
        "transfer and at most one fault.",
    )
    parser.add_argument("--fault", choices=FAULTS, action="append", help="may be repeated")
    parser.add_argument("--no-fault", action="store_true", help="nothing goes wrong")
    parser.add_argument("--all", action="store_true", help="without a fault, then with each of them")
    parser.add_argument("--second", choices=HOSTS, default="decode", help="where the other request goes")
    parser.add_argument("--shared", action="store_true", help="both requests begin with the same page")
    parser.add_argument("--no-digest", action="store_true", help="pages are not compared by digest")
    parser.add_argument("--failure-policy", choices=("recompute", "fail"), default="recompute")
    parser.add_argument("--outputs", type=int, choices=(1, 2), default=1, help="tokens per request")
    given = parser.parse_args(arguments)
    names = [*(given.fault or ()), *(FAULTS if given.all else ())]
    faults = [() for _ in range(given.no_fault or given.all)] + [(name,) for name in names]
    if not faults:
        parser.error("name faults, or --all, or --no-fault")
    variants = [
        Variant(
            second=given.second,
            shared=given.shared,
            digest=not given.no_digest,
            failure_policy=given.failure_policy,
            outputs=given.outputs,
            faults=one,
        )
        for one in faults
    ]
    print(variants[0])
    print("| fault | runs | to the end | events | states | longest |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    broken = 0
    for variant in variants:
        row, law = _row(variant)
        print(row, flush=True)
        broken += law
    return int(broken > 0)


def _row(variant: Variant) -> tuple[str, bool]:
    """A row of the table, and whether a law was broken."""
    name = variant.faults[0] if variant.faults else "none"

    def look(events: int, states: int) -> None:
        if events % 5000 == 0:
            print(f"{name}: {events:,} events, {states:,} states so far", file=sys.stderr, flush=True)

    try:
        found = explore(variant, look)
    except Found as broken:
        return f"{name}: {broken}", True
    counts = (found.runs, found.ends, found.events, found.states, found.longest)
    told = " | ".join(f"{count:,}" for count in counts)
    return f"| {name} | {told} |", False


if __name__ == "__main__":
    sys.exit(main())
