"""The HTTP door: the only place that knows Starlette, uvicorn and asyncio.

`connection` bounds what a TCP peer can cost, `edge` is the first and last code that sees a request,
`body` reads it, `prepare` turns it into engine requests in a thread, `streams` merges what comes back,
`generate` answers, `routes` holds the small routes, `app` puts it together and `run` serves it.
"""

from jaxserve.server.app import create_app
from jaxserve.server.options import ServerOptions
from jaxserve.server.run import reserve_port, run
from jaxserve.server.surface import EngineSurface

__all__ = ["EngineSurface", "ServerOptions", "create_app", "reserve_port", "run"]
