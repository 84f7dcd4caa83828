"""Errors that only a mistake of ours brings about, told apart from what a device or a library says.

Where a move ends on any error whatever, so that nobody else does, these are told to somebody as well.
"""

from collections.abc import Callable

MISTAKES: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)

Unexpected = Callable[[Exception], None]
"""Is told of a mistake, with its traceback; may raise it again."""


def raised(error: Exception) -> None:
    """Raises: Exception: the mistake, where nobody keeps a log."""
    raise error
