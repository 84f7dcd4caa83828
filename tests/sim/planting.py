"""How a bug is planted: production functions are replaced by wrong versions while a `with` lasts."""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from jaxserve.sim.draw import draw
from jaxserve.sim.world import Failed, World

Wrong = Callable[[Any], Callable[..., Any]]
"""Makes the wrong version of a function out of the right one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """One replaced function. Attributes: where: the module or class that it is called through."""

    where: Any
    name: str
    wrong: Wrong

    @contextmanager
    def swapped(self) -> Generator[None]:
        """The wrong version is in the code."""
        with patch.object(self.where, self.name, self.wrong(getattr(self.where, self.name))):
            yield


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A server or a router that is wrong in one thing. Attributes: laws: any of which it may break first."""

    name: str
    laws: tuple[str, ...]
    swap: Swap

    def first(self, seeds: int, events: int) -> Failed | None:
        """The first of so many runs that breaks a law with it; None: there is none."""
        for seed in range(seeds):
            with self.swap.swapped():
                try:
                    World(seed, draw).run(events)
                except Failed as failed:
                    return failed
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """A bug that another server had, in our code.

    Attributes:
        comes_from: project and number of its report there.
        failure: a number that reports of the same kind of failure share; T: a threat, not yet a report.
        what: the bug in one sentence, as it is planted.
        laws: any of which may be the first that it breaks.
    """

    name: str
    comes_from: str
    failure: str
    what: str
    laws: tuple[str, ...]
    swaps: tuple[Swap, ...]

    @contextmanager
    def planted(self) -> Generator[None]:
        """The bug is in the code."""
        with ExitStack() as stack:
            for swap in self.swaps:
                stack.enter_context(swap.swapped())
            yield
