"""Servers killed, stopped and started again, and clients that go away, with a request in every phase.

In each scene one prompt is queued on P, one is being computed there and one is leased; one is being loaded on
D and one is being decoded. After each fault every request ends, survivors have all their pages back, a text
that is there is that of a server alone, and the pair goes on. More of a leased prompt is in `test_faults`.
"""

import os
import signal

import pytest

from tests.e2e.connectors.chaos import assert_well, census, clear, kill
from tests.e2e.connectors.fleet import ask, until
from tests.e2e.connectors.scenes import LONG, Scene, assert_right

# Five servers start before the first scene.
pytestmark = [pytest.mark.e2e, pytest.mark.connectors, pytest.mark.timeout(900)]


def test_clients_that_go_away_take_their_pages_with_them(duo, asked, alone):
    """D ends its requests while P stands still; their pages come back when nothing can write them."""
    scene = Scene.set(duo, asked)
    for call in scene.calls:
        call.disconnect()
    until(lambda: census(duo.decode)["requests"]["live"] == 0, "D's requests have ended")
    os.kill(duo.prefill.pid, signal.SIGCONT)
    assert_well(duo, asked, alone)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["queued", "prefilling", "loading", "decoding"])
def test_a_client_that_goes_away_harms_nobody_else(duo, asked, alone, phase):
    scene = Scene.set(duo, asked)
    getattr(scene, phase).disconnect()
    os.kill(duo.prefill.pid, signal.SIGCONT)
    assert_right(duo, scene, alone, without=[phase])
    assert_well(duo, asked, alone)


@pytest.mark.slow
def test_a_stopped_p_that_goes_on_finishes_everything(duo, asked, alone):
    scene = Scene.set(duo, asked)
    os.kill(duo.prefill.pid, signal.SIGCONT)
    assert_right(duo, scene, alone)
    assert_well(duo, asked, alone)


@pytest.mark.slow
def test_a_stopped_d_that_goes_on_takes_no_page_that_others_have_reused(duo, asked, alone):
    """While it stands still every lease expires, and P's pages are written by others."""
    scene = Scene.set(duo, asked)
    os.kill(duo.decode.pid, signal.SIGSTOP)
    os.kill(duo.prefill.pid, signal.SIGCONT)
    until(lambda: scene.queued.answered, "the leases that were in the way have expired")
    clear(duo.prefill)
    ask(duo.prefill.url, asked.take(LONG), max_tokens=1)
    os.kill(duo.decode.pid, signal.SIGCONT)
    assert_right(duo, scene, alone)
    assert_well(duo, asked, alone)


def test_a_killed_p_costs_its_own_requests_and_comes_back(duo, asked, alone):
    """D computes what it was loading, and what the old life had promised."""
    scene = Scene.set(duo, asked)
    kill(duo.prefill)
    assert scene.prefilling.end().cut and scene.queued.end().cut
    assert_right(duo, scene, alone, without=["prefilling", "queued"])
    clear(duo.decode)
    duo.revive()
    assert_well(duo, asked, alone)


def test_a_killed_d_costs_its_own_requests_and_comes_back(duo, asked, alone):
    """What P had promised to the old life it gives to the new one, or takes back."""
    scene = Scene.set(duo, asked)
    kill(duo.decode)
    assert scene.loading.end().cut and scene.decoding.end().cut
    duo.revive()
    assert_right(duo, scene, alone, without=["loading", "decoding"])
    assert_well(duo, asked, alone)
