"""`jaxserve simulate`: recorded traffic through engines that nobody has."""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from jaxserve.bench.options import at_least, rate
from jaxserve.bench.stats import Slo
from jaxserve.config import ConfigError
from jaxserve.sim.costs import CostError, read_table
from jaxserve.sim.plot import report_figure
from jaxserve.sim.report import Report, comparison_text, report_json, report_text
from jaxserve.sim.traffic import BLOCK_TOKENS, Trace, TraceError, read_trace
from jaxserve.sim.what_if import simulate


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Mounts the command."""
    parser = commands.add_parser(
        "simulate",
        help="replay recorded traffic through simulated engines",
        description="Replay recorded traffic through the production scheduler, prefix cache and transfer "
        "protocol of any number of engines, on a virtual clock, with measured costs of steps and transfers. "
        "Several numbers after --prefill or --decode compare all combinations.",
    )
    _add_trace_arguments(parser)
    parser.set_defaults(run=_simulate)


def _add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("traffic").add_argument
    add("--trace", type=Path, metavar="FILE",
        help="a record of `jaxserve serve --record`, JSON lines in Mooncake's open trace format, or a report "
        "of `jaxserve bench serve --json FILE --save-detailed`")  # fmt: skip
    add("--trace-block-size", type=at_least(1), default=BLOCK_TOKENS, metavar="N",
        help="tokens per hash id of JSON lines (default: %(default)s)")  # fmt: skip
    add("--speed", type=rate, default=1.0, metavar="X", help="send requests X times as fast (default: 1)")
    add("--num-prompts", type=at_least(1), metavar="N", help="only the first N requests")
    add = parser.add_argument_group("engines").add_argument
    add("--prefill", type=at_least(0), nargs="+", default=[1], metavar="N",
        help="engines that compute prompts; 0: every engine computes its own (default: 1)")  # fmt: skip
    add("--decode", type=at_least(1), nargs="+", default=[1], metavar="M",
        help="engines that generate (default: 1)")  # fmt: skip
    add("--step-cost", type=Path, metavar="TABLE",
        help="what steps and transfers cost, from `jaxserve bench steps`")  # fmt: skip
    add = parser.add_argument_group("report").add_argument
    add("--ttft-slo", type=rate, metavar="MS", help="goodput counts requests with a first token by then")
    add("--itl-slo", type=rate, metavar="MS",
        help="and with so long between their tokens, on average per request")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write the report here, with every request")
    add("--plot", type=Path, metavar="FILE", help="draw it, as SVG")
    add("--disable-tqdm", action="store_true", help="no progress bar")


def _simulate(args: argparse.Namespace) -> int:
    if args.trace is None or args.step_cost is None:
        raise ConfigError("--trace and --step-cost say what is simulated: both are needed")
    try:
        trace = read_trace(args.trace, block_tokens=args.trace_block_size).faster(args.speed)
        if args.num_prompts is not None:
            trace = trace.first(args.num_prompts)
        reports = _run(args, trace)
        _write(args, reports)
    except (TraceError, CostError) as error:
        raise ConfigError(str(error)) from error
    return 0


def _run(args: argparse.Namespace, trace: Trace) -> list[Report]:
    """One report per combination of --prefill and --decode, printed as it is done."""
    table, slo = read_table(args.step_cost), _slo(args)
    engine, machine = table.engine, table.machine
    print(
        f"{trace.source}: {len(trace.arrivals):,} requests in {trace.duration_s:,.1f} s, "
        f"{trace.prompt_tokens:,} prompt tokens, {trace.output_tokens:,} output tokens"
        + (f" ({trace.left_out:,} left out)" if trace.left_out else "")
    )
    print(f"{engine.model} in {engine.dtype} on {machine.cores} cores of {machine.processor}")
    reports = []
    for prefill, decode in dict.fromkeys(itertools.product(args.prefill, args.decode)):
        with tqdm(total=len(trace.arrivals), unit="req", disable=args.disable_tqdm, leave=False) as bar:
            reports.append(simulate(trace, table, prefill=prefill, decode=decode, slo=slo, done=bar.update))
        print(f"\n{report_text(reports[-1])}")
    if len(reports) > 1:
        print(f"\n{comparison_text(reports)}")
    return reports


def _slo(args: argparse.Namespace) -> Slo | None:
    """The bounds, from milliseconds; None: no goodput is wanted."""
    if args.ttft_slo is None and args.itl_slo is None:
        return None
    ttft, itl = (None if bound is None else bound / 1e3 for bound in (args.ttft_slo, args.itl_slo))
    return Slo(ttft=ttft, tpot=itl)


def _write(args: argparse.Namespace, reports: Sequence[Report]) -> None:
    """The files that were asked for.

    Raises:
        ConfigError: one cannot be written.
    """
    wanted = (
        (args.json, lambda: json.dumps([report_json(report) for report in reports], indent=1) + "\n"),
        (args.plot, lambda: report_figure(reports)),
    )
    for path, content in wanted:
        if path is None:
            continue
        try:
            path.write_text(content())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
