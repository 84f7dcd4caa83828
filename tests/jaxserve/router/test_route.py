"""Every way that a request can take through the router, whatever becomes of its calls."""

import pickle
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.router.fleet import Fleet
from jaxserve.router.route import (
    TRY_ANOTHER,
    Answered,
    AskDecode,
    AskPrefill,
    BreakOff,
    End,
    Failed,
    Failure,
    Finish,
    GiveUp,
    LeftUnread,
    Order,
    Outcome,
    ParamsRefused,
    Passed,
    PassRefusal,
    Probe,
    Probed,
    Route,
    Verdict,
    judge,
)

PARAMS = {"seal": "x"}


@dataclass(slots=True)
class Tallied:
    """Counts decisions as the router's own tally does."""

    counts: Counter[str] = field(default_factory=Counter)

    def retry(self, role: str) -> None:
        self.counts[f"retry {role}"] += 1

    def fallback(self, reason: str) -> None:
        self.counts[f"fallback {reason}"] += 1

    def direct(self, reason: str) -> None:
        self.counts[f"direct {reason}"] += 1


def fleet_of(prefill: list[bool], decode: list[bool]) -> Fleet:
    """A fleet with so many servers; true: it is well."""
    names = ([f"p{n}" for n in range(len(prefill))], [f"d{n}" for n in range(len(decode))])
    fleet = Fleet(*names, max_missed_probes=2)
    for backend, well in zip(fleet.backends, (*prefill, *decode), strict=True):
        backend.healthy = well
    return fleet


FAILURES = st.builds(Failed, failure=st.sampled_from(Failure), begun=st.just(False))
PREFILL = (
    st.just(Answered(status=200, params=PARAMS))
    | st.just(Answered(status=200))
    | st.builds(Answered, status=st.sampled_from([400, 404, 429, 500, 502, 503]))
    | FAILURES
)
STATUSES = st.sampled_from([200, 400, 400, 429, 500, 502, 503, 504])


@dataclass(slots=True)
class Ran:
    """A way to its end. Attributes: steps: orders with what came of them; end: the last one."""

    steps: list[tuple[Order, Outcome]]
    end: End
    counts: Counter[str]


def run(data: st.DataObject, fleet: Fleet, *, direct: str | None = None) -> Ran:
    """Executes a way; chance says what becomes of each order, as far as it can come of it."""
    tally, steps = Tallied(), []
    way = Route(fleet, tally, direct=direct)
    order = way.order
    while not isinstance(order, End):
        match order:
            case AskPrefill():
                assert order.backend.role == "prefill"
                outcome = data.draw(PREFILL)
            case AskDecode():
                assert order.backend.role == "decode"
                outcome = data.draw(FAILURES) if data.draw(st.booleans()) else relay(data, fleet, order)
            case Probe():
                well = data.draw(st.booleans())
                fleet.probe_answered(order.backend, 200 if well else 503)
                outcome = Probed(well=well)
        steps.append((order, outcome))
        assert len(steps) < 20, "it goes on and on"
        for backend in fleet.backends:  # others fail and come back meanwhile
            backend.healthy = backend.healthy ^ (data.draw(st.integers(0, 9)) == 0)
        order = way.take(outcome)
    with pytest.raises(ValueError, match="does not come"):
        way.take(Passed())
    return Ran(steps=steps, end=order, counts=tally.counts)


def relay(data: st.DataObject, fleet: Fleet, order: AskDecode) -> Outcome:
    """D has answered with a status."""
    status = data.draw(STATUSES)
    match judge(fleet, order, status):
        case Verdict.LEAVE:
            return LeftUnread(status=status)
        case Verdict.READ:
            return ParamsRefused() if data.draw(st.booleans()) else Passed()
        case Verdict.PASS_ON:
            if data.draw(st.integers(0, 3)):
                return Passed()
            return Failed(failure=data.draw(st.sampled_from(Failure)), begun=True)


wells = st.lists(st.booleans(), min_size=1, max_size=3)


