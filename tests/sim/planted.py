"""Bugs that other servers had, planted in our code one by one: which seed finds each, and when.

python -m tests.sim.planted            searches, and prints the table
python -m tests.sim.planted --write    and writes it to docs/testing.md
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from jaxserve.sim.draw import draw
from jaxserve.sim.world import Failed, World
from tests.sim.bugs_of_moves import MOVES
from tests.sim.bugs_of_scheduling import SCHEDULING
from tests.sim.planting import Planted

BUGS: tuple[Planted, ...] = (*SCHEDULING, *MOVES)
EVENTS = 500
SEEDS = 60
MOST = 20_000
"""A request that waits for ever may keep a calm cluster busy for long: another seed shows as much, sooner."""
PAGE = Path(__file__).parents[2] / "docs" / "testing.md"
BEGIN, END = "<!-- table of planted bugs -->\n", "<!-- end of the table -->\n"
HEAD = (
    "| bug | comes from | what is wrong | seed | events | law |\n"
    "|---|---|---|---:|---:|---|\n"
)  # fmt: skip
RENEW = "python -m tests.sim.planted --write"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """How a bug came to light. Attributes: events: that had happened; law: the first that it broke."""

    seed: int
    events: int
    law: str


def look(bug: Planted, seed: int) -> Found | None:
    """A run with the bug planted; None: it broke no law."""
    with bug.planted():
        try:
            World(seed, draw).run(EVENTS)
        except Failed as failed:
            return Found(seed=seed, events=failed.events, law=failed.law)
    return None


def search(bug: Planted, seeds: int = SEEDS) -> Found | None:
    """The first seed that finds the bug, within `MOST` events."""
    looks = (look(bug, seed) for seed in range(seeds))
    return next((found for found in looks if found is not None and found.events <= MOST), None)


def row(bug: Planted, found: Found | None) -> str:
    """The bug's line of the table."""
    cells = ("not found", "", "") if found is None else (f"{found.seed}", f"{found.events:,}", found.law)
    return "| " + " | ".join((bug.name, f"{bug.comes_from} ({bug.failure})", bug.what, *cells)) + " |\n"


def recorded() -> dict[str, Found]:
    """What the table in docs/testing.md says, by the bug's name."""
    table = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    found = {}
    for line in table.splitlines()[2:]:
        name, _, _, seed, events, law = (cell.strip() for cell in line.strip("|").split("|"))
        if seed != "not found":
            found[name] = Found(seed=int(seed), events=int(events.replace(",", "")), law=law)
    return found


def write(table: str) -> None:
    """Puts a new table in the place of the old one."""
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + table + END + rest.split(END)[1])


def main() -> None:
    """Searches for every bug."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.planted")
    parser.add_argument("--write", action="store_true", help="write the table to docs/testing.md")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many to try")
    parser.add_argument("bugs", nargs="*", help="names of bugs; none: all, as --write needs")
    args = parser.parse_args()
    if args.write and args.bugs:
        parser.error("--write takes all bugs")
    table = HEAD
    print(HEAD, end="")
    for bug in BUGS:
        if not args.bugs or bug.name in args.bugs:
            line = row(bug, search(bug, args.seeds))
            print(line, end="", flush=True)
            table += line
    if args.write:
        write(table)


if __name__ == "__main__":
    main()
