"""What a request is made of depends on its body, and on the clocks that were given."""

import json

import pytest

from jaxserve.server.prepare import UNKNOWN_LOG_INTERVAL_S, Preparer, facts_of
from tests.jaxserve.server.fake_engine import FakeEngine


def test_answers_and_log_lines_are_dated_by_the_clocks_given(caplog: pytest.LogCaptureFixture) -> None:
    engine, now_s = FakeEngine(), 5.0
    preparer = Preparer(engine, facts_of(engine), clock=lambda: now_s, wall_clock=lambda: 7e8 + now_s)
    body = json.dumps({"model": "fake", "prompt": "hi", "no_such_field": 1}).encode()
    lines = []
    for _ in range(4):
        assert preparer.completion(body).envelope.created == 700_000_000 + int(now_s)
        lines.append(sum("unknown request fields" in line for line in caplog.messages))
        now_s += UNKNOWN_LOG_INTERVAL_S / 2
    assert lines == [1, 1, 2, 2]
