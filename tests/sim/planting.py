"""How a bug is planted: production functions are replaced by wrong versions while a `with` lasts."""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

Wrong = Callable[[Any], Callable[..., Any]]
"""Makes the wrong version of a function out of the right one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """One replaced function. Attributes: where: the module or class that it is called through."""

    where: Any
    name: str
    wrong: Wrong


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
                wrong = swap.wrong(getattr(swap.where, swap.name))
                stack.enter_context(patch.object(swap.where, swap.name, wrong))
            yield
