"""Routers that are wrong in one thing, each of which a law of `jaxserve.sim.router_laws` must find."""

from dataclasses import replace
from typing import Any

from jaxserve.router.exchange import Patience
from jaxserve.router.fleet import Fleet
from jaxserve.router.route import Answered, PassRefusal, Route
from tests.sim.planting import Mutant, Swap


def _never_again(right: Any) -> Any:
    return lambda self, failed: self._without(failed.role)


def _without_probe(right: Any) -> Any:
    def again(self: Any, failed: Any) -> Any:
        other = None if self._retried else self._fleet.pick(failed.role, other_than=failed)
        return self._without(failed.role) if other is None else self._retry(other)

    return again


def _again_and_again(right: Any) -> Any:
    def retry(self: Any, backend: Any) -> Any:
        order = right(self, backend)
        self._retried = False
        return order

    return retry


def _suspects_nobody(right: Any) -> Any:
    return lambda self, backend, why: None


def _never_silent(right: Any) -> Any:
    def missed(self: Any, backend: Any) -> None:
        right(self, backend)
        backend.silent = False

    return missed


def _impatient(right: Any) -> Any:
    def ends(self: Any, *, asked_at: float, alive_at: float | None) -> Any:
        until, trouble = right(self, asked_at=asked_at, alive_at=alive_at)
        since = asked_at if alive_at is None else alive_at
        return since + (until - since) / 10, trouble

    return ends


def _mixes_parameters(right: Any) -> Any:
    before: dict[int, Any] = {}

    def asked(self: Any, backend: Any, outcome: Any) -> Any:
        if isinstance(outcome, Answered) and outcome.params:
            mine, fleet = outcome.params, id(self._fleet)
            outcome = replace(outcome, params=before.get(fleet, mine))
            before[fleet] = mine
        return right(self, backend, outcome)

    return asked


def _passes_every_refusal(right: Any) -> Any:
    def asked(self: Any, backend: Any, outcome: Any) -> Any:
        if isinstance(outcome, Answered) and outcome.status >= 400:
            return PassRefusal()
        return right(self, backend, outcome)

    return asked


ROUTING = (
    Mutant(name="never retries", laws=("R1",), swap=Swap(where=Route, name="_again", wrong=_never_again)),
    Mutant(
        name="gives up without a probe",
        laws=("R1",),
        swap=Swap(where=Route, name="_again", wrong=_without_probe),
    ),
    Mutant(
        name="suspects nobody", laws=("R2",), swap=Swap(where=Fleet, name="suspect", wrong=_suspects_nobody)
    ),
    Mutant(
        name="waits for the silent",
        laws=("R3",),
        swap=Swap(where=Fleet, name="probe_missed", wrong=_never_silent),
    ),
    Mutant(name="impatient", laws=("R3",), swap=Swap(where=Patience, name="ends", wrong=_impatient)),
    Mutant(
        name="mixes up parameters",
        laws=("R4",),
        swap=Swap(where=Route, name="_asked_prefill", wrong=_mixes_parameters),
    ),
    Mutant(
        name="passes every refusal on",
        laws=("R4",),
        swap=Swap(where=Route, name="_asked_prefill", wrong=_passes_every_refusal),
    ),
    Mutant(
        name="asks again and again",
        laws=("R5",),
        swap=Swap(where=Route, name="_retry", wrong=_again_and_again),
    ),
)
