"""The application: routes around one engine."""

import time
from concurrent.futures import ThreadPoolExecutor

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxserve.api.errors import ApiError
from jaxserve.server.answers import error_response
from jaxserve.server.edge import ADMIN_PREFIX, Edge
from jaxserve.server.generate import GenerationRoute
from jaxserve.server.options import ServerOptions
from jaxserve.server.prepare import Preparer, facts_of
from jaxserve.server.routes import SmallRoutes, ThreadRoute
from jaxserve.server.status import Status
from jaxserve.server.surface import EngineSurface

PREPARE_THREADS = 4
"""Templates and tokenizers work outside Python's lock; more threads than this would only wait."""


def create_app(engine: EngineSurface, options: ServerOptions) -> Starlette:
    """The ASGI application. `app.state.status` is its `Status`.

    Args:
        engine: running already.
        options: of the server.
    """
    status = Status(engine, options.stall_s)
    facts = facts_of(engine)
    threads = ThreadPoolExecutor(PREPARE_THREADS, thread_name_prefix="prepare")
    preparer = Preparer(engine, facts, clock=time.monotonic, wall_clock=time.time)
    small = SmallRoutes(engine, options, status, facts)
    completions = GenerationRoute(engine, options, status, preparer.completion, threads)
    chat = GenerationRoute(engine, options, status, preparer.chat, threads)
    tokenize = ThreadRoute(engine, options, preparer.tokenize, threads)
    detokenize = ThreadRoute(engine, options, preparer.detokenize, threads)
    app = Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", small.models, methods=["GET"]),
            Route("/v1/models/{name:path}", small.model, methods=["GET"]),
            Route("/tokenize", tokenize.endpoint, methods=["POST"]),
            Route("/detokenize", detokenize.endpoint, methods=["POST"]),
            Route("/health", small.health, methods=["GET"]),
            Route("/ready", small.ready, methods=["GET"]),
            Route("/ping", small.health, methods=["GET", "POST"]),
            Route("/version", small.version, methods=["GET"]),
            Route("/metrics", small.metrics, methods=["GET"]),
            Route("/load", small.load, methods=["GET"]),
            Route("/reset_prefix_cache", small.reset_prefix_cache, methods=["POST"]),
            Route("/debug/pages", small.debug_pages, methods=["GET"]),
        ],
        middleware=[Middleware(Edge, options=options, admin_prefix=ADMIN_PREFIX)],
        exception_handlers={HTTPException: _http_error, ApiError: _api_error},
    )
    app.router.redirect_slashes = False
    app.state.status = status
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """The router's own 404 and 405 as OpenAI's error object."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    text, code = ROUTER_ERRORS.get(status, ("The request was refused.", None))
    return error_response(ApiError(status, text, code=code, headers=tuple(headers.items())))


async def _api_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return error_response(error)


ROUTER_ERRORS = {
    404: ("This path does not exist.", "not_found"),
    405: ("This path does not have this method.", "method_not_allowed"),
}
