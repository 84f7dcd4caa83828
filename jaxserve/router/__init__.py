"""The router in front of prefill and decode servers: P computes a prompt, D fetches its KV and generates.

The request flow is that of vLLM's proxies, with health checks, one retry, and D alone where P fails.
`calls` says what P and D are asked, `fleet` which of them are well and whose turn it is, `route` what becomes
of one request: these decide and are pure, and the simulator runs them too. `ask` puts a request to a backend,
`probes` checks its health, `relay` passes its answer on, `flow` executes a request's way, `counts` is what is
counted, `routes` holds the small routes, `app` puts it together and `run` serves it. Imports no JAX.
"""

from jaxserve.router.app import create_router
from jaxserve.router.options import RouterOptions
from jaxserve.router.run import RouterServer, run

__all__ = ["RouterOptions", "RouterServer", "create_router", "run"]
