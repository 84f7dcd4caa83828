"""Executes the decisions of `route`: asks the backends, and passes their answers to the client."""

from dataclasses import dataclass

import httpx
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from jaxserve.api.errors import ApiError
from jaxserve.router.ask import Ask, Upstream
from jaxserve.router.calls import Call, decode_body, prefill_body, read_call, refuses_params, transfer_params
from jaxserve.router.counts import Tally
from jaxserve.router.probes import Probes
from jaxserve.router.relay import Reply, Stopped, TooLarge, outcome_of, read_whole, unless
from jaxserve.router.route import (
    Answered,
    AskDecode,
    AskPrefill,
    BreakOff,
    Failed,
    Failure,
    Finish,
    GiveUp,
    LeftUnread,
    Outcome,
    ParamsRefused,
    Passed,
    PassRefusal,
    Probe,
    Probed,
    Route,
    Verdict,
    judge,
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
                    outcome = await self._prefill(order, asking)
                case AskDecode() as order:
                    outcome = await self._decode(order, asking)
                case Probe(backend=backend):
                    outcome = Probed(well=await self._probes.probe(backend))
                case PassRefusal() if asking.refusal is not None:
                    await reply.whole(*asking.refusal)
                    return await reply.end()
                case Finish() | PassRefusal():
                    return await reply.end()
                case GiveUp(error=error):
                    raise error
                case BreakOff(error=error):
                    return await reply.break_off(error)
            route.take(outcome)

    async def _prefill(self, order: AskPrefill, asking: Asking) -> Outcome:
        """Puts the prompt to P."""
        ask = Ask(path=asking.path, headers=asking.headers, body=prefill_body(asking.call))
        began_s, backend = self._upstream.now_s(), order.backend
        try:
            silent, ending = self._probes.silent(backend), self._status.ending
            response, answer = await unless((silent, ending), self._upstream.ask_whole(backend, ask))
        except Stopped:
            return self._stopped()
        except TimeoutError:
            return Failed(failure=Failure.LATE)
        except httpx.TransportError as error:
            return Failed(failure=Failure.BROKEN, why=type(error).__name__)
        except TooLarge:
            return Failed(failure=Failure.TOO_LARGE)
        asking.refusal = (response, answer)
        if response.status_code != 200:
            return Answered(status=response.status_code)
        try:
            params = transfer_params(answer)
        except ValueError as error:
            return Failed(failure=Failure.NONSENSE, why=f"its answer makes no sense: {error}")
        self._tally.prefilled(self._upstream.now_s() - began_s)
        return Answered(status=200, params=params)

    async def _decode(self, order: AskDecode, asking: Asking) -> Outcome:
        """Passes one D's answer on."""
        body, backend, reply = decode_body(asking.call, order.params), order.backend, asking.reply
        ask = Ask(path=asking.path, headers=asking.headers, body=body)

        async def relay() -> Outcome:
            began_s = self._upstream.now_s()
            async with self._upstream.asked(backend, ask) as response:
                match judge(self._probes.fleet, order, response.status_code):
                    case Verdict.LEAVE:
                        return LeftUnread(status=response.status_code)
                    case Verdict.READ:
                        answer = await read_whole(response)
                        if refuses_params(answer):
                            return ParamsRefused()
                        await reply.whole(response, answer)
                    case Verdict.PASS_ON:
                        await reply.pass_on(
                            response, lambda: self._tally.first_byte(self._upstream.now_s() - began_s)
                        )
                        if response.status_code == 200:
                            self._tally.decoded(self._upstream.now_s() - began_s)
                return Passed()

        try:
            return await unless((self._probes.silent(backend), self._status.ending), relay())
        except Stopped:
            return self._stopped(reply)
        except TooLarge:
            return _failed(Failure.TOO_LARGE, reply)
        except httpx.TimeoutException:
            return _failed(Failure.LATE, reply)
        except httpx.TransportError as error:
            return _failed(Failure.BROKEN, reply, type(error).__name__)

    def _stopped(self, reply: Reply | None = None) -> Failed:
        """A call was given up: the backend has fallen silent, or the router ends."""
        return _failed(Failure.ENDING if self._status.ending.is_set() else Failure.SILENT, reply)


def _failed(failure: Failure, reply: Reply | None, why: str = "") -> Failed:
    return Failed(failure=failure, why=why, begun=reply is not None and reply.status is not None)
