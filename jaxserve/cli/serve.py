"""`jaxserve serve`: the HTTP server."""

import argparse
import logging
import math
import os
import sys
from collections.abc import Mapping
from importlib.metadata import version

from jaxserve.cli.disaggregated import run_disaggregated
from jaxserve.cli.flags import add_engine, add_model, engine_config, model_of
from jaxserve.config import ConfigError
from jaxserve.engine import Engine
from jaxserve.server import ServerOptions, reserve_port, run
from metrics.prometheus import DEFAULT_PREFIX, SnapshotCollector

ADMIN_KEY = "JAXSERVE_ADMIN_API_KEY"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Mounts the command."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP, as OpenAI's API",
        description="Serve a model over HTTP: OpenAI's completions and chat, vLLM's extras and metrics. "
        "The port opens when the server can answer.",
    )
    add_model(parser)
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine only)")
    add("--port", type=int, default=8000, help="default %(default)s")
    add(
        "--served-model-name",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names that clients use (default: MODEL)",
    )
    add("--api-key", nargs="+", default=[], metavar="KEY",
        help="clients must send one as bearer token (default: $VLLM_API_KEY, else none)")  # fmt: skip
    add("--admin-api-key", metavar="KEY",
        help="opens /debug/pages, else closed (default: $JAXSERVE_ADMIN_API_KEY, else none)")  # fmt: skip
    add("--shutdown-timeout", type=float, default=30.0, metavar="S",
        help="seconds that running requests get after SIGTERM (default %(default)g)")  # fmt: skip
    add("--metrics-prefix", default=DEFAULT_PREFIX, help="before every metric's name (default %(default)s)")
    add("--disable-log-stats", action="store_true", help="no line of statistics every ten seconds")
    add("--log-level", "--uvicorn-log-level", dest="log_level", default="info",
        choices=("debug", "info", "warning", "error"), help="default %(default)s")  # fmt: skip
    add("--disaggregated", action=argparse.BooleanOptionalAction, default=False,
        help="for trying it out: a prefill server and a decode server behind a router, on this machine; "
        "both get the other flags")  # fmt: skip
    add_engine(parser)
    parser.set_defaults(run=lambda args: _serve(args, parser))


def _serve(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,  # a library that we import has set up the root logger
    )
    logging.getLogger("jaxserve").setLevel(args.log_level.upper())
    if args.disaggregated:
        return run_disaggregated(args)
    config = engine_config(
        args,
        model_of(args, parser),
        served_model_name=tuple(args.served_model_name),
        log_stats=not args.disable_log_stats,
    )
    _check_prefix(args.metrics_prefix)
    options = server_options(args)
    try:
        sock = reserve_port(options)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {args.host} --port {args.port}: {error}") from error
    engine = Engine(config, metrics_prefix=args.metrics_prefix)
    try:
        return run(engine, options, sock)
    finally:
        engine.close()


def server_options(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> ServerOptions:
    """The HTTP server's settings, from flags and environment.

    Raises:
        ConfigError: a value out of range, or an admin key that is empty or a client's.
    """
    if not 0 <= args.shutdown_timeout < math.inf:
        raise ConfigError(f"--shutdown-timeout must be at least 0 seconds, got {args.shutdown_timeout}")
    keys = tuple(args.api_key) or tuple(filter(None, [environ.get("VLLM_API_KEY")]))
    admin = environ.get(ADMIN_KEY) or None if args.admin_api_key is None else args.admin_api_key
    if admin == "":
        raise ConfigError("--admin-api-key must not be empty")
    if admin in keys:
        raise ConfigError(f"--admin-api-key (or ${ADMIN_KEY}) must not be a key that clients have")
    return ServerOptions(
        host=args.host,
        port=args.port,
        api_keys=keys,
        admin_key=admin,
        shutdown_timeout_s=args.shutdown_timeout,
        version=version("jaxserve"),
    )


def _check_prefix(prefix: str) -> None:
    try:
        SnapshotCollector(_no_snapshot, prefix=prefix)
    except ValueError as error:
        raise ConfigError(f"--metrics-prefix: {error}") from error


def _no_snapshot():
    raise LookupError("only the prefix is checked")
