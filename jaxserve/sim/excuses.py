"""I17: which requests a fault has really concerned, so that they may end with an error."""

from collections.abc import Mapping

from jaxserve.sim.broken import Broken
from jaxserve.sim.cover import Cover
from jaxserve.sim.engine import SimEngine
from jaxserve.sim.expect import SimTokenizer
from kv.moves import LOAD_FAILED
from scheduler.types import FinishReason, Inputs, Plan, Request

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
        self._came: dict[tuple[str, str], tuple[float, Request]] = {}
        self._begun: dict[str, float] = {}
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
        asked = self._begun.pop(epoch, now)  # it may have come while the last step was under way
        if len(plan.rows):
            self._begun[epoch] = now
        for request in inputs.arrivals:
            self._came[epoch, request.request_id] = (asked, request)
        for entry in plan.finished:
            if entry.reason is FinishReason.ERROR and entry.message == LOAD_FAILED:
                since, request = self._came[epoch, entry.request_id]
                if not self._explained(engine, request, since):
                    raise Broken("I17", f"{engine.host}: {entry.request_id}: its load failed without a fault")
        left = self._turns_left.get(epoch)
        if left is not None:
            self._turns_left[epoch] = left - 1
            if left == 0:
                del self._turns_left[epoch]
                self.given.discard((epoch, "tokenizer"))

    def _explained(self, engine: SimEngine, request: Request, since: float) -> bool:
        """Whether the peer has begun another life, is of another version, or a fault has struck one of the
        two hosts."""
        remote = request.remote
        hosts = (engine.host,) if remote is None else (engine.host, remote.host)
        if remote is not None:
            peer = self._engines[remote.host]
            if peer.epoch != remote.epoch or peer.node.scheduler.cache_key != engine.node.scheduler.cache_key:
                return True
        return self._cover.touched(hosts, since - AFTERMATH_S)

    def _failed(self, epoch: str) -> None:
        self.given.add((epoch, "tokenizer"))
        self._turns_left[epoch] = TELLS
