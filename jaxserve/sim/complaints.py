"""I13: what an engine logs as an error is an exception that somebody swallowed.

Whatever catches more than it names logs what it has caught with its traceback, unless it is what a device or
a library says (`kv.unexpected`): so a mistake that only ends one move is heard of here.
"""

import logging

from jaxserve.sim.broken import Broken
from jaxserve.sim.expect import TokenizerFailed


class Complaints(logging.Handler):
    """Hears what engines log while it is entered."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._said: list[logging.LogRecord] = []
        self._logger = logging.getLogger("jaxserve")
        self._before = (self._logger.level, self._logger.propagate)

    def __enter__(self) -> "Complaints":
        self._before = (self._logger.level, self._logger.propagate)
        self._logger.addHandler(self)
        self._logger.setLevel(logging.ERROR)
        self._logger.propagate = False
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._before[0])
        self._logger.propagate = self._before[1]

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a record."""
        self._said.append(record)

    def check(self, excuses: set[tuple[str, str]]) -> list[str]:
        """Returns ids of the requests whose text a failing tokenizer could not make.

        Raises:
            Broken: something was logged that no fault explains.
        """
        said, self._said = self._said, []
        struck = []
        for record in said:
            error = record.exc_info[1] if record.exc_info else None
            if isinstance(error, TokenizerFailed) and any(why == "tokenizer" for _, why in excuses):
                struck += [name for name in (record.args or ()) if isinstance(name, str)]
                continue
            raise Broken("I13", f"{record.getMessage()}: {error!r}")
        return struck
