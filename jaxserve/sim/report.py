"""What came of simulated traffic: latencies, goodput, busy engines, and where prompt tokens came from.

Latencies and goodput have the meaning of `jaxserve bench serve` (`jaxserve/bench/stats.py`), so that a
simulated report and a measured one can be laid side by side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.bench.stats import RequestRecord, Slo, Summary, as_json, summarize
from jaxserve.bench.tables import grid, number, summary_table
from metrics.stats import PromptTokenStats

SOURCES = {
    "local_compute": "computed here",
    "local_cache_hit": "cached here",
    "external_kv_transfer": "from elsewhere",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineUse:
    """One engine over a run.

    Attributes:
        role: "prefill", "decode", or "engine" where each does both.
        steps: how many it ran.
        busy_s: seconds in steps.
        sources: of the prompt tokens of its requests.
        preempted: sequences that lost their pages to others.
    """

    role: str
    steps: int
    busy_s: float
    sources: PromptTokenStats
    preempted: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run of a trace through some engines.

    Attributes:
        label: of the configuration, as "1P + 2D".
        records: one per request of the trace, in its order.
        duration_s: from the first arrival to the last token.
        engines: every one of them.
        slo: None: no goodput is counted.
    """

    label: str
    records: tuple[RequestRecord, ...]
    duration_s: float
    engines: tuple[EngineUse, ...]
    slo: Slo | None = None

    @property
    def summary(self) -> Summary:
        """Latencies and rates."""
        return summarize(self.records, self.duration_s, self.slo)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that occur."""
        return tuple(dict.fromkeys(engine.role for engine in self.engines))

    def of(self, role: str) -> tuple[EngineUse, ...]:
        """The engines of a role."""
        return tuple(engine for engine in self.engines if engine.role == role)

    def busy(self, role: str) -> float:
        """The share of the time that engines of a role spend in steps, on average."""
        own = self.of(role)
        return sum(engine.busy_s for engine in own) / (len(own) * self.duration_s)

    def sources(self, role: str) -> PromptTokenStats:
        """Where the prompt tokens of a role's requests came from. Roles are never added up: prefill and
        decode engines see the same prompts."""
        total = PromptTokenStats.empty()
        for engine in self.of(role):
            total = total.merge(engine.sources)
        return total


def report_text(report: Report) -> str:
    """One run as a table for a terminal."""
    lines = [summary_table(report.label, report.summary), ""]
    heading = ["engines", "busy", "steps", "preempted", "prompt tokens", *SOURCES.values()]
    rows = [heading]
    for role in report.roles:
        own, sources = report.of(role), report.sources(role)
        steps, preempted = sum(engine.steps for engine in own), sum(engine.preempted for engine in own)
        row = [f"{len(own)} {role}", f"{report.busy(role):.0%}", f"{steps:,}", f"{preempted:,}"]
        row += [f"{sources.total:,}", *(_share(sources.get(source), sources.total) for source in SOURCES)]
        rows.append(row)
    return "\n".join([*lines, grid(rows)])


def comparison_text(reports: Sequence[Report]) -> str:
    """Several configurations, a line each."""
    with_goodput = any(report.slo is not None for report in reports)
    heading = ["milliseconds", "TTFT p50", "p90", "p99", "ITL p50", "p90", "p99"]
    heading += ["requests/s", *(["goodput"] if with_goodput else []), "busy"]
    rows = [heading]
    for report in reports:
        summary = report.summary
        spreads = [part.at(percentile) for part in (summary.ttft, summary.itl) for percentile in (50, 90, 99)]
        row = [report.label, *(number(value * 1e3) for value in spreads), number(summary.request_throughput)]
        row += [number(summary.goodput)] if with_goodput else []
        rows.append([*row, " ".join(f"{role} {report.busy(role):.0%}" for role in report.roles)])
    return grid(rows)


def report_json(report: Report) -> Mapping[str, Any]:
    """One run as plain JSON values, every request included."""
    return {
        "label": report.label,
        "summary": as_json(report.summary),
        "slo": None if report.slo is None else {"ttft": report.slo.ttft, "tpot": report.slo.tpot},
        "roles": {
            role: {
                "engines": len(report.of(role)),
                "busy": report.busy(role),
                "prompt_tokens": report.sources(role).total,
                "by_source": report.sources(role).by_source(),
            }
            for role in report.roles
        },
        "engines": [
            {
                "role": engine.role,
                "steps": engine.steps,
                "busy_s": engine.busy_s,
                "preempted": engine.preempted,
                "by_source": engine.sources.by_source(),
            }
            for engine in report.engines
        ],
        "requests": as_json(report.records),
    }


def _share(part: int, total: int) -> str:
    return f"{part:,} ({part / total:.0%})" if total else f"{part:,}"
