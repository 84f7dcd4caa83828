"""As `test_chaos`, where nobody stands still: killed, stopped and left in the middle of what they do.

P is met in the first half of a long prompt, D while it reads one, or while it generates and another waits.
"""

import os
import signal

import pytest

from tests.e2e.connectors.chaos import Call, assert_well, census, clear, continued, kill
from tests.e2e.connectors.fleet import ask, prefill, split_of, text_of, until
from tests.e2e.connectors.scenes import (
    HALF_STREAMED,
    KEEP,
    LONG,
    QUEUED,
    STREAMED,
    Full,
    computed,
    halfway,
    has_waiting,
    reading,
)

# Five servers start before the first test.
pytestmark = [pytest.mark.e2e, pytest.mark.connectors, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("stopped", [False, True], ids=["at once", "stopped before"])
def test_a_p_killed_while_it_computes_costs_what_was_only_there(duo, asked, alone, stopped):
    """Its prompts end without an answer; D goes on, and computes what P had promised and nobody has read."""
    p, d = duo.prefill, duo.decode
    clear(p, d)
    leased, streamed = asked.take(40), asked.take(33)
    params = prefill(p.url, leased)
    stream = Call(d, streamed, stream=True, max_tokens=STREAMED)
    stream.first_chunk()
    prompt, call = halfway(p, asked)
    queued = Call(p, asked.take(QUEUED), max_tokens=1, kv_transfer_params=KEEP)
    if stopped:
        os.kill(p.pid, signal.SIGSTOP)
    kill(p)
    assert call.end().cut and queued.end().cut
    answer = ask(d.url, leased, kv_transfer_params=params)
    assert split_of(answer) == (40, 0, 0) and text_of(answer) == alone(leased)
    assert stream.end().text == alone(streamed, max_tokens=STREAMED)
    assert text_of(ask(d.url, prompt)) == alone(prompt)
    clear(d)
    duo.revive()
    assert_well(duo, asked, alone)


def test_a_p_stopped_while_it_computes_goes_on(duo, asked, alone):
    clear(duo.prefill, duo.decode)
    prompt, call = halfway(duo.prefill, asked)
    os.kill(duo.prefill.pid, signal.SIGSTOP)
    assert not call.answered
    fresh = asked.take(50)
    assert text_of(ask(duo.decode.url, fresh)) == alone(fresh), "D needs nobody for what it computes itself"
    os.kill(duo.prefill.pid, signal.SIGCONT)
    assert continued(duo.decode, prompt, call.end()) == alone(prompt)
    assert_well(duo, asked, alone)


def test_a_p_killed_while_its_pages_are_read_is_computed_for(duo, asked, alone):
    """Whether the last page had come or not."""
    prompt, _, call = reading(duo, asked)
    kill(duo.prefill)
    end = call.end()
    assert end.status == 200 and end.text == alone(prompt)
    clear(duo.decode)
    duo.revive()
    assert_well(duo, asked, alone)


def test_a_p_stopped_while_its_pages_are_read_goes_on(duo, asked, alone):
    prompt, _, call = reading(duo, asked)
    os.kill(duo.prefill.pid, signal.SIGSTOP)
    fresh = asked.take(50)
    assert text_of(ask(duo.decode.url, fresh)) == alone(fresh)
    os.kill(duo.prefill.pid, signal.SIGCONT)
    assert call.end().text == alone(prompt)
    assert_well(duo, asked, alone)


def test_a_d_killed_while_it_reads_gives_p_its_pages_back(duo, asked, alone):
    """The next life of D is given the same parameters: it reads again, or computes."""
    prompt, params, call = reading(duo, asked)
    kill(duo.decode)
    end = call.end()
    assert end.cut or end.text == alone(prompt)
    duo.revive()
    assert text_of(ask(duo.decode.url, prompt, kv_transfer_params=params)) == alone(prompt)
    assert_well(duo, asked, alone)


def test_a_d_stopped_while_it_reads_takes_nothing_that_is_no_longer_meant(duo, asked, alone):
    """It stands still until P has taken its promise back and given the pages to others."""
    prompt, _, call = reading(duo, asked)
    os.kill(duo.decode.pid, signal.SIGSTOP)
    clear(duo.prefill)
    ask(duo.prefill.url, asked.take(LONG), max_tokens=1)
    os.kill(duo.decode.pid, signal.SIGCONT)
    assert call.end().text == alone(prompt)
    assert_well(duo, asked, alone)


def test_a_d_killed_while_it_generates_costs_its_own_requests(duo, asked, alone):
    """What waited there for room is asked of the next life."""
    full = Full.set(duo, asked)
    kill(duo.decode)
    assert full.stream.end().cut and full.queued.end().cut
    duo.revive()
    answer = ask(duo.decode.url, full.waiting, kv_transfer_params=full.params)
    assert text_of(answer) == alone(full.waiting)
    assert_well(duo, asked, alone)


def test_a_d_stopped_while_it_generates_goes_on(duo, asked, alone):
    """Until then P has taken back what it had promised to the one that waits."""
    full = Full.set(duo, asked)
    os.kill(duo.decode.pid, signal.SIGSTOP)
    clear(duo.prefill)
    os.kill(duo.decode.pid, signal.SIGCONT)
    assert full.stream.end().text == alone(full.decoded, max_tokens=HALF_STREAMED)
    assert full.queued.end().text == alone(full.waiting)
    assert_well(duo, asked, alone)


def test_a_client_that_leaves_p_while_it_computes_stops_that(duo, asked, alone):
    """The one behind it has its turn."""
    p = duo.prefill
    clear(p, duo.decode)
    _, call = halfway(p, asked)
    behind = asked.take(QUEUED)
    queued = Call(p, behind, max_tokens=1, kv_transfer_params=KEEP)
    before = computed(p)
    call.disconnect()
    end = queued.end()
    assert computed(p) - before < LONG / 2 + QUEUED
    assert continued(duo.decode, behind, end) == alone(behind)
    assert_well(duo, asked, alone)


def test_a_client_that_leaves_the_queue_of_p_is_not_computed(duo, asked, alone):
    p = duo.prefill
    clear(p, duo.decode)
    prompt, call = halfway(p, asked)
    before = computed(p)
    queued = Call(p, asked.take(QUEUED), max_tokens=1, kv_transfer_params=KEEP)
    until(lambda: has_waiting(p) or call.answered, "another one waits")
    queued.disconnect()
    assert continued(duo.decode, prompt, call.end()) == alone(prompt)
    clear(p)
    assert computed(p) - before < LONG
    assert_well(duo, asked, alone)


def test_a_client_that_leaves_while_its_pages_are_read_takes_them_with_it(duo, asked, alone):
    _, _, call = reading(duo, asked)
    call.disconnect()
    until(lambda: census(duo.decode)["requests"]["live"] == 0, "D's request has ended")
    assert_well(duo, asked, alone)


@pytest.mark.parametrize("leaves", ["stream", "queued"])
def test_a_client_that_leaves_d_makes_room_or_none(duo, asked, alone, leaves):
    """Where the stream's goes, the one that waits has its pages; where that one goes, the stream goes on."""
    full = Full.set(duo, asked)
    getattr(full, leaves).disconnect()
    if leaves == "stream":
        assert full.queued.end().text == alone(full.waiting)
    else:
        assert full.stream.end().text == alone(full.decoded, max_tokens=HALF_STREAMED)
    assert_well(duo, asked, alone)
