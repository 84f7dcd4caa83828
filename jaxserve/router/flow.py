"""Executes the decisions of `route`: asks the backends, and passes their answers to the client."""

from dataclasses import dataclass

import httpx
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from jaxserve.api.errors import ApiError
from jaxserve.router.ask import Ask, Upstream
from jaxserve.router.calls import Call, decode_body, prefill_body, read_call
from jaxserve.router.counts import Tally
from jaxserve.router.exchange import Trouble, failed, outcome, verdict
from jaxserve.router.probes import Probes
from jaxserve.router.relay import Reply, Stopped, TooLarge, outcome_of, read_whole, unless
from jaxserve.router.route import (
    Answered,
    AskDecode,
    AskPrefill,
    BreakOff,
    Finish,
    GiveUp,
    Outcome,
    Passed,
    PassRefusal,
    Probe,
    Probed,
    Route,
    Verdict,
)
from jaxserve.router.status import RouterStatus
from jaxserve.server.body import ClientGone
from jaxserve.server.streams import unless_gone


@dataclass(slots=True, kw_only=True)
class Asking:
    """One client's request on its way.

    Attributes:
        refusal: P's last answer, where it may be passed to the client.
    """

    path: str
    headers: Headers
    call: Call
    reply: Reply
    refusal: tuple[httpx.Response, bytes] | None = None


class GenerationFlow:
    """The ASGI application of one generation route."""

    def __init__(self, probes: Probes, upstream: Upstream, status: RouterStatus, tally: Tally) -> None:
        self._probes = probes
        self._upstream = upstream
        self._status = status
        self._tally = tally

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request; raises ApiError where there is no answer, or one that had to be cut."""
        self._status.check_accepting()
        reply = Reply(send, self._tally.outcome)
        with self._status.serving():
            try:
                headers = Headers(scope=scope)
                raw = await self._upstream.read(headers, receive)
                await unless_gone(receive, self._answer(scope["path"], headers, raw, reply))
            except ClientGone:
                # Seen after a whole answer too: then that is what was counted.
                reply.settle("aborted")
            except ApiError as error:
                reply.settle(outcome_of(error.status))
                raise
            finally:
                reply.settle("server_error")

    async def _answer(self, path: str, headers: Headers, raw: bytes, reply: Reply) -> None:
        call = read_call(raw)
        asking = Asking(path=path, headers=headers, call=call, reply=reply)
        route = Route(self._probes.fleet, self._tally, direct=call.direct)
        while True:
            match route.order:
                case AskPrefill() as order:
                    came = await self._prefill(order, asking)
                case AskDecode() as order:
                    came = await self._decode(order, asking)
                case Probe(backend=backend):
                    came = Probed(well=await self._probes.probe(backend))
                case PassRefusal() if asking.refusal is not None:
                    await reply.whole(*asking.refusal)
                    return await reply.end()
                case Finish() | PassRefusal():
                    return await reply.end()
                case GiveUp(error=error):
                    raise error
                case BreakOff(error=error):
                    return await reply.break_off(error)
            route.take(came)

    async def _prefill(self, order: AskPrefill, asking: Asking) -> Outcome:
        """Puts the prompt to P."""
        ask = Ask(path=asking.path, headers=asking.headers, body=prefill_body(asking.call))
        began_s, backend = self._upstream.now_s(), order.backend
        try:
            stops = (self._probes.silent(backend), self._status.ending)
            response, answer = await unless(stops, self._upstream.ask_whole(backend, ask))
        except (Stopped, TooLarge, TimeoutError, httpx.TransportError) as error:
            return failed(order, self._trouble(error), why=type(error).__name__)
        asking.refusal = (response, answer)
        how = verdict(self._probes.fleet, order, response.status_code)
        came = outcome(order, how, response.status_code, answer)
        if isinstance(came, Answered) and came.status == 200:
            self._tally.prefilled(self._upstream.now_s() - began_s)
        return came

    async def _decode(self, order: AskDecode, asking: Asking) -> Outcome:
        """Passes one D's answer on."""
        body, backend, reply = decode_body(asking.call, order.params), order.backend, asking.reply
        ask = Ask(path=asking.path, headers=asking.headers, body=body)

        async def relay() -> Outcome:
            began_s = self._upstream.now_s()
            async with self._upstream.asked(backend, ask) as response:
                status, answer = response.status_code, b""
                how = verdict(self._probes.fleet, order, status)
                if how is Verdict.READ:
                    answer = await read_whole(response)
                elif how is Verdict.PASS_ON:
                    await reply.pass_on(
                        response, lambda: self._tally.first_byte(self._upstream.now_s() - began_s)
                    )
                    if status == 200:
                        self._tally.decoded(self._upstream.now_s() - began_s)
                came = outcome(order, how, status, answer)
                if how is Verdict.READ and isinstance(came, Passed):
                    await reply.whole(response, answer)
                return came

        try:
            return await unless((self._probes.silent(backend), self._status.ending), relay())
        except (Stopped, TooLarge, httpx.TransportError) as error:
            begun = reply.status is not None
            return failed(order, self._trouble(error), why=type(error).__name__, begun=begun)

    def _trouble(self, error: Exception) -> Trouble:
        """What has ended a call before its answer did."""
        match error:
            case Stopped():  # it was given up: the backend has fallen silent, or the router ends
                return Trouble.ENDING if self._status.ending.is_set() else Trouble.SILENT
            case TooLarge():
                return Trouble.TOO_LARGE
            case TimeoutError():
                return Trouble.OVERDUE
            case httpx.ReadTimeout():
                return Trouble.QUIET
            case httpx.TimeoutException():
                return Trouble.UNSENT
            case _:
                return Trouble.BROKEN
