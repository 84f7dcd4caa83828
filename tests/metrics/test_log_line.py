import pytest

from metrics.engine import EngineStats
from metrics.log_line import format_log_line, was_busy
from metrics.observe import observe_step
from metrics.records import Gauges, StepRecord

EMPTY = EngineStats.empty(2048)


def test_the_line_says_what_happened_in_the_interval() -> None:
    before = observe_step(
        EMPTY,
        StepRecord(
            gauges=Gauges(), prompt_tokens=999, generation_tokens=99, prefix_queries=1000, prefix_hits=1000
        ),
    )
    after = observe_step(
        before,
        StepRecord(
            gauges=Gauges(
                running=3, waiting_capacity=1, waiting_deferred=1, pages_used=125, pages_total=1000
            ),
            prompt_tokens=1234,
            recomputed_tokens=500,
            generation_tokens=56,
            prefix_queries=1600,
            prefix_hits=400,
        ),
    )
    assert format_log_line(before, after, 10.0) == (
        "Engine 000: Avg prompt throughput: 123.4 tokens/s, Avg generation throughput: 5.6 tokens/s, "
        "Running: 3 reqs, Waiting: 2 reqs, GPU KV cache usage: 12.5%, Prefix cache hit rate: 25.0%"
    )


def test_preemptions_and_connector_hits_are_told_when_there_are_any() -> None:
    step = StepRecord(
        gauges=Gauges(), preemptions=2, external_queries=40, external_hits=(("host", 10), ("p2p", 20))
    )
    line = format_log_line(EMPTY, observe_step(EMPTY, step), 10.0, engine=12)
    assert line.startswith("Engine 012: ")
    assert ", Preemptions: 2, " in line
    assert line.endswith(", External prefix cache hit rate: 75.0%")


@pytest.mark.parametrize("elapsed_s", [0.0, -1.0])
def test_no_time_and_no_lookups_divide_nothing(elapsed_s: float) -> None:
    after = observe_step(EMPTY, StepRecord(gauges=Gauges(), prompt_tokens=5, generation_tokens=5))
    line = format_log_line(EMPTY, after, elapsed_s)
    assert "Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: 0.0 tokens/s" in line
    assert "Prefix cache hit rate: 0.0%" in line


@pytest.mark.parametrize(
    "step",
    [
        StepRecord(gauges=Gauges(), prompt_tokens=1),
        StepRecord(gauges=Gauges(), recomputed_tokens=1),
        StepRecord(gauges=Gauges(), generation_tokens=1),
        StepRecord(gauges=Gauges(running=1)),
        StepRecord(gauges=Gauges(waiting_capacity=1)),
        StepRecord(gauges=Gauges(waiting_deferred=1)),
    ],
)
def test_an_interval_with_work_is_busy(step: StepRecord) -> None:
    assert was_busy(EMPTY, observe_step(EMPTY, step))


def test_an_interval_without_work_is_not_busy() -> None:
    done = observe_step(EMPTY, StepRecord(gauges=Gauges(running=1), prompt_tokens=5, generation_tokens=5))
    idle = observe_step(done, StepRecord(gauges=Gauges(pages_total=9)))
    assert was_busy(EMPTY, idle)
    assert not was_busy(idle, idle)
