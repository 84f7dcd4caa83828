"""The command line: `jaxserve serve | router | generate | chat | bench | compile | replay | simulate | ...`.

Flags have vLLM's names wherever the meaning is the same. Environment variables are read here, and by a
library `Engine` for the place of the cache; nowhere else.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

from jaxserve.config import ConfigError
from jaxserve.outputs import EngineError, RequestRefused
from jaxserve.weights.errors import WeightsError
from scheduler.record import RecordError

USAGE_ERROR = 2

COMMANDS = {
    "serve": "jaxserve.cli.serve:add_parser",
    "router": "jaxserve.cli.router:add_parser",
    "generate": "jaxserve.cli.talk:add_parsers",
    "chat": "jaxserve.cli.talk:add_parsers",
    "bench": "jaxserve.cli.bench:add_parser",
    "compile": "jaxserve.cli.compile:add_parser",
    "replay": "jaxserve.cli.replay:add_parser",
    "simulate": "jaxserve.cli.simulate:add_parser",
    "convert": "jaxserve.cli.models:add_parsers",
    "pull": "jaxserve.cli.models:add_parsers",
    "collect-env": "jaxserve.cli.environment:add_parser",
}
"""What mounts each command, by name: only what is run is imported, so that the router starts without JAX."""


class _Parser(argparse.ArgumentParser):
    """Complains of unknown flags itself: argparse leaves that to the topmost parser and shows its usage."""

    def parse_known_args(  # type: ignore[override]
        self, args: Any = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """As argparse, but nothing may be left over."""
        known, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return known, left


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """All subcommands and their flags.

    Args:
        command: mount this one only; None, or a name that is no command: all.
    """
    top = _Parser(prog="jaxserve", description="Serve large language models with JAX, behind OpenAI's API.")
    top.add_argument("-v", "--version", action="version", version=f"jaxserve {version('jaxserve')}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    mounts = [COMMANDS[command]] if command in COMMANDS else dict.fromkeys(COMMANDS.values())
    for mount in mounts:
        module, _, function = mount.partition(":")
        getattr(import_module(module), function)(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit code: 2 for what the user can mend, 1 for the rest."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = parser(given[0] if given else None).parse_args(given)
    args.given = given
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
