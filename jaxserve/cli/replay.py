"""`jaxserve replay`: runs a record again and proves that every plan is the same."""

import argparse
from pathlib import Path

from jaxserve.config import ConfigError
from jaxserve.record import replay_file


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Mounts the command."""
    parser = commands.add_parser(
        "replay",
        help="run the steps of a record again and compare every plan",
        description="Run the steps that `serve --record FILE` wrote through the scheduler again, without a "
        "model, and compare the digest of every plan.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a record")
    parser.set_defaults(run=_replay)


def _replay(args: argparse.Namespace) -> int:
    try:
        seen = replay_file(args.file)
    except OSError as error:
        raise ConfigError(f"{args.file}: {error}") from error
    if seen.cut_bytes:
        print(f"the record was cut off: its last {seen.cut_bytes} bytes are no whole step and are left out")
    print(
        f"{seen.steps} steps, {seen.tokens} tokens, {seen.preempted} preemptions, {seen.aborted} aborts: "
        f"every plan is the same (digest {seen.digest})"
    )
    return 0
