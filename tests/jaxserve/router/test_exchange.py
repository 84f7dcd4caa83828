"""What backends' answers come to, and how long they are waited for."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.router.exchange import Call, Patience, Trouble, failed, outcome, patience, verdict
from jaxserve.router.fleet import Fleet
from jaxserve.router.options import RouterOptions
from jaxserve.router.route import (
    Answered,
    AskDecode,
    AskPrefill,
    Failed,
    Failure,
    LeftUnread,
    ParamsRefused,
    Passed,
    Verdict,
)

FLEET = Fleet(["http://p"], ["http://d", "http://e"], max_missed_probes=2)
for _backend in FLEET.backends:
    FLEET.probe_answered(_backend, 200)
P = AskPrefill(backend=FLEET.prefill[0])
D = AskDecode(backend=FLEET.decode[0], params={"seal": "x"}, spares=True)
ALONE = AskDecode(backend=FLEET.decode[0], params=None, spares=False)
REFUSES = json.dumps({"error": {"param": "kv_transfer_params"}}).encode()


@pytest.mark.parametrize("status", [200, 400, 429, 500, 503])
def test_every_answer_of_a_prefill_server_is_read(status: int):
    assert verdict(FLEET, P, status) is Verdict.READ


@pytest.mark.parametrize(
    ("body", "came"),
    [
        (b'{"kv_transfer_params": {"seal": "x"}}', Answered(status=200, params={"seal": "x"})),
        (b'{"kv_transfer_params": null}', Answered(status=200)),
        (b"{}", Answered(status=200)),
    ],
)
def test_a_prefill_server_gives_parameters_or_none(body: bytes, came: Answered):
    assert outcome(P, Verdict.READ, 200, body) == came


@pytest.mark.parametrize("body", [b"", b"[]", b"not json", b'{"kv_transfer_params": 3}', b"[" * 100_000])
def test_an_answer_of_a_prefill_server_that_makes_no_sense_is_a_failure(body: bytes):
    came = outcome(P, Verdict.READ, 200, body)
    assert isinstance(came, Failed) and came.failure is Failure.NONSENSE


@given(st.integers(400, 599), st.binary(max_size=20))
def test_a_prefill_server_s_other_answers_are_their_status(status: int, body: bytes):
    assert outcome(P, Verdict.READ, status, body) == Answered(status=status)


def test_a_decode_server_s_answer_is_passed_left_or_refuses_the_parameters():
    assert verdict(FLEET, D, 503) is Verdict.LEAVE and outcome(D, Verdict.LEAVE, 503) == LeftUnread(
        status=503
    )
    assert verdict(FLEET, ALONE, 503) is Verdict.PASS_ON and outcome(ALONE, Verdict.PASS_ON, 503) == Passed()
    assert verdict(FLEET, D, 400) is Verdict.READ and verdict(FLEET, ALONE, 400) is Verdict.PASS_ON
    assert outcome(D, Verdict.READ, 400, REFUSES) == ParamsRefused()
    assert outcome(D, Verdict.READ, 400, b'{"error": {"param": "n"}}') == Passed()
    assert outcome(D, Verdict.PASS_ON, 200, REFUSES) == Passed(), "what is passed on is not read"


@pytest.mark.parametrize("order", [P, D])
@pytest.mark.parametrize("trouble", Trouble)
def test_every_trouble_is_a_failure_and_only_broken_connections_say_why(order: Call, trouble: Trouble):
    came = failed(order, trouble, why="ReadError", begun=True)
    assert came.begun and (came.why == "ReadError") == (came.failure is Failure.BROKEN)
    assert (came.failure is Failure.BROKEN) == (
        trouble is Trouble.BROKEN or (trouble is Trouble.UNSENT and order is P)
    )
    assert (came.failure is Failure.SILENT) == (trouble is Trouble.SILENT)


OPTIONS = RouterOptions(
    prefill=("http://p",),
    decode=("http://d",),
    connect_timeout_s=1.0,
    prefill_timeout_s=10.0,
    silence_timeout_s=4.0,
)


def test_a_prefill_call_has_a_bound_in_all_and_a_decode_call_none():
    waits = patience("prefill", OPTIONS)
    assert waits.ends(asked_at=5.0, alive_at=None) == (6.0, Trouble.UNSENT)
    assert waits.ends(asked_at=5.0, alive_at=5.5) == (9.5, Trouble.QUIET)
    assert waits.ends(asked_at=5.0, alive_at=14.0) == (15.0, Trouble.OVERDUE)
    waits = patience("decode", OPTIONS)
    assert waits.ends(asked_at=5.0, alive_at=None) == (6.0, Trouble.UNSENT)
    assert waits.ends(asked_at=5.0, alive_at=14.0) == (18.0, Trouble.QUIET)


seconds = st.floats(0.001, 1e6)


@given(seconds, seconds, st.none() | seconds, seconds, seconds, seconds)
def test_a_later_byte_never_ends_a_call_sooner(
    connect: float, silence: float, whole: float | None, asked: float, first: float, later: float
):
    waits = Patience(connect_s=connect, silence_s=silence, whole_s=whole)
    without, _ = waits.ends(asked_at=asked, alive_at=None)
    before, _ = waits.ends(asked_at=asked, alive_at=asked + first)
    after, trouble = waits.ends(asked_at=asked, alive_at=asked + first + later)
    assert asked <= without and asked <= before <= after
    assert whole is None or max(without, after) <= asked + whole
    assert (trouble is Trouble.OVERDUE) <= (whole is not None)
