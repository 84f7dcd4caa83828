"""The small routes."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.api.errors import unavailable
from jaxserve.api.generation import ModelFacts, model_not_found
from jaxserve.api.replies import model_card
from jaxserve.server.answers import error_response, json_response
from jaxserve.server.body import ClientGone, read_body
from jaxserve.server.options import ServerOptions, body_limit
from jaxserve.server.status import Status
from jaxserve.server.surface import EngineSurface


class SmallRoutes:
    """Endpoints that answer from state alone."""

    def __init__(
        self, engine: EngineSurface, options: ServerOptions, status: Status, facts: ModelFacts
    ) -> None:
        self._engine = engine
        self._options = options
        self._status = status
        self._facts = facts
        self._created = int(time.time())

    async def models(self, request: Request) -> Response:
        """The served names, as OpenAI lists models."""
        cards = [model_card(name, self._facts, self._created) for name in self._facts.names]
        return json_response({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        """One served name."""
        name = request.path_params["name"]
        if name not in self._facts.names:
            return error_response(model_not_found(name))
        return json_response(model_card(name, self._facts, self._created))

    async def health(self, request: Request) -> Response:
        """200 while the engine's loop lives."""
        self._status.check_alive()
        return Response()

    async def ready(self, request: Request) -> Response:
        """200 while new requests would be served."""
        reason = self._status.not_ready()
        if reason is not None:
            return error_response(unavailable(f"Not ready: {reason}."))
        return json_response({"ready": True})

    async def version(self, request: Request) -> Response:
        """The server's version."""
        return json_response({"version": self._options.version})

    async def load(self, request: Request) -> Response:
        """Generation requests in progress, in vLLM's shape."""
        return json_response({"server_load": self._status.in_flight})

    async def metrics(self, request: Request) -> Response:
        """Prometheus exposition."""
        body, content_type = self._engine.metrics_text(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def reset_prefix_cache(self, request: Request) -> Response:
        """Drops every cached page that nobody uses; with vLLM's `reset_external`, host tiers' too."""
        external = request.query_params.get("reset_external", "false").lower() in ("true", "1")
        return json_response({"success": await self._engine.reset_prefix_cache(external=external)})

    async def debug_pages(self, request: Request) -> Response:
        """Every page of the pool by what it is for."""
        return json_response((await self._engine.page_census()).body())


class ThreadRoute:
    """A POST endpoint whose answer is computed from its body in a thread."""

    def __init__(
        self,
        engine: EngineSurface,
        options: ServerOptions,
        answer: Callable[[bytes], dict[str, object]],
        threads: Executor,
    ) -> None:
        self._limit = body_limit(engine.max_model_len)
        self._timeout_s = options.body_timeout_s
        self._answer = answer
        self._threads = threads

    async def endpoint(self, request: Request) -> Response:
        """Reads the body and answers."""
        try:
            body = await read_body(
                request.headers, request.receive, limit=self._limit, timeout_s=self._timeout_s
            )
        except ClientGone:
            return Response(status_code=400)
        loop = asyncio.get_running_loop()
        return json_response(await loop.run_in_executor(self._threads, self._answer, body))
