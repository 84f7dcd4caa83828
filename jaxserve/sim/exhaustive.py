"""All interleavings of a small world with at most one fault, enumerated.

Stateless model checking: a run is a list of choices, and the next run is the last one with its last choice
that has an alternative replaced by the next. Worlds run again from their start, since nothing of an engine
can be copied; laws look only at what is new. A run ends where the world is over, or need not go on:

- its state was met before: all that can follow was, or will be, explored from there. States count as the
  same only where all is equal that decides the future (see `jaxserve.sim.fingerprint`);
- sleep sets (Godefroid, "Partial-Order Methods for the Verification of Concurrent Systems", 1996): of two
  events that touch nothing in common, only one order is run. That leaves out runs, no states: a test counts
  the same states with and without. A state is remembered with what was asleep when it was explored, and is
  explored further when it is met with less asleep.

There is no bound on the length of a run. What events are, and what is not told apart, is said in
`jaxserve.sim.small_world`.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

from jaxserve.sim.fingerprint import fingerprint
from jaxserve.sim.small_world import SmallWorld
from jaxserve.sim.steered import FAULTS, HOSTS, Option, Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class Explored:
    """An exploration that broke no law.

    Attributes:
        runs: from the start to an end, or to a state met before.
        ends: of these, runs to the end.
        events: in all runs, those repeated from run to run among them.
        states: different ones.
        longest: events of the longest run.
    """

    runs: int
    ends: int
    events: int
    states: int
    longest: int

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
    """A choice. Attributes: order: alternatives to be explored, by index; at: the one that is being explored;
    options: all, where they are events; asleep: events that were explored elsewhere, see `explore`."""

    order: list[int]
    options: list[Option]
    asleep: dict[str, Option]
    at: int = 0

    def asleep_after(self) -> dict[str, Option]:
        """What need not follow the alternative that is being explored."""
        chosen = self.options[self.order[self.at]]
        before = [*self.asleep.values(), *(self.options[index] for index in self.order[: self.at])]
        return {option.label: option for option in before if option.apart(chosen)}


class _Path:
    """The choices of a run: those of the stack, which an earlier run has left, then the first of each."""

    def __init__(self, stack: list[_Node]) -> None:
        self.stack = stack
        self.given = len(stack)
        self.passed = 0
        self.steps: list[str] = []

    def decide(self, options: list[Option], asleep: dict[str, Option], only: set[str] | None) -> _Node | None:
        """Which event happens; None: all that can happen is explored elsewhere."""
        if self.passed == len(self.stack):
            order = [
                index
                for index, option in enumerate(options)
                if option.label not in asleep and (only is None or option.label in only)
            ]
            if not order:
                return None
            self.stack.append(_Node(order, [option.bare() for option in options], asleep))
        node = self.stack[self.passed]
        self.passed += 1
        self.steps.append(options[node.order[node.at]].label)
        return node

    def choose(self, labels: list[str]) -> int:
        """What an event does."""
        if self.passed == len(self.stack):
            self.stack.append(_Node(list(range(len(labels))), [], {}))
        node = self.stack[self.passed]
        self.passed += 1
        self.steps.append(labels[node.order[node.at]])
        return node.order[node.at]

    @property
    def new(self) -> bool:
        """What happens now has not happened in an earlier run."""
        return self.passed >= self.given

    def step_back(self) -> bool:
        """To the last choice that has an alternative. False: there is none."""
        while self.stack and self.stack[-1].at + 1 == len(self.stack[-1].order):
            self.stack.pop()
        if self.stack:
            self.stack[-1].at += 1
        return bool(self.stack)


def explore(
    variant: Variant,
    look: Callable[[int, int], None] = lambda runs, states: None,
    *,
    commuting: bool = True,
) -> Explored:
    """Runs a small world in every way that it can go.

    Args:
        look: called after each run, with how many runs and states there were.
        commuting: False: also tries both orders of two events that have nothing in common, for tests.

    Raises:
        Found: an interleaving breaks a law.
    """
    seen: dict[bytes, frozenset[str]] = {}
    runs = ends = events = longest = 0
    stack: list[_Node] = []
    while True:
        world, over = _run(variant, _Path(stack), seen, commuting)
        runs, ends = runs + 1, ends + over
        events += world.clockwork.events
        longest = max(longest, world.clockwork.events)
        look(runs, len(seen))
        if not _Path(stack).step_back():
            break
    return Explored(runs=runs, ends=ends, events=events, states=len(seen), longest=longest)


def _run(
    variant: Variant, path: _Path, seen: dict[bytes, frozenset[str]], commuting: bool
) -> tuple[SmallWorld, bool]:
    """One run. Returns its world, and whether it went to the end."""
    world = SmallWorld(variant, path.choose)
    checked = False
    asleep: dict[str, Option] = {}
    only: set[str] | None = None
    with world.complaints:
        try:
            while options := world.options():
                node = path.decide(options, asleep, only)
                if node is None:
                    return world, False
                only, asleep = None, node.asleep_after() if commuting else {}
                options[node.order[node.at]].action()
                if not path.new:
                    continue
                if not checked:
                    world.begin_checks()
                    checked = True
                world.check()
                state, sleeps = fingerprint(world), frozenset(asleep)
                if state in seen:
                    only = set(seen[state] - sleeps)
                    seen[state] &= sleeps
                    if not only:
                        return world, False
                else:
                    seen[state] = sleeps
            world.finish()
        except Exception as error:
            raise Found(variant, path.steps, error) from error
    return world, True


def main(arguments: list[str] | None = None) -> int:
    """`python -m jaxserve.sim.exhaustive`: explores one small world, and prints the counts."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxserve.sim.exhaustive",
        description="All interleavings of 2 requests, 1 prefill and 1 decode engine with 3 pages each, one "
        "transfer and at most one fault.",
    )
    parser.add_argument("--fault", choices=FAULTS, action="append", help="may be repeated; default: all")
    parser.add_argument("--no-fault", action="store_true", help="nothing goes wrong")
    parser.add_argument("--second", choices=HOSTS, default="decode", help="where the other request goes")
    parser.add_argument("--shared", action="store_true", help="both requests begin with the same page")
    parser.add_argument("--no-digest", action="store_true", help="pages are not compared by digest")
    parser.add_argument("--failure-policy", choices=("recompute", "fail"), default="recompute")
    parser.add_argument("--outputs", type=int, choices=(1, 2), default=1, help="tokens per request")
    given = parser.parse_args(arguments)
    variant = Variant(
        second=given.second,
        shared=given.shared,
        digest=not given.no_digest,
        failure_policy=given.failure_policy,
        outputs=given.outputs,
        faults=() if given.no_fault else tuple(given.fault or FAULTS),
    )

    def look(runs: int, states: int) -> None:
        if runs % 1000 == 0:
            print(f"{runs:,} runs, {states:,} states so far", file=sys.stderr)

    try:
        print(f"{variant}: {explore(variant, look)}")
    except Found as found:
        print(found)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
