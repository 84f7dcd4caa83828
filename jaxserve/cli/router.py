"""`jaxserve router`: one port in front of prefill and decode servers."""

import argparse
import logging
import math
import os
import sys
from importlib.metadata import version

from jaxserve.config import ConfigError
from jaxserve.router import RouterOptions, run
from jaxserve.server.options import ServerOptions
from jaxserve.server.run import reserve_port


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Mounts the command."""
    parser = commands.add_parser(
        "router",
        help="one port in front of prefill and decode servers",
        description="Route OpenAI requests: a prefill server computes the prompt, a decode server fetches "
        "its KV and generates. The request flow is that of vLLM's proxies.",
    )
    add = parser.add_argument
    add("--prefill", nargs="+", required=True, metavar="URL", help="servers that compute prompts")
    add("--decode", nargs="+", required=True, metavar="URL", help="servers that generate")
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine only)")
    add("--port", type=int, default=8192, help="default %(default)s")
    add("--api-key", nargs="+", default=[], metavar="KEY",
        help="clients must send one as bearer token, and the servers behind get it from the client "
        "(default: $VLLM_API_KEY, else none)")  # fmt: skip
    add("--prefill-timeout", type=float, default=600.0, metavar="S",
        help="seconds for a prefill server's answer (default %(default)g)")  # fmt: skip
    add("--decode-timeout", type=float, default=600.0, metavar="S",
        help="seconds without a byte from a decode server (default %(default)g)")  # fmt: skip
    add("--health-interval", type=float, default=2.0, metavar="S",
        help="seconds between health checks of a server (default %(default)g)")  # fmt: skip
    add("--health-timeout", type=float, default=3.0, metavar="S",
        help="seconds for a health check; after two without an answer a server's requests are taken from it "
        "(default %(default)g)")  # fmt: skip
    add("--shutdown-timeout", type=float, default=30.0, metavar="S",
        help="seconds that running requests get after SIGTERM (default %(default)g)")  # fmt: skip
    add("--log-level", "--uvicorn-log-level", dest="log_level", default="info",
        choices=("debug", "info", "warning", "error"), help="default %(default)s")  # fmt: skip
    parser.set_defaults(run=_route)


def _route(args: argparse.Namespace) -> int:
    log_to_stderr(args.log_level)
    for flag in ("prefill_timeout", "decode_timeout", "health_interval", "health_timeout"):
        if not 0 < getattr(args, flag) < math.inf:
            raise ConfigError(f"--{flag.replace('_', '-')} must be more than 0 seconds")
    options = RouterOptions(
        prefill=tuple(args.prefill),
        decode=tuple(args.decode),
        server=server_options(args),
        prefill_timeout_s=args.prefill_timeout,
        silence_timeout_s=args.decode_timeout,
        probe_interval_s=args.health_interval,
        probe_timeout_s=args.health_timeout,
    )
    try:
        sock = reserve_port(options.server)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {args.host} --port {args.port}: {error}") from error
    return run(options, sock)


def server_options(args: argparse.Namespace) -> ServerOptions:
    """The router's own port, from the flags that `serve` has too.

    Raises:
        ConfigError: a value out of range.
    """
    if not 0 <= args.shutdown_timeout < math.inf:
        raise ConfigError(f"--shutdown-timeout must be at least 0 seconds, got {args.shutdown_timeout}")
    return ServerOptions(
        host=args.host,
        port=args.port,
        api_keys=tuple(args.api_key) or tuple(filter(None, [os.environ.get("VLLM_API_KEY")])),
        shutdown_timeout_s=args.shutdown_timeout,
        version=version("jaxserve"),
    )


def log_to_stderr(level: str) -> None:
    """Our log lines at this level, others' warnings."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    logging.getLogger("jaxserve").setLevel(level.upper())
