"""What `latency` and `throughput` measure: the engine in process, without HTTP.

The engine is given to their `run`, so that they measure anything with `generate` and `close`.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from jaxserve.bench.options import recorded
from jaxserve.outputs import RequestOutput
from scheduler.types import SamplingParams


class BenchEngine(Protocol):
    """What is measured."""

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
        *,
        progress: bool | None = None,
    ) -> Sequence[RequestOutput]:
        """Continue prompts, each a text or token ids; one output per prompt, in their order.

        `sampling` is for all, or one each; `progress` None shows a progress bar where there is a terminal.
        """
        ...

    def close(self) -> None:
        """Give back everything."""
        ...


MakeEngine = Callable[..., BenchEngine]
"""`Engine(model, **options)`."""


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, options of the engine, and where the report goes."""
    parser.add_argument("model", help="what `jaxserve serve` takes")
    parser.add_argument(
        "--engine",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of Engine, e.g. max_num_seqs=64; repeat it for more",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here, too")
    parser.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def engine_options(words: Sequence[str]) -> dict[str, Any]:
    """Options of `--engine NAME=VALUE`; a value is JSON where it can be read as such, and else text.

    Raises:
        ValueError: no "=", or a name that is none.
    """
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier():
            raise ValueError(f"--engine {word!r} is not NAME=VALUE")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def count_output_tokens(outputs: Sequence[RequestOutput]) -> int:
    """Generated tokens of all sequences."""
    return sum(len(sequence.token_ids) for output in outputs for sequence in output.outputs)


def write_report(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write the results as JSON where `--json` says; nothing where it was not given."""
    if args.json:
        report = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "arguments": recorded(args),
        } | results
        args.json.write_text(json.dumps(report, indent=2) + "\n")
