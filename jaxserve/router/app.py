"""The application: routes around the flow."""

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.api.errors import ApiError
from jaxserve.router.ask import Upstream
from jaxserve.router.counts import Tally
from jaxserve.router.flow import GenerationFlow
from jaxserve.router.options import RouterOptions
from jaxserve.router.probes import Probes
from jaxserve.router.routes import PassedRoutes, SmallRoutes
from jaxserve.router.status import RouterStatus
from jaxserve.server.answers import error_response
from jaxserve.server.app import ROUTER_ERRORS
from jaxserve.server.edge import Edge, request_id_of


def create_router(options: RouterOptions, probes: Probes, upstream: Upstream) -> Starlette:
    """The ASGI application; `app.state.status` is its RouterStatus.

    Args:
        options: of the router.
        probes: started by whoever serves the application, and closed.
        upstream: closed by them too.
    """
    status = RouterStatus()
    tally = Tally()
    flow = GenerationFlow(probes, upstream, status, tally)
    small = SmallRoutes(options, probes.fleet, status, tally)
    passed = PassedRoutes(probes, upstream)
    app = Starlette(
        routes=[
            Route("/v1/completions", flow, methods=["POST"]),
            Route("/v1/chat/completions", flow, methods=["POST"]),
            Route("/v1/models", passed, methods=["GET"]),
            Route("/v1/models/{name:path}", passed, methods=["GET"]),
            Route("/tokenize", passed, methods=["POST"]),
            Route("/detokenize", passed, methods=["POST"]),
            Route("/health", small.health, methods=["GET"]),
            Route("/ping", small.health, methods=["GET", "POST"]),
            Route("/ready", small.ready, methods=["GET"]),
            Route("/healthcheck", small.healthcheck, methods=["GET"]),
            Route("/version", small.version, methods=["GET"]),
            Route("/load", small.load, methods=["GET"]),
            Route("/metrics", small.metrics, methods=["GET"]),
        ],
        middleware=[Middleware(Named), Middleware(Edge, options=options.server)],
        exception_handlers={HTTPException: _http_error, ApiError: _api_error},
    )
    app.router.redirect_slashes = False
    app.state.status = status
    return app


class Named:
    """ASGI middleware: every request has an X-Request-Id, the same for P, D and the client."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Names the request unless its client has."""
        if scope["type"] == "http":
            headers = MutableHeaders(raw=list(scope["headers"]))
            headers["x-request-id"] = request_id_of(headers)
            scope = {**scope, "headers": headers.raw}
        await self._app(scope, receive, send)


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405 as OpenAI's error object."""
    if not isinstance(error, HTTPException):
        raise error
    text, code = ROUTER_ERRORS.get(error.status_code, ("The request was refused.", None))
    headers = tuple((error.headers or {}).items())
    return error_response(ApiError(error.status_code, text, code=code, headers=headers))


async def _api_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return error_response(error)
