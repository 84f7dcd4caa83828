"""What `--deterministic` costs, and what it gives: two engines in one process, asked by turns.

Prints the wall time of each mode and the median of the ratios of neighbouring turns, then how many answers
have other bits among others than alone, in each mode.
"""

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax

from jaxserve import Engine, RequestOutput, SamplingParams
from jaxserve.bench.tables import grid

PAGES = 1_200
SEQS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to use an engine; `unit` is what `count` of a turn's time is divided by."""

    name: str
    unit: str
    count: int
    run: Callable[[Engine], object]


def decodes(rows: int, tokens: int) -> Callable[[Engine], object]:
    """So many sequences at once, each of so many tokens."""
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    prompts = [[100 + row] * 16 for row in range(rows)]
    return lambda engine: engine.generate(prompts, sampling)


def prefill(tokens: int) -> Callable[[Engine], object]:
    """A prompt that no cache holds."""
    prompt = [7 + place % 1_000 for place in range(tokens)]

    def run(engine: Engine) -> None:
        asyncio.run(engine.reset_prefix_cache())
        engine.generate(prompt, SamplingParams(max_tokens=1))

    return run


CASES = (
    Case(name="decode, 1 sequence", unit="ms per token", count=48, run=decodes(1, 48)),
    Case(name="decode, 16 sequences", unit="ms per step", count=24, run=decodes(16, 24)),
    Case(name="prompt of 1,024 tokens", unit="ms", count=1, run=prefill(1_024)),
)


def differing(engine: Engine, requests: int) -> int:
    """Of so many answers, those that have other tokens or log-probabilities among others than alone."""

    def bits(output: RequestOutput) -> object:
        return [(one.token_ids, one.logprobs) for one in output.outputs]

    sampling = SamplingParams(max_tokens=24, temperature=0.8, seed=1, logprobs=2, ignore_eos=True)
    prompts = [[300 + number] * (5 * number + 3) for number in range(requests)]
    alone = [bits(engine.generate(prompt, sampling)[0]) for prompt in prompts]
    asyncio.run(engine.reset_prefix_cache())
    together = [bits(output) for output in engine.generate(prompts, sampling)]
    return sum(one != other for one, other in zip(alone, together, strict=True))


def main() -> int:
    """Runs the cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each mode (default %(default)s)")
    parser.add_argument("--max-num-batched-tokens", type=int, metavar="N",
        help="of the deterministic engine: the one shape that all its steps have")  # fmt: skip
    args = parser.parse_args()
    with (
        Engine(args.model, num_pages=PAGES, max_num_seqs=SEQS) as normal,
        Engine(
            args.model,
            deterministic=True,
            num_pages=PAGES,
            max_num_seqs=SEQS,
            max_num_batched_tokens=args.max_num_batched_tokens,
        ) as deterministic,
    ):
        budgets = [engine.config.token_budget for engine in (normal, deterministic)]
        print(f"JAX {jax.__version__}, {os.cpu_count()} cores, steps of up to {budgets[0]} tokens; ", end="")
        print(f"deterministic: of {budgets[1]}")
        lines = [("", "normal", "deterministic", "ratio")]
        for case in CASES:
            seconds: tuple[list[float], list[float]] = ([], [])
            for engine in (normal, deterministic):
                case.run(engine)
            for _ in range(args.rounds):
                for engine, taken in zip((normal, deterministic), seconds, strict=True):
                    began = time.perf_counter()
                    case.run(engine)
                    taken.append((time.perf_counter() - began) / case.count)
            ratio = statistics.median(slow / fast for fast, slow in zip(*seconds, strict=True))
            medians = [f"{statistics.median(taken) * 1e3:.1f}" for taken in seconds]
            lines.append((f"{case.name}, {case.unit}", *medians, f"{ratio:.2f}"))
        print(grid(lines))
        for name, engine in (("normal", normal), ("deterministic", deterministic)):
            print(f"{name}: {differing(engine, 16)} of 16 answers differ from those that were given alone")
    return 0


if __name__ == "__main__":
    sys.exit(main())
