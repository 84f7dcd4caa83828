"""A world for the scheduler without a model: a device whose next token depends on every KV cell it reads.

The KV of position i is a hash of tokens 0..i. A query reads each cell that its group's window shows it and
checks it, so a wrong, stale or unwritten page is found at once; the next token is a hash of the prefix, so
the output of a request is known in advance, whatever the batching.
"""

import hashlib

import numpy as np

from jaxserve.sim.recount import Recount
from kv.types import DUMMY_PAGE
from metrics.stats import PrefillStats
from scheduler.state import check, initial_state
from scheduler.step import step
from scheduler.types import Inputs, Limits, Outcome, Plan, Request, SamplingParams, SchedulerConfig

VOCAB = 97


def cell(tokens, position: int) -> int:
    """What the KV cell of `position` must hold."""
    data = np.asarray(tokens[: position + 1], np.int32).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "little")


def next_token(tokens, index: int = 0) -> int:
    """What the device samples after `tokens`; the sequence's index stands for its seed."""
    return (cell(tokens, len(tokens) - 1) + 31 * index) % VOCAB


def expected_output(request: Request, max_model_len: int, index: int = 0) -> list[int]:
    """The output of a request served alone, without pages."""
    tokens, sampling = list(request.prompt_token_ids), request.sampling
    limit = max_model_len if sampling.max_tokens is None else len(tokens) + sampling.max_tokens
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(request.eos_token_ids))
    output: list[int] = []
    while len(tokens) < min(limit, max_model_len):
        tokens.append(next_token(tokens, index))
        output.append(tokens[-1])
        if output[-1] in stops and len(output) >= sampling.min_tokens:
            break
    return output


class World:
    """A scheduler, its fake device and an independent book of what happened."""

    def __init__(self, config: SchedulerConfig, limits: Limits) -> None:
        self.config, self.limits = config, limits
        self.state = initial_state(config)
        self.cells: list[dict[tuple[int, int], int]] = [{} for _ in config.windows]
        self.pending: Outcome | None = None
        self.plan: Plan | None = None
        self.requests: dict[str, Request] = {}
        self.slot_owner: dict[int, tuple[str, int]] = {}
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.finished: dict[tuple[str, int], object] = {}
        self.recount = Recount(config.page_size, windowed=any(config.windows))
        self.counts = {"preempted": 0, "admitted": 0, "rows": 0, "hits": 0}

    def step(self, **inputs) -> Plan:
        """One turn: decide, run on the fake device, keep the books, recount the laws."""
        for request in inputs.get("arrivals", ()):
            self.requests[request.request_id] = request
        previous, outcome = self.plan, self.pending
        self.pending = None
        given = Inputs(outcome=outcome, **inputs)
        self.state, plan = step(self.state, given, self.limits)
        check(self.state)
        self.recount.take(given, plan)
        self._keep_books(previous, plan)
        self.plan = plan
        if len(plan.rows):
            self.pending = self._execute(plan)
        return plan

    def run(self, bound: int = 2000) -> None:
        """Steps until nothing is left to do."""
        for _ in range(bound):
            plan = self.step()
            if not len(plan.rows) and not plan.gauges.waiting and not plan.gauges.running:
                return
        raise AssertionError(f"requests still live after {bound} steps: {plan.gauges}")

    @property
    def prefilled(self) -> dict[str, PrefillStats]:
        """Prompt statistics of the requests that got their first token."""
        return self.recount.prefilled

    def output(self, request_id: str, index: int = 0) -> list[int]:
        """Tokens accepted so far."""
        return self.tokens[request_id, index][len(self.requests[request_id].prompt_token_ids) :]

    def _keep_books(self, previous: Plan | None, plan: Plan) -> None:
        for slot, token in zip(plan.accepted.slots, plan.accepted.tokens, strict=True):
            self.tokens[self.slot_owner[int(slot)]].append(int(token))
        for entry in plan.finished:
            key = (entry.request_id, entry.index)
            assert key not in self.finished, "a sequence ended twice"
            self.finished[key] = entry
            if entry.slot is not None:
                assert self.slot_owner.pop(entry.slot) == key
        for entry in plan.preempted:
            assert self.slot_owner.pop(entry.slot) == (entry.request_id, entry.index)
        for entry in plan.admitted:
            key = (entry.request_id, entry.index)
            assert entry.slot not in self.slot_owner
            self.slot_owner[entry.slot] = key
            request = self.requests[entry.request_id]
            self.tokens.setdefault(key, list(request.prompt_token_ids))
            self.counts["hits"] += entry.hit_tokens
        self.counts["preempted"] += len(plan.preempted)
        self.counts["admitted"] += len(plan.admitted)
        self.counts["rows"] += len(plan.rows)

    def _execute(self, plan: Plan) -> Outcome:
        rows, place, sampled = plan.rows, 0, []
        assert int(rows.lens.sum()) <= self.limits.max_num_batched_tokens
        assert len(set(rows.slots.tolist())) == len(rows)
        assert (np.diff((rows.lens > 1).astype(int)) >= 0).all(), "decodes come first"
        written: set[tuple[int, int, int]] = set()
        for row in range(len(rows)):
            start, count = int(rows.starts[row]), int(rows.lens[row])
            key = self.slot_owner[int(rows.slots[row])]
            known = self.tokens[key]
            given = rows.tokens[place : place + count].tolist()
            place += count
            assert given == known[start : start + count], "the plan's tokens are not the sequence's"
            for position in range(start, start + count):
                self._attend(rows, row, known, position, written)
            assert bool(rows.samples[row]) == (start + count == len(known))
            assert rows.num_outputs[row] == len(known) - len(self.requests[key[0]].prompt_token_ids)
            sampled.append(next_token(known, key[1]) if rows.samples[row] else 0)
        return Outcome(step_id=plan.step_id, tokens=np.array(sampled, np.int32))

    def _attend(self, rows, row: int, known: list[int], position: int, written: set) -> None:
        size = self.config.page_size
        for group, (window, cells) in enumerate(zip(self.config.windows, self.cells, strict=True)):
            table = rows.page_tables[group][row]
            page, offset = int(table[position // size]), position % size
            assert page != DUMMY_PAGE
            assert (group, page, offset) not in written, "two rows write one cell"
            assert self.state.pages.refs[page] == 1 or cells.get((page, offset)) == cell(known, position), (
                "a shared page changes"
            )
            written.add((group, page, offset))
            cells[page, offset] = cell(known, position)
            for other in self.cells[:group] + self.cells[group + 1 :]:
                other.pop((page, offset), None)
            first = 0 if window is None else max(0, position - window + 1)
            for seen in range(first, position):
                held = cells.get((int(table[seen // size]), seen % size))
                assert held == cell(known, seen), f"position {position} reads a wrong cell at {seen}"


def request(request_id: str, prompt, **sampling) -> Request:
    """A request with the fake model's end token 96 and greedy defaults."""
    salt = sampling.pop("cache_salt", "")
    priority = sampling.pop("priority", 0)
    params = SamplingParams(temperature=0.0, **{"max_tokens": 8, **sampling})
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(int(token) for token in prompt),
        sampling=params,
        eos_token_ids=(VOCAB - 1,),
        cache_salt=salt,
        priority=priority,
    )
