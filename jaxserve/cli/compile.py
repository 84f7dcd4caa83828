"""`jaxserve compile`: the compile plan, built into the persistent cache and shown."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxserve.assemble import Draft, draft
from jaxserve.bench.tables import grid
from jaxserve.cli.flags import add_engine, add_model, engine_config, model_of
from jaxserve.compiling import Built, build_all, enable_compilation_cache
from jaxserve.config import ConfigError
from jaxserve.shapes import Shape, waste_of
from jaxserve.weights.smollm2 import default_cache_dir

DESCRIPTION = """\
Compile every shape that `jaxserve serve` with the same MODEL and flags compiles before it is ready, into the
persistent cache of compiled programs, so that its start need not. Reads the model's configuration and no
weights, and allocates no pages.

--list prints a line per shape. Known without compiling (--dry-run stops there): kind, rows, tokens, pages
(width of the page table) and padding (the part of a step's tokens that is none, for the smallest batch that
fits no smaller shape, and on average). Known after compiling: bytes of arguments, outputs and temporaries,
bytes that are updated in place (of a step: the page buffer and the slots' state), and seconds to lower and to
compile, or to read what was cached.

decode: a step of one token per row. mixed: a step that holds prompt chunks. slot: gives a slot to a sequence.
rows, logprobs: log-probabilities of prompt tokens."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Mounts the command."""
    parser = commands.add_parser(
        "compile",
        help="compile every shape ahead, and show the plan",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    parser.add_argument("--list", action="store_true", help="print a table with a line per shape")
    parser.add_argument("--dry-run", action="store_true", help="compile nothing; with --list: print the plan")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan here, too")
    add_engine(parser)
    parser.set_defaults(run=lambda args: _compile(args, parser))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Line:
    """One shape of the plan as people and programs read it; see DESCRIPTION.

    Attributes:
        built: None: it was not compiled.
        waste: worst and mean padding of a step, 0 to 1; None: no step.
    """

    shape: Shape
    pages: int | None
    waste: tuple[float, float] | None
    built: Built | None

    def values(self) -> dict[str, Any]:
        """For JSON; what is not known is left out."""
        values: dict[str, Any] = {
            "kind": self.shape.kind,
            "rows": self.shape.rows,
            "tokens": self.shape.tokens,
        }
        if self.pages is not None and self.waste is not None:
            values |= {
                "pages": self.pages,
                "padding_worst": round(self.waste[0], 4),
                "padding_mean": round(self.waste[1], 4),
            }
        if (built := self.built) is not None:
            values |= {
                "argument_bytes": built.argument_bytes,
                "output_bytes": built.output_bytes,
                "temporary_bytes": built.temp_bytes,
                "alias_bytes": built.alias_bytes,
                "in_place": built.in_place,
                "lower_s": round(built.lower_s, 3),
                "compile_s": round(built.compile_s, 3),
                "cached": built.cached,
            }
        return values


def _compile(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    config = engine_config(args, model_of(args, parser))
    if args.json is not None and not args.json.parent.is_dir():
        raise ConfigError(f"--json: there is no folder {args.json.parent}")
    if args.dry_run and not (args.list or args.json):
        raise ConfigError("--dry-run does nothing without --list or --json")
    cache_dir = config.cache_dir or default_cache_dir(os.environ)
    planned = draft(config, cache_dir, _say)
    built: dict[Shape, Built] = {}
    seconds = 0.0
    if not args.dry_run:
        enable_compilation_cache(cache_dir / "compiled")
        began = time.perf_counter()
        built = build_all(planned.blueprint, planned.plan, _show)
        seconds = time.perf_counter() - began
    lines = lines_of(planned, built)
    if args.list:
        print(table(lines))
    total = totals(planned, lines, seconds)
    print(summary(total))
    if args.json is not None:
        report = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": config.names[0],
            "dtype": planned.dtype,
            "totals": total,
            "shapes": [line.values() for line in lines],
        }
        try:
            args.json.write_text(json.dumps(report, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"--json {args.json}: {error.strerror}") from error
    return 0


def lines_of(planned: Draft, built: dict[Shape, Built]) -> list[Line]:
    """The plan, shape by shape."""
    lines = []
    for shape in planned.plan:
        bucket, pages, waste = shape.bucket, None, None
        if bucket is not None:
            found = waste_of(bucket, planned.buckets)
            pages, waste = planned.blueprint.max_pages, (found.worst, found.mean)
        lines.append(Line(shape=shape, pages=pages, waste=waste, built=built.get(shape)))
    return lines


def totals(planned: Draft, lines: Sequence[Line], seconds: float) -> dict[str, Any]:
    """What the plan takes as a whole; a compiler's threads make more seconds than pass."""
    blueprint = planned.blueprint
    built = [line.built for line in lines if line.built is not None]
    values: dict[str, Any] = {
        "shapes": len(lines),
        "weight_bytes": blueprint.weight_bytes,
        "page_buffer_bytes": blueprint.pool_bytes,
        "slot_bytes": blueprint.donated_bytes - blueprint.pool_bytes,
    }
    if built:
        values |= {
            "in_place": all(each.in_place for each in built),
            "largest_temporary_bytes": max(each.temp_bytes for each in built),
            "cached": sum(each.cached for each in built),
            "lower_s": round(sum(each.lower_s for each in built), 3),
            "compile_s": round(sum(each.compile_s for each in built), 3),
            "elapsed_s": round(seconds, 3),
        }
    return values


def summary(total: dict[str, Any]) -> str:
    """The totals in a few lines."""
    held = (
        f"{total['shapes']} shapes; weights {_size(total['weight_bytes'])}, "
        f"page buffer {_size(total['page_buffer_bytes'])}, slots {_size(total['slot_bytes'])}"
    )
    if "elapsed_s" not in total:
        return held
    place = (
        "every step updates pages and slots in place"
        if total["in_place"]
        else "a step copies the page buffer: where peers or host tiers write into it, a server will not start"
    )
    return (
        f"{held}, largest temporaries {_size(total['largest_temporary_bytes'])}\n{place}\n"
        f"{total['cached']} of {total['shapes']} were cached; {total['elapsed_s']:.1f} s, of which "
        f"{total['lower_s']:.1f} s to lower one by one, {total['compile_s']:.1f} s to compile in threads"
    )


def table(lines: Sequence[Line]) -> str:
    """A line per shape for a terminal."""
    rows = [["kind", "rows", "tokens", "pages", "worst padding", "mean padding"]]
    compiled = any(line.built is not None for line in lines)
    if compiled:
        rows[0] += ["arguments", "outputs", "in place", "temporaries", "lower, s", "compile, s"]
    for line in lines:
        shape = line.shape
        cells = [
            shape.kind,
            str(shape.rows),
            str(shape.tokens),
            "-" if line.pages is None else str(line.pages),
        ]
        cells += ["-", "-"] if line.waste is None else [f"{part:.0%}" for part in line.waste]
        if (built := line.built) is not None:
            kept = (built.argument_bytes, built.output_bytes, built.alias_bytes, built.temp_bytes)
            cells += [_size(count) for count in kept]
            spent = f"{built.compile_s:.2f}"
            cells += [f"{built.lower_s:.2f}", f"cached, {spent}" if built.cached else spent]
        rows.append(cells)
    return grid(rows)


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.2f} GiB"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(done: Iterable[Shape], total: int) -> Iterable[Shape]:
    """A progress bar in a terminal, and a line per shape elsewhere."""
    if sys.stderr.isatty():
        yield from tqdm(done, total=total, desc="compiling", unit="shape")
        return
    for count, shape in enumerate(done, 1):
        _say(f"compiled {count} of {total} shapes: {shape.kind}, {shape.rows} rows, {shape.tokens} tokens")
        yield shape