@given(st.data(), wells, wells, st.none() | st.just("several_prompts"))
def test_every_way_ends_once_with_one_retry_a_step_and_says_why(data, prefill, decode, direct):
    ran = run(data, fleet_of(prefill, decode), direct=direct)
    asks = [(order, outcome) for order, outcome in ran.steps if isinstance(order, AskPrefill)]
    tries = [(order, outcome) for order, outcome in ran.steps if isinstance(order, AskDecode)]
    retries = ran.counts["retry prefill"], ran.counts["retry decode"]
    assert len(asks) <= 2 and retries[0] == max(0, len(asks) - 1)
    refused = [number for number, (_, outcome) in enumerate(tries) if isinstance(outcome, ParamsRefused)]
    assert len(refused) <= 1 and ran.counts["fallback params_refused"] == len(refused)
    rounds = [tries[: refused[0] + 1], tries[refused[0] + 1 :]] if refused else [tries]
    assert all(len(one) <= 2 for one in rounds)
    assert retries[1] == sum(max(0, len(one) - 1) for one in rounds)

    given = [outcome.params for _, outcome in asks if isinstance(outcome, Answered) and outcome.params]
    for number, (order, _) in enumerate(tries):
        wanted = given[-1] if given and not (refused and number > refused[0]) else None
        assert order.params == wanted, "what P gave, to every D, until one refuses it"
    fallbacks = [name for name in ran.counts if name.startswith("fallback") and "params_refused" not in name]
    if direct is not None:
        assert not asks and not fallbacks and ran.counts["direct several_prompts"] == 1
    elif tries or (isinstance(ran.end, GiveUp) and ran.end.error.message.startswith("No decode")):
        assert len(fallbacks) == (0 if given else 1), "D computes a prompt for one reason"

    last = ran.steps[-1][1] if ran.steps else None
    if isinstance(ran.end, PassRefusal):
        assert isinstance(last, Answered) and 400 <= last.status < 500 and not tries
    elif isinstance(ran.end, Finish):
        assert isinstance(last, Passed)
    elif isinstance(ran.end, BreakOff):
        assert isinstance(last, Failed) and last.begun
    else:
        assert not any(isinstance(outcome, Passed) for _, outcome in ran.steps)
        assert ran.end.error.status in (502, 503, 504)
    begun = [number for number, (_, what) in enumerate(ran.steps) if isinstance(what, Failed) and what.begun]
    assert begun in ([], [len(ran.steps) - 1]), "nobody else goes on with an answer that has begun"


@given(st.data(), wells, wells)
def test_whoever_breaks_is_not_asked_before_a_health_check(data, prefill, decode):
    fleet = fleet_of(prefill, decode)
    tally = Tallied()
    way = Route(fleet, tally)
    order, broken = way.order, set()
    while not isinstance(order, End):
        if isinstance(order, Probe):
            assert order.backend in broken
            assert not fleet.has_other(order.backend), "another is asked first"
            broken.discard(order.backend)
            order = way.take(Probed(well=fleet.probe_answered(order.backend, 200)))
            continue
        assert order.backend.healthy and order.backend not in broken
        broken.add(order.backend)
        order = way.take(Failed(failure=Failure.BROKEN))
        assert all(not backend.healthy for backend in broken)
    assert isinstance(order, GiveUp)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_router_that_ends_asks_nobody_else(stage: str):
    way = Route(fleet_of([True, True], [True, True]), Tallied())
    order = way.order
    if stage == "decode":
        order = way.take(Answered(status=200, params=PARAMS))
    order = way.take(Failed(failure=Failure.ENDING))
    assert isinstance(order, GiveUp) and order.error.status == 503


@pytest.mark.parametrize("status", [200, 400, 404, 429, 500, *sorted(TRY_ANOTHER)])
@pytest.mark.parametrize("others", [True, False])
@pytest.mark.parametrize("spares", [True, False])
@pytest.mark.parametrize("params", [PARAMS, None])
def test_only_what_speaks_of_the_server_is_kept_from_the_client(
    status: int, others: bool, spares: bool, params: dict[str, str] | None
):
    fleet = fleet_of([True], [True, others])
    verdict = judge(fleet, AskDecode(backend=fleet.decode[0], params=params, spares=spares), status)
    leaves = status in TRY_ANOTHER and others and spares
    assert (verdict is Verdict.LEAVE) == leaves
    assert (verdict is Verdict.READ) == (status == 400 and params is not None)


def test_a_way_can_be_copied_between_two_events():
    """A simulation is brought back to what it was and goes on otherwise."""
    fleet = fleet_of([True], [True, True])
    way = Route(fleet, Tallied())
    way.take(Answered(status=200, params=PARAMS))
    other = pickle.loads(pickle.dumps(way))
    assert isinstance(way.take(Passed()), Finish)
    order = other.take(LeftUnread(status=503))
    assert isinstance(order, AskDecode) and (order.backend.url, order.params) == ("d1", PARAMS)


def test_an_outcome_of_something_else_is_a_mistake():
    way = Route(fleet_of([True], [True]), Tallied())
    with pytest.raises(ValueError, match="asking P"):
        way.take(Passed())
    way = Route(fleet_of([True], [True]), Tallied(), direct="truncation")
    with pytest.raises(ValueError, match="asking D"):
        way.take(ParamsRefused())
