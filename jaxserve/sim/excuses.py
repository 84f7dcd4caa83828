"""I17: which requests a tokenizer that fails has really concerned, so that they may end with an error."""

from jaxserve.sim.engine import SimEngine
from jaxserve.sim.expect import SimTokenizer

TELLS = 2
"""Turns after a failure of the tokenizer in which its request is aborted and told so."""


class Excuses:
    """Looks at every step, like a law.

    Attributes:
        given: (epoch, "tokenizer") of engines whose tokenizer has just failed.
    """

    def __init__(self, given: set[tuple[str, str]]) -> None:
        """Args: given: changed here, read by clients."""
        self.given = given
        self._tokenizers: dict[str, SimTokenizer] = {}
        self._turns_left: dict[str, int] = {}

    def tokenizer(self, epoch: str) -> SimTokenizer:
        """A tokenizer for one life of an engine."""
        self._tokenizers[epoch] = SimTokenizer(lambda: self._failed(epoch))
        return self._tokenizers[epoch]

    def break_tokenizer(self, engine: SimEngine, calls: int) -> None:
        """X42: the last of its next calls fails."""
        self._tokenizers[engine.epoch].failing = calls

    def calm(self) -> None:
        """No tokenizer fails any more."""
        for tokenizer in self._tokenizers.values():
            tokenizer.failing = 0

    def step(self, engine: SimEngine) -> None:
        """A step has been decided."""
        epoch = engine.epoch
        left = self._turns_left.get(epoch)
        if left is not None:
            self._turns_left[epoch] = left - 1
            if left == 0:
                del self._turns_left[epoch]
                self.given.discard((epoch, "tokenizer"))

    def _failed(self, epoch: str) -> None:
        self.given.add((epoch, "tokenizer"))
        self._turns_left[epoch] = TELLS
