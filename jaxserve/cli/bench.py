"""`jaxserve bench serve | latency | throughput | steps`."""

import argparse
import functools

from jaxserve.bench import latency, serve, steps, throughput
from jaxserve.engine import Engine


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Mounts the command and its kinds."""
    parser = commands.add_parser("bench", help="measure a server or the engine", description="Measure.")
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    over_http = kinds.add_parser("serve", help="drive OpenAI endpoints over HTTP, several in turn")
    serve.add_arguments(over_http)
    over_http.set_defaults(run=serve.run)
    for name, module, text in (
        ("latency", latency, "time one batch in process"),
        ("throughput", throughput, "time many prompts in process"),
    ):
        kind = kinds.add_parser(name, help=text, description=text.capitalize() + ".")
        module.add_arguments(kind)
        kind.set_defaults(run=functools.partial(module.run, make_engine=Engine))
    costs = kinds.add_parser(
        "steps", help="measure what steps cost, for `jaxserve simulate`", description=steps.__doc__
    )
    steps.add_arguments(costs)
    costs.set_defaults(run=steps.run)
