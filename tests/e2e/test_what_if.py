"""What `jaxserve simulate --trace` says of a prefill and a decode server is what a real pair does.

The servers get a core each, as simulated engines have; client and router have what is left over. Costs are
measured at the pair itself, just before its traffic.
"""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.what_if import (
    BLOCK_TOKENS,
    Running,
    arguments,
    by_source,
    measure_costs,
    pair,
    send,
    traffic,
)
from jaxserve.bench.stats import summarize
from jaxserve.cli import main
from jaxserve.sim.traffic import read_trace
from tests.e2e.crowd import Usage

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1500)]

ATTEMPTS = 3
"""Each measures costs, sends traffic and simulates it: about a minute and a half."""
WITHIN = 0.15
BUSY, WITHIN_BUSY = 0.1, 0.75
"""Where others took more than such a share of the machine in every attempt, a server has no core of its own,
which a simulated engine has: real medians were then up to twice the simulated ones. There only a simulation
of something else counts."""
FLAGS = (
    *("--max-num-seqs", "4", "--max-num-batched-tokens", "128", "--num-pages", "512"),
    *("--requests", "30", "--rate", "1.0", "--repetitions", "5"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """Medians in seconds, (TTFT, ITL), and the share of the machine that others took meanwhile."""

    real: tuple[float, float]
    simulated: tuple[float, float]
    others: float

    @property
    def off(self) -> float:
        """How far the worse median is from the real one, as a share of it."""
        return max(abs(told / seen - 1) for told, seen in zip(self.simulated, self.real, strict=True))

    @property
    def shown(self) -> str:
        """The figures."""
        pairs = zip(("TTFT", "ITL"), self.real, self.simulated, strict=True)
        medians = ", ".join(
            f"{name} {seen * 1e3:.1f} ms, simulated {told * 1e3:.1f}" for name, seen, told in pairs
        )
        return f"{medians}: {self.off:.0%} off, {self.others:.0%} of the machine taken by others"


def attempt(running: Running, folder: Path, seed: int) -> Attempt:
    """Costs, traffic, and the same traffic simulated; all that came of it must have been answered."""
    args = arguments([*FLAGS, "--seed", str(seed)])
    lines, costs, report = folder / "trace.jsonl", folder / "costs.json", folder / "report.json"
    before = Usage.now(*running.pids)
    measure_costs(args, running.urls, costs)
    lines.write_bytes(traffic(args.requests, args.rate, args.seed))
    trace = read_trace(lines, block_tokens=BLOCK_TOKENS)
    sources = by_source(running.urls[2])
    records, duration = asyncio.run(send(running.urls[0], trace))
    others = Usage.now(*running.pids).others_since(before)
    assert [record.error for record in records] == [None] * args.requests
    fetched = by_source(running.urls[2])["external_kv_transfer"] - sources["external_kv_transfer"]
    assert fetched > 0, "the traffic went through both"

    flags = ["--trace", str(lines), "--trace-block-size", str(BLOCK_TOKENS), "--step-cost", str(costs)]
    flags += ["--prefill", "1", "--decode", "1", "--json", str(report), "--disable-tqdm"]
    assert main(["simulate", *flags]) == 0
    (told,) = json.loads(report.read_text())
    real = summarize(records, duration)
    return Attempt(
        real=(real.ttft.at(50), real.itl.at(50)),
        simulated=(told["summary"]["ttft"]["p50"], told["summary"]["itl"]["p50"]),
        others=others,
    )


def test_a_simulated_pair_is_as_fast_as_the_real_one(tmp_path: Path) -> None:
    attempts: list[Attempt] = []
    with pair(arguments(FLAGS)) as running:
        while len(attempts) < ATTEMPTS and not any(one.off <= WITHIN for one in attempts):
            folder = tmp_path / str(len(attempts))
            folder.mkdir()
            attempts.append(attempt(running, folder, seed=100 + len(attempts)))
            print(f"attempt {len(attempts)}: {attempts[-1].shown}")
    quiet = [one for one in attempts if one.others <= BUSY]
    best = min(one.off for one in quiet or attempts)
    assert best <= (WITHIN if quiet else WITHIN_BUSY), [one.shown for one in attempts]
