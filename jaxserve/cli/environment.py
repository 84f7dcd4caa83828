"""`jaxserve collect-env`: versions and devices, for a bug report."""

import argparse

from jaxserve.collect_env import report


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Mounts the command."""
    parser = commands.add_parser(
        "collect-env",
        help="print versions and devices, for a bug report",
        description="Print versions and devices.",
    )
    parser.set_defaults(run=_collect_env)


def _collect_env(args: argparse.Namespace) -> int:
    print(report())
    return 0
