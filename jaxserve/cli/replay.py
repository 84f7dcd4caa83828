"""`jaxserve replay`: runs a record again and proves that every plan is the same, and every token."""

import argparse
import os
import sys
from pathlib import Path

from jaxserve.config import ConfigError
from jaxserve.rerun import rerun
from jaxserve.weights.smollm2 import default_cache_dir
from scheduler.record import decode, replay


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Mounts the command."""
    parser = commands.add_parser(
        "replay",
        help="run the steps of a record again and compare every plan",
        description="Run the steps that `serve --record FILE` wrote through the scheduler again, without a "
        "model, and compare the digest of every plan. With --tokens run them on the model, too, and compare "
        "every token that was sampled: for records of `serve --deterministic`.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a record")
    parser.add_argument("--tokens", action="store_true", help="load the model and sample every token again")
    parser.add_argument("--model", metavar="MODEL", help="where the model is now (default: where it was)")
    parser.add_argument("--cache-dir", type=Path, metavar="DIR",
        help="of downloaded models and compiled programs (default: the user's cache folder)")  # fmt: skip
    parser.set_defaults(run=lambda args: _replay(args, parser))


def _replay(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if args.model is not None and not args.tokens:
        parser.error("--model is of use with --tokens only: plans are the same whatever the model")
    try:
        record = decode(args.file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{args.file}: {error}") from error
    sampled = None
    if args.tokens:
        seen, sampled = rerun(
            record,
            model=args.model,
            cache_dir=args.cache_dir or default_cache_dir(os.environ),
            report=lambda line: print(line, file=sys.stderr),
        )
    else:
        seen = replay(record)
    if seen.cut_bytes:
        print(f"the record was cut off: its last {seen.cut_bytes} bytes are no whole step and are left out")
    print(
        f"{seen.steps} steps, {seen.tokens} tokens, {seen.preempted} preemptions, {seen.aborted} aborts: "
        f"every plan is the same (digest {seen.digest})"
    )
    if sampled is not None:
        print(f"{sampled} tokens were sampled again: every one is the same")
    return 0
