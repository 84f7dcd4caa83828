"""The routes beside generation: those that a decode server answers, and the router's own."""

import httpx
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.api.errors import ApiError, unavailable
from jaxserve.router.ask import Ask, Upstream
from jaxserve.router.counts import Tally, families, make_registry
from jaxserve.router.fleet import Backend, Fleet
from jaxserve.router.options import RouterOptions
from jaxserve.router.probes import Probes
from jaxserve.router.relay import Reply, Stopped, unless
from jaxserve.router.status import RouterStatus
from jaxserve.server.answers import error_response, json_response
from jaxserve.server.body import ClientGone
from jaxserve.server.streams import unless_gone
from metrics.exposition import Family
from metrics.prometheus import render


class PassedRoutes:
    """ASGI application of the routes that any decode server can answer: models, tokens."""

    def __init__(self, probes: Probes, upstream: Upstream) -> None:
        self._probes = probes
        self._fleet = probes.fleet
        self._upstream = upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request; raises ApiError where there is no answer."""
        headers = Headers(scope=scope)
        if {".", ".."} & set(scope["path"].split("/")):
            # A client would resolve them, and so reach routes that are not passed on.
            raise ApiError(404, "This path does not exist.", code="not_found")
        try:
            body = await self._upstream.read(headers, receive) if scope["method"] == "POST" else None
            await unless_gone(
                receive,
                self._answer(Ask(path=scope["path"], headers=headers, body=body), Reply(send, _uncounted)),
            )
        except ClientGone:
            return

    async def _answer(self, ask: Ask, reply: Reply) -> None:
        backend = self._fleet.pick("decode")
        while backend is not None:
            try:
                await unless((self._probes.silent(backend),), self._relay(backend, ask, reply))
                return await reply.end()
            except (httpx.TransportError, Stopped) as error:
                self._fleet.suspect(backend, f"failed ({type(error).__name__})")
                if reply.status is not None:
                    raise ApiError(502, "The decode server failed.", code="bad_gateway") from None
            backend = self._fleet.pick("decode")
        raise unavailable("No decode server can be reached.")

    async def _relay(self, backend: Backend, ask: Ask, reply: Reply) -> None:
        async with self._upstream.asked(backend, ask) as response:
            await reply.pass_on(response)


def _uncounted(outcome: str) -> None:
    """Outcomes are those of generation requests."""


class SmallRoutes:
    """Endpoints that answer from state alone."""

    def __init__(self, options: RouterOptions, fleet: Fleet, status: RouterStatus, tally: Tally) -> None:
        self._options = options
        self._fleet = fleet
        self._status = status
        self._tally = tally
        self._registry = make_registry(self._families)

    async def health(self, request: Request) -> Response:
        """200 while a server of each role is well: one that silently computes prompts on D is not."""
        missing = self._missing()
        return Response() if missing is None else error_response(unavailable(missing))

    async def ready(self, request: Request) -> Response:
        """200 while new requests would be served well."""
        missing = "The router is shutting down." if self._status.draining else self._missing()
        if missing is not None:
            return error_response(unavailable(missing))
        return json_response({"ready": True})

    async def healthcheck(self, request: Request) -> Response:
        """In the shape of vLLM's proxies: how many servers of each role there are, and how many are well."""
        prefill, decode = self._fleet.prefill, self._fleet.decode
        return json_response(
            {
                "status": "ok" if self._missing() is None else "degraded",
                "prefill_instances": len(prefill),
                "decode_instances": len(decode),
                "prefill_healthy": sum(backend.healthy for backend in prefill),
                "decode_healthy": sum(backend.healthy for backend in decode),
            }
        )

    async def version(self, request: Request) -> Response:
        """The router's version."""
        return json_response({"version": self._options.server.version})

    async def load(self, request: Request) -> Response:
        """Generation requests in progress, in vLLM's shape."""
        return json_response({"server_load": self._status.in_flight})

    async def metrics(self, request: Request) -> Response:
        """Prometheus exposition."""
        body, content_type = render(self._registry, request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    def _missing(self) -> str | None:
        for role in ("prefill", "decode"):
            if not any(backend.healthy for backend in self._fleet.of(role)):
                return f"No {role} server is well."
        return None

    def _families(self) -> tuple[Family, ...]:
        up = [(backend.role, backend.url, backend.healthy) for backend in self._fleet.backends]
        return families(self._tally.stats, up, self._status.in_flight)
