"""The command line: `jaxserve serve | generate | chat | bench | replay | convert | pull | collect-env`.

Flags have vLLM's names wherever the meaning is the same. Environment variables are read here, and by a
library `Engine` for the place of the cache; nowhere else.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from jaxserve.cli import bench, models, replay, serve, talk
from jaxserve.collect_env import report
from jaxserve.config import ConfigError
from jaxserve.outputs import EngineError, RequestRefused
from jaxserve.weights.errors import WeightsError
from scheduler.record import RecordError

USAGE_ERROR = 2


def parser() -> argparse.ArgumentParser:
    """All subcommands and their flags."""
    top = argparse.ArgumentParser(
        prog="jaxserve", description="Serve large language models with JAX, behind OpenAI's API."
    )
    top.add_argument("-v", "--version", action="version", version=f"jaxserve {version('jaxserve')}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    serve.add_parser(commands)
    talk.add_parsers(commands)
    bench.add_parser(commands)
    replay.add_parser(commands)
    models.add_parsers(commands)
    environment = commands.add_parser(
        "collect-env",
        help="print versions and devices, for a bug report",
        description="Print versions and devices.",
    )
    environment.set_defaults(run=_collect_env)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit code: 2 for what the user can mend, 1 for the rest."""
    args = parser().parse_args(arguments)
    try:
        return args.run(args)
    except (ConfigError, WeightsError, RecordError, RequestRefused, EngineError) as error:
        print(f"jaxserve: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _collect_env(args: argparse.Namespace) -> int:
    print(report())
    return 0
