"""Command-line words shared by the benchmarks, and their values."""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxserve.bench.datasets import VOCABULARY, Prompt, random_prompts, read_prompts, shared_prefix_prompts
from jaxserve.bench.stats import Slo

SLO_NAMES = ("ttft", "tpot", "e2el")


def at_least(low: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least `low`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        return value

    parse.__name__ = "integer"
    return parse


def rate(text: str) -> float:
    """An argparse type: requests per second, or inf."""
    value = float(text)
    if math.isnan(value) or value <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def json_object(text: str) -> dict[str, Any]:
    """An argparse type: a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return value


def slo_of(words: Sequence[str] | None) -> Slo | None:
    """The SLO of `--goodput ttft:200 tpot:50`, in milliseconds there; None where it was not given.

    Raises:
        ValueError: an unknown name, or no positive number.
    """
    if not words:
        return None
    bounds: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition(":")
        if name not in SLO_NAMES:
            raise ValueError(f"--goodput: {word!r} does not begin with one of {', '.join(SLO_NAMES)}")
        try:
            bounds[name] = float(value) / 1e3
        except ValueError:
            bounds[name] = math.nan
        if not bounds[name] > 0:
            raise ValueError(f"--goodput: {word!r} needs a positive number of milliseconds")
    return Slo(**bounds)


def add_dataset_arguments(parser: argparse.ArgumentParser, *, num_prompts: int) -> None:
    """Which prompts, how many, how long."""
    group = parser.add_argument_group("prompts")
    add = group.add_argument
    add(
        "--num-prompts",
        type=at_least(1),
        default=num_prompts,
        metavar="N",
        help="prompts in all (default: %(default)s)",
    )
    add(
        "--dataset-name",
        choices=("random", "shared-prefix", "file"),
        help="random token ids, random ones behind common beginnings, or a file "
        "(default: random, or file with --dataset-path)",
    )
    add(
        "--dataset-path",
        type=Path,
        metavar="FILE",
        help="text with a prompt per line, or .jsonl with prompt or messages",
    )
    add(
        "--input-len",
        type=at_least(1),
        default=256,
        metavar="N",
        help="tokens of a made prompt (default: %(default)s)",
    )
    add(
        "--output-len",
        type=at_least(1),
        default=128,
        metavar="N",
        help="tokens to generate (default: %(default)s)",
    )
    add(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="vary input lengths by +-R, 0 <= R < 1 (random)",
    )
    add(
        "--prefix-len",
        type=at_least(1),
        metavar="N",
        help="tokens in common (shared-prefix; default: half of --input-len)",
    )
    add(
        "--num-prefixes",
        type=at_least(1),
        default=1,
        metavar="N",
        help="different beginnings (shared-prefix; default: 1)",
    )
    add(
        "--vocab-range",
        type=at_least(0),
        nargs=2,
        default=VOCABULARY,
        metavar=("LOW", "HIGH"),
        help="made prompts take their token ids from here (default: {} {})".format(*VOCABULARY),
    )
    add("--ignore-eos", action="store_true", help="generate all --output-len tokens, whatever the model says")
    add("--seed", type=int, default=0, help="of prompts and arrival times (default: %(default)s)")


def prompts_of(args: argparse.Namespace) -> list[Prompt]:
    """The prompts that the dataset arguments describe.

    Raises:
        ValueError: arguments that contradict each other.
        OSError: the file cannot be read.
    """
    count, seed = args.num_prompts, args.seed
    name = args.dataset_name or ("file" if args.dataset_path else "random")
    if (name == "file") != (args.dataset_path is not None):
        raise ValueError("--dataset-path belongs to --dataset-name file, and that needs it")
    vocabulary = (args.vocab_range[0], args.vocab_range[1])
    if name == "file":
        return read_prompts(args.dataset_path, count, seed=seed)
    if name == "shared-prefix":
        return shared_prefix_prompts(
            count,
            args.input_len,
            prefix_len=args.prefix_len or max(1, args.input_len // 2),
            num_prefixes=args.num_prefixes,
            seed=seed,
            vocabulary=vocabulary,
        )
    ratio = args.random_range_ratio
    return random_prompts(count, args.input_len, seed=seed, range_ratio=ratio, vocabulary=vocabulary)


def recorded(args: argparse.Namespace, *, without: Sequence[str] = ()) -> Mapping[str, Any]:
    """The arguments as JSON types, for a report; secrets and functions left out."""
    plain = {name: value for name, value in vars(args).items() if name not in without and not callable(value)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}
