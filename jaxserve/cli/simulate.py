"""`jaxserve simulate`: recorded traffic through engines that nobody has."""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from jaxserve import plot
from jaxserve.bench.options import at_least, rate
from jaxserve.bench.stats import Slo
from jaxserve.config import ConfigError
from jaxserve.plot import PlotError
from jaxserve.sim.costs import CostError, read_table
from jaxserve.sim.cover import thin
from jaxserve.sim.faults import NAMES
from jaxserve.sim.plot import report_charts
from jaxserve.sim.report import Report, comparison_text, report_json, report_text
from jaxserve.sim.seeds import run_seeds, summary_text
from jaxserve.sim.traffic import BLOCK_TOKENS, Trace, TraceError, read_trace
from jaxserve.sim.what_if import simulate


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Mounts the command."""
    parser = commands.add_parser(
        "simulate",
        help="search a simulated cluster for faults, or replay recorded traffic through one",
        description="The production scheduler, prefix cache, connectors and transfer protocol of any number "
        "of engines in one process, on a virtual clock. With --seeds, worlds are drawn and struck by faults, "
        "and every invariant is checked after every event. With --trace, recorded traffic is replayed with "
        "measured costs of steps and transfers; several numbers after --prefill or --decode compare all "
        "combinations.",
        epilog="P is an engine that computes prompts (prefill), D one that generates (decode). X1 to X46 "
        "number the faults that strike a world, I1 to I26 (of a router: R1 to R5) the invariants that must "
        "hold all the same: docs/testing.md says what each of them is.",
    )
    _add_seed_arguments(parser)
    _add_trace_arguments(parser)
    parser.set_defaults(run=_simulate)


def _add_seed_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("faults").add_argument
    add("--seeds", type=at_least(1), metavar="N", help="run N worlds under faults; exit 1 if a law is broken")
    add("--first-seed", type=at_least(0), default=0, metavar="S", help="the first of them (default: 0)")
    add("--events", type=at_least(1), default=2000, metavar="E",
        help="events of each world, before faults stop and all must end (default: %(default)s)")  # fmt: skip
    add("--jobs", type=at_least(1), metavar="J", help="processes (default: one per core)")
    add("--least", type=at_least(0), default=0, metavar="N",
        help="exit 1 if a fault has met requests in some state less than N times")  # fmt: skip


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
    add("--plot", type=Path, metavar="FILE", help="draw it, as PNG, SVG or PDF")
    add("--disable-tqdm", action="store_true", help="no progress bar")


def _simulate(args: argparse.Namespace) -> int:
    if args.seeds is not None:
        for flag, given in (("--trace", args.trace), ("--step-cost", args.step_cost), ("--json", args.json)):
            if given is not None:
                raise ConfigError(f"{flag} goes with recorded traffic, not with --seeds")
        return _search(args)
    if args.trace is None or args.step_cost is None:
        raise ConfigError("either --seeds, or --trace and --step-cost, say what is simulated")
    try:
        if args.plot is not None:
            plot.check_path(args.plot)
        trace = read_trace(args.trace, block_tokens=args.trace_block_size).faster(args.speed)
        if args.num_prompts is not None:
            trace = trace.first(args.num_prompts)
        reports = _run(args, trace)
        _write(args, reports)
    except (TraceError, CostError, PlotError) as error:
        raise ConfigError(str(error)) from error
    return 0


def _search(args: argparse.Namespace) -> int:
    """Worlds under faults. Returns the exit code."""
    summary = run_seeds(
        range(args.first_seed, args.first_seed + args.seeds),
        events=args.events,
        jobs=args.jobs,
        progress=not args.disable_tqdm,
    )
    print(summary_text(summary, least=args.least))
    return 1 if summary.failures or thin(summary.met, NAMES, args.least) else 0


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
        ConfigError: the report cannot be written.
        PlotError: nor the plot.
    """
    if args.json is not None:
        try:
            args.json.write_text(json.dumps([report_json(report) for report in reports], indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"{args.json}: {error.strerror}") from error
    if args.plot is not None:
        plot.write(args.plot, report_charts(reports))
