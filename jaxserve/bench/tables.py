"""Tables for a terminal. Pure: values in, text out."""

import math
from collections.abc import Mapping, Sequence

from jaxserve.bench.stats import LATENCIES, Ratio, Spread, Summary

TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}
COMPARED = (
    ("request_throughput", "requests/s"),
    ("output_throughput", "output tokens/s"),
    ("goodput", "goodput, requests/s"),
    ("mean_ttft", "TTFT mean"),
    ("p99_ttft", "TTFT p99"),
    ("mean_tpot", "TPOT mean"),
    ("p99_tpot", "TPOT p99"),
    ("mean_itl", "ITL mean"),
    ("mean_e2el", "E2EL mean"),
)


def number(value: float | None, digits: int = 3) -> str:
    """A figure with about three significant digits, and no exponent."""
    if value is None or math.isnan(value):
        return "-"
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}"


def grid(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, the first row a heading; the first column aligned left, the others right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(cells)
        ).rstrip()
        for cells in ([*zip(row, widths, strict=True)] for row in rows)
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def summary_table(label: str, summary: Summary) -> str:
    """One endpoint: what it served, how fast, and its latencies in milliseconds."""
    requests = f"{summary.completed} requests in {number(summary.duration)} s"
    tokens = f"{summary.prompt_tokens:,} prompt tokens"
    if summary.cached_tokens is not None:
        tokens += f" ({summary.cached_tokens:,} cached)"
    tokens += f", {summary.output_tokens:,} output tokens"
    rates = f"{number(summary.request_throughput)} requests/s"
    rates += f", {number(summary.output_throughput)} output tokens/s"
    rates += f", {number(summary.total_throughput)} tokens/s"
    if summary.goodput is not None:
        rates += f", goodput {number(summary.goodput)} requests/s"
    measured: list[Spread] = [getattr(summary, name) for name in LATENCIES]
    heading = ["milliseconds", "mean", *(f"p{p}" for p, _ in measured[0].percentiles), "max"]
    rows = [
        [
            TITLES[name],
            *(number(value * 1e3) for value in (part.mean, *dict(part.percentiles).values(), part.max)),
        ]
        for name, part in zip(LATENCIES, measured, strict=True)
    ]
    lines = [label, f"  {requests}", f"  {tokens}", f"  {rates}"]
    if summary.failed:
        lines.append(f"  {summary.failed} FAILED")
        lines += [f"    {count} x {message}" for message, count in summary.errors[:5]]
    lines += ["  " + line for line in grid([heading, *rows]).splitlines()]
    return "\n".join(lines)


def ratio_table(base: str, compared: Mapping[str, Mapping[str, Ratio]]) -> str:
    """Endpoints against the first: ratio of all rounds, and the smallest and largest of a single round."""
    heading = [f"over {base}"] + [cell for label in compared for cell in (label, "rounds")]
    rows = [heading]
    for name, title in COMPARED:
        if all(name in of_label for of_label in compared.values()):
            cells = [(of_label[name].value, of_label[name].rounds) for of_label in compared.values()]
            rows.append(
                [title] + [part for value, rounds in cells for part in (number(value), _range(rounds))]
            )
    return grid(rows)


def _range(values: Sequence[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    return f"{number(min(known))}..{number(max(known))}" if known else "-"
