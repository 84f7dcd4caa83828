"""Measuring steps finds what they cost, on devices whose costs are known."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from jaxserve.batch import Bucket, choose, decode_buckets, mixed_buckets
from jaxserve.bench.steps import (
    Shape,
    machine,
    measure_host,
    measure_steps,
    rows_of,
    shapes_of,
    table_text,
)
from jaxserve.cli import main
from jaxserve.dispatch import Executed, Pending, PromptSpan, SlotSetup
from jaxserve.sim.costs import BucketCost, read_table, step_clock
from jaxserve.sim.timed import Wordless
from scheduler.types import Limits, Outcome, Plan, SchedulerConfig
from tests.sim.tables import ROWS, TOKENS, table

BUCKETS = decode_buckets(ROWS) + mixed_buckets(TOKENS, ROWS)


class KnownDevice:
    """Its clock shows what its steps have taken; the first of each kind takes ten times as long."""

    def __init__(self) -> None:
        self.buckets = BUCKETS
        self.now = 0.0
        self.failing = False
        self.step_ids: list[int] = []
        self._seconds = step_clock(replace(table(), host_s=0.0, host_row_s=0.0))
        self._seen: set[tuple[int, ...]] = set()
        self._plan: Plan | None = None

    def start(self, plan: Plan, setups: Sequence[SlotSetup], spans: Sequence[PromptSpan]) -> Pending:
        self._plan = plan
        self.step_ids.append(plan.step_id)
        return Pending(step_id=plan.step_id, rows=len(plan.rows), sampled=None)

    def wait(self, pending: Pending) -> Executed:
        assert self._plan is not None
        rows = self._plan.rows
        kind = (*rows.starts.tolist(), *rows.lens.tolist())
        self.now += self._seconds(rows) * (1 if kind in self._seen else 10)
        self._seen.add(kind)
        error = "out of memory" if self.failing else None
        outcome = Outcome(step_id=pending.step_id, tokens=np.zeros(len(rows), np.int32), error=error)
        return Executed(outcome=outcome, sampled=None)

    def clock(self) -> float:
        return self.now


def measure(device: KnownDevice) -> list[BucketCost]:
    shapes = [shape for bucket in BUCKETS for shape in shapes_of(bucket, (16, 100), max_len=128)]
    return measure_steps(device, shapes, page_size=4, num_pages=33, repetitions=3, clock=device.clock)


def test_what_was_measured_is_what_the_device_takes():
    device = KnownDevice()
    costs = measure(device)
    assert len(set(device.step_ids)) == len(device.step_ids)
    assert [(own.tokens, own.rows) for own in costs] == [(own.tokens, own.rows) for own in BUCKETS]
    for own in costs:
        assert own.worst_error < 1e-6 and own.points
        assert own.base_s == pytest.approx(own.tokens / 1000)
        assert own.by_context_s == pytest.approx(1e-5)
    assert costs[-1].by_pair_s == pytest.approx(1e-6, rel=1e-3)


def test_a_step_that_fails_ends_the_measurement():
    device = KnownDevice()
    device.failing = True
    with pytest.raises(RuntimeError, match="out of memory"):
        measure(device)


@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
def test_every_shape_runs_in_its_bucket_within_the_model(bucket):
    shapes = shapes_of(bucket, (1, 16, 100, 5000), max_len=128)
    assert len({shape.rows for shape in shapes}) == len(shapes) >= 2
    for shape in shapes:
        rows = rows_of(shape, page_size=4, num_pages=9)
        assert choose(BUCKETS, rows) == bucket
        assert int((rows.starts + rows.lens).max()) <= 128
        (pages,) = rows.page_tables
        for row, end in enumerate(rows.starts + rows.lens):
            used = -(-int(end) // 4)
            assert (pages[row, :used] >= 1).all() and (pages[row, :used] < 9).all()
            assert not pages[row, used:].any()


def test_rows_have_pages_of_their_own_where_the_pool_has_them():
    shape = Shape(bucket=Bucket(tokens=4, rows=4), rows=((7, 1),) * 4)
    pages = rows_of(shape, page_size=4, num_pages=9).page_tables[0]
    assert sorted(pages.ravel().tolist()) == list(range(1, 9))


def test_the_host_takes_something_even_where_steps_take_nothing():
    scheduler = SchedulerConfig(page_size=4, num_pages=200, max_num_seqs=ROWS, max_model_len=128)
    limits = Limits(max_num_batched_tokens=TOKENS, max_num_seqs=ROWS)
    fixed, per_row = measure_host(scheduler, limits, tokenizer=Wordless())
    assert min(fixed, per_row) >= 0 and fixed + per_row > 0


def test_a_table_is_printed_with_all_its_parts():
    text = table_text(table())
    assert "4 tokens, 4 rows" in text and "host: 250 per step, 500 per row" in text
    assert "per message" in text and "for a router" in text
    assert machine().cores >= 1 and machine().processor


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--output", "costs.json", "--engine", "max_num_seqs"], "is not NAME=VALUE"),
        (["--output", "costs.json", "--engine", "max_num_seqs=0"], "--max-num-seqs"),
        (["--output", "costs.json", "--engine", "wings=2"], "wings"),
        (["--output", "nowhere/costs.json"], "there is no folder nowhere"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_loaded(tmp_path, monkeypatch, capsys, given, complaint):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "steps", "no-such-model", *given]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_model_is_measured_and_its_table_simulates(tmp_path, capsys):
    costs, traffic = tmp_path / "costs.json", tmp_path / "traffic.jsonl"
    options = ("max_num_seqs=2", "max_num_batched_tokens=32", "num_pages=64", "max_model_len=256")
    flags = [word for option in options for word in ("--engine", option)]
    given = ["--output", str(costs), "--contexts", "16", "100", "--repetitions", "1", "--disable-tqdm"]
    assert main(["bench", "steps", "smollm2", *given, *flags]) == 0
    measured = read_table(costs)
    assert [(own.tokens, own.rows) for own in measured.buckets] == [(2, 2), (32, 2)]
    assert all(own.base_s > 0 for own in measured.buckets) and measured.host_s + measured.host_row_s > 0
    line = {"timestamp": 0, "input_length": 40, "output_length": 4, "hash_ids": [1]}
    traffic.write_text(json.dumps(line))
    simulated = ["--trace", str(traffic), "--step-cost", str(costs), "--disable-tqdm"]
    assert main(["simulate", *simulated, "--prefill", "0"]) == 0
    assert "1 alone" in capsys.readouterr().out
    assert main(["simulate", *simulated]) == 2
    assert "what a transfer costs" in capsys.readouterr().err
