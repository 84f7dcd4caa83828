"""The way of one generation request: P computes the prompt, D generates."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import httpx
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from jaxserve.api.errors import ApiError, unavailable
from jaxserve.router.ask import Ask, Upstream
from jaxserve.router.calls import decode_body, prefill_body, read_call, refuses_params, transfer_params
from jaxserve.router.counts import Tally
from jaxserve.router.fleet import Backend, Fleet
from jaxserve.router.relay import Reply, Stopped, TooLarge, outcome_of, read_whole, unless
from jaxserve.router.status import RouterStatus
from jaxserve.server.body import ClientGone
from jaxserve.server.streams import unless_gone

logger = logging.getLogger(__name__)

TRY_ANOTHER = frozenset({502, 503, 504})
"""D's statuses that speak of the server, not of the request."""


class PrefillFailed(Exception):
    """A prefill server gave no answer that is of use; the message is for the log."""


class ParamsRefused(Exception):
    """D does not take P's parameters: keys or models differ, or P's lease is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """P's answer to a request that is at fault itself: the client gets it as it is."""

    response: httpx.Response
    body: bytes


class GenerationFlow:
    """The ASGI application of one generation route."""

    def __init__(self, fleet: Fleet, upstream: Upstream, status: RouterStatus, tally: Tally) -> None:
        self._fleet = fleet
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
        params = None
        if call.direct is not None:
            self._tally.direct(call.direct)
        else:
            prefilled = await self._prefill(Ask(path=path, headers=headers, body=prefill_body(call)))
            if isinstance(prefilled, Refusal):
                await reply.whole(prefilled.response, prefilled.body)
                return await reply.end()
            params = prefilled
        body, has_params = decode_body(call, params), params is not None
        try:
            await self._decode(Ask(path=path, headers=headers, body=body, has_params=has_params), reply)
        except ParamsRefused:
            logger.warning("a decode server does not take the parameters of a prefill server")
            self._tally.fallback("params_refused")
            await self._decode(Ask(path=path, headers=headers, body=decode_body(call, None)), reply)

    async def _prefill(self, ask: Ask) -> Mapping[str, object] | Refusal | None:
        """P's parameters for D; None: D must compute the prompt.

        One retry: a second failure is more likely the request's than a server's.
        """
        backend = self._fleet.pick("prefill")
        if backend is None:
            self._tally.fallback("no_prefill_server")
            return None
        try:
            try:
                answer = await self._ask_prefill(backend, ask)
            except PrefillFailed as failure:
                logger.warning("prefill server %s: %s", backend.url, failure)
                second = await self._fleet.again(backend)
                if second is None:
                    raise
                self._tally.retry("prefill")
                answer = await self._ask_prefill(second, ask)
        except PrefillFailed as failure:
            logger.warning("no prefill server could be used: %s", failure)
            self._tally.fallback("prefill_failed")
            return None
        if answer is None:
            self._tally.fallback("no_params")
        return answer

    async def _ask_prefill(self, backend: Backend, ask: Ask) -> Mapping[str, object] | Refusal | None:
        began_s = self._upstream.now_s()
        try:
            asking = self._upstream.ask_whole(backend, ask)
            response, answer = await unless((backend.silent, self._status.ending), asking)
        except Stopped:
            if self._status.ending.is_set():
                raise unavailable("The router is shutting down.") from None
            raise PrefillFailed("has fallen silent") from None
        except TimeoutError:
            raise PrefillFailed("did not answer in time") from None
        except httpx.TransportError as error:
            self._fleet.suspect(backend, f"failed ({type(error).__name__})")
            raise PrefillFailed(type(error).__name__) from None
        except TooLarge:
            raise PrefillFailed("its answer is too large") from None
        if 400 <= response.status_code < 500:
            return Refusal(response=response, body=answer)
        if response.status_code != 200:
            raise PrefillFailed(f"status {response.status_code}")
        try:
            params = transfer_params(answer)
        except ValueError as error:
            raise PrefillFailed(f"its answer makes no sense: {error}") from None
        self._tally.prefilled(self._upstream.now_s() - began_s)
        return params

    async def _decode(self, ask: Ask, reply: Reply) -> None:
        """D's answer to the client.

        A second D gets the same parameters: P keeps the pages until they were read or their lease ends.

        Raises:
            ApiError: there is none.
            ParamsRefused: there will be one without the parameters.
        """
        backend = self._fleet.pick("decode")
        if backend is None:
            raise unavailable("No decode server can be reached.")
        failure = await self._relay(backend, ask, reply, first=True)
        if failure is not None and reply.status is None:
            second = await self._fleet.again(backend)
            if second is not None:
                self._tally.retry("decode")
                failure = await self._relay(second, ask, reply, first=False)
        if failure is None:
            await reply.end()
        elif reply.status is None:
            raise failure
        else:
            await reply.break_off(failure)

    async def _relay(self, backend: Backend, ask: Ask, reply: Reply, *, first: bool) -> ApiError | None:
        """Passes one D's answer on; what went wrong, if anything did."""

        async def relay() -> ApiError | None:
            began_s = self._upstream.now_s()
            async with self._upstream.asked(backend, ask) as response:
                if first and response.status_code in TRY_ANOTHER and self._fleet.has_other(backend):
                    return bad_gateway(f"A decode server answered {response.status_code}.")
                if ask.has_params and response.status_code == 400:
                    answer = await read_whole(response)
                    if refuses_params(answer):
                        raise ParamsRefused
                    await reply.whole(response, answer)
                    return None
                await reply.pass_on(
                    response, lambda: self._tally.first_byte(self._upstream.now_s() - began_s)
                )
                if response.status_code == 200:
                    self._tally.decoded(self._upstream.now_s() - began_s)
                return None

        try:
            return await unless((backend.silent, self._status.ending), relay())
        except Stopped:
            if self._status.ending.is_set():
                return unavailable("The router is shutting down.")
            return bad_gateway("The decode server has fallen silent.")
        except TooLarge:
            return bad_gateway("The decode server's refusal is too large.")
        except httpx.TimeoutException:
            return ApiError(504, "The decode server did not answer in time.", code="backend_timeout")
        except httpx.TransportError as error:
            self._fleet.suspect(backend, f"failed ({type(error).__name__})")
            return bad_gateway("The decode server failed.")


def bad_gateway(message: str) -> ApiError:
    """A 502 for what a backend did."""
    return ApiError(502, message, code="bad_gateway")
