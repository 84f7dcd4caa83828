"""One request at one simulated engine: is what comes right, and what does its client see of it?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from jaxserve.api.choices import Envelope
from jaxserve.api.errors import ApiError
from jaxserve.api.logprobs import Vocabulary
from jaxserve.api.replies import ChunkWriter, check_finish, full_reply, merge
from jaxserve.outputs import Delta
from jaxserve.server.answers import LAST_EVENT, event
from jaxserve.sim.engine import SimEngine
from jaxserve.sim.expect import Expected, Wish, text_of
from jaxserve.sim.laws import Broken
from jaxserve.sim.server import Reply, error_reply
from scheduler.types import FinishReason, Request

RIGHT = (FinishReason.STOP, FinishReason.LENGTH)

Hear = Callable[[Reply | None], None]
"""Takes what comes over a connection; None: it is lost."""


@dataclass(slots=True, eq=False)
class Ask:
    """One request to one engine.

    Attributes:
        wish: what is wanted.
        request: what the engine got.
        right: what must come, per sequence.
        hear: of its client.
        stream: the client hears of the answer bit by bit.
        envelope: of an answer whose body is read.
        writer: of an answer that is streamed and read.
        sent: the events of it so far.
        tokens, text: per sequence, what has come.
        ended: sequences that have ended, with their reasons.
        failure: what the first sequence that failed ended with.
        params: its `kv_transfer_params`.
        aborted: whoever asked wants it no more.
        deaf: and does not listen any more.
        lost: the engine has died.
    """

    engine: SimEngine
    wish: Wish
    request: Request
    right: list[Expected]
    hear: Hear
    stream: bool = False
    envelope: Envelope | None = None
    writer: ChunkWriter | None = None
    sent: list[bytes] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    ended: dict[int, FinishReason] = field(default_factory=dict)
    deltas: list[Delta] = field(default_factory=list)
    failure: Delta | None = None
    params: Mapping[str, Any] | None = None
    told_prefill: bool = False
    begun: bool = False
    aborted: bool = False
    deaf: bool = False
    lost: bool = False

    @property
    def over(self) -> bool:
        """Nobody waits for it any more."""
        return self.lost or len(self.ended) == self.wish.sampling.n

    @property
    def whole(self) -> bool:
        """Every sequence has ended as it must."""
        return len(self.ended) == self.wish.sampling.n and self.failure is None

    def take(self, delta: Delta, excused: Callable[["Ask", str], bool]) -> None:
        """A delta.

        Args:
            excused: whether a fault explains an error.

        Raises:
            Broken: it is not what must come.
        """
        where, index = f"{self.engine.host}: request {delta.request_id}/{delta.index}", delta.index
        if not 0 <= index < len(self.right):
            raise Broken("I12", f"{where} is a sequence that nobody has asked for")
        right = self.right[index]
        if index in self.ended:
            raise Broken("I12", f"{where} goes on after its end")
        got = self.tokens.setdefault(index, [])
        got += delta.token_ids
        self.text[index] = self.text.get(index, "") + delta.text
        if tuple(got) != right.tokens[: len(got)]:
            raise Broken("I14", f"{where} gave {got}, expected {list(right.tokens)}")
        # Where a stop string might have begun, text is held back. An end of another kind lets it out,
        # and with it what was read of the step's own token, which counts no more.
        cut = delta.finish_reason is not None and delta.finish_reason not in RIGHT
        text = text_of(right.tokens[: len(got) + 1]) if cut else right.text
        if not text.startswith(self.text[index].removesuffix("\ufffd")):
            raise Broken("I24", f"{where} gave {self.text[index]!r}, expected {text!r}")
        if delta.prefill is not None:
            if self.told_prefill:
                raise Broken("I11", f"{where} tells its prompt's sources twice")
            self.told_prefill = True
            stats = delta.prefill
            parts = (stats.local_compute, stats.local_cache_hit, stats.external_kv_transfer)
            if sum(parts) != len(self.wish.prompt_token_ids) or min(parts) < 0:
                raise Broken("I11", f"{where}: {parts} are not {len(self.wish.prompt_token_ids)} tokens")
        if delta.kv_transfer_params is not None:
            self.params = delta.kv_transfer_params
        if self.envelope is not None:
            self.deltas.append(delta)
        if delta.finish_reason is not None:
            self._end(delta, where, right, excused)
        if self.writer is not None and self.failure is None:
            self.sent += [event(chunk) for chunk in self.writer.chunks(0, delta)]

    def _end(self, delta: Delta, where: str, right: Expected, excused: Callable[["Ask", str], bool]) -> None:
        reason = delta.finish_reason
        assert reason is not None
        self.ended[delta.index] = reason
        if reason in RIGHT:
            said = (tuple(self.tokens[delta.index]), self.text[delta.index], reason, delta.stop_reason)
            if said != (right.tokens, right.text, right.reason, right.stop_reason):
                raise Broken("I14", f"{where} ended with {said}, expected {right}")
            return
        self.failure = self.failure or delta
        if reason is FinishReason.ABORT:
            if not (self.aborted or self.engine.has_aborted):
                raise Broken("I17", f"{where} was aborted, and nobody wanted that")
        elif not excused(self, delta.message or ""):
            raise Broken("I17", f"{where} failed without a fault: {delta.message}")

    def reply(self, vocabulary: Vocabulary) -> Reply:
        """What its client gets at the end. An error in a stream that has begun is an event of it."""
        last: list[dict[str, object]] = []
        try:
            if self.failure is not None:
                check_finish(self.failure)
            if self.envelope is None:
                return Reply(status=200, right=True)
            if self.writer is None:
                by_index = [
                    merge([delta for delta in self.deltas if delta.index == index])
                    for index in sorted(self.ended)
                ]
                answer = full_reply(self.envelope, [(0, delta) for delta in by_index], vocabulary)
                return Reply(status=200, body=msgspec.json.encode(answer), right=True)
            last = self.writer.last()
        except ApiError as error:
            if not self.begun:
                return error_reply(error)
            last = [error.body()]
        body = b"".join((*self.sent, *map(event, last), LAST_EVENT))
        return Reply(status=200, body=body, right=self.whole)
