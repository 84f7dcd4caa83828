"""I17: which requests a fault has really concerned, so that they may end with an error."""

from collections.abc import Mapping

from jaxserve.sim.broken import Broken
from jaxserve.sim.cover import Cover
from jaxserve.sim.engine import SimEngine
from jaxserve.sim.expect import SimTokenizer
from kv.moves import LOAD_FAILED
from scheduler.types import FinishReason, Inputs, Plan

AFTERMATH_S = 30.0
"""What a fault has begun may make a load fail so long after it: a late timer, an agent that is deleted for
the sake of its quarantine (after 20 s), the handshakes and questions that follow."""
TELLS = 2
"""Turns after a failure of the tokenizer in which its request is aborted and told so."""


class Excuses:
    """Looks at every step, like a law.

    Attributes:
        given: (epoch, "tokenizer") of engines whose tokenizer has just failed.
    """

    def __init__(self, cover: Cover, engines: Mapping[str, SimEngine], given: set[tuple[str, str]]) -> None:
        """Args: engines: the current lives by host. given: changed here, read by clients."""
        self.given = given
        self._cover, self._engines = cover, engines
        self._came: dict[tuple[str, str], tuple[float, tuple[str, ...]]] = {}
        self._tokenizers: dict[str, SimTokenizer] = {}
        self._turns_left: dict[str, int] = {}

    def tokenizer(self, epoch: str) -> SimTokenizer:
        """A tokenizer for one life of an engine."""
        self._tokenizers[epoch] = SimTokenizer(lambda: self._failed(epoch))
        return self._tokenizers[epoch]

    def break_tokenizer(self, engine: SimEngine) -> None:
        """X42: its next call fails."""
        self._tokenizers[engine.epoch].failing = 1

    def calm(self) -> None:
        """No tokenizer fails any more."""
        for tokenizer in self._tokenizers.values():
            tokenizer.failing = 0

    def step(self, engine: SimEngine, inputs: Inputs, plan: Plan, now: float) -> None:
        """Notes what came, and asks what ended for an excuse.

        Raises:
            Broken: a load failed, and no fault has struck the two hosts about when its request came or later.
        """
        epoch = engine.epoch
        for request in inputs.arrivals:
            peer = () if request.remote is None else (request.remote.host,)
            self._came[epoch, request.request_id] = (now, (engine.host, *peer))
        for entry in plan.finished:
            if entry.reason is FinishReason.ERROR and entry.message == LOAD_FAILED:
                since, hosts = self._came[epoch, entry.request_id]
                versions = {self._engines[host].node.scheduler.cache_key for host in hosts}
                if len(versions) == 1 and not self._cover.touched(hosts, since - AFTERMATH_S):
                    where = " and ".join(hosts)
                    raise Broken("I17", f"{entry.request_id}: its load failed without a fault at {where}")
        left = self._turns_left.get(epoch)
        if left is not None:
            self._turns_left[epoch] = left - 1
            if left == 0:
                del self._turns_left[epoch]
                self.given.discard((epoch, "tokenizer"))

    def _failed(self, epoch: str) -> None:
        self.given.add((epoch, "tokenizer"))
        self._turns_left[epoch] = TELLS
