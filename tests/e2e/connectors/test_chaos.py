"""Servers killed, stopped and started again, and clients that go away, with a request in every phase.

In each scene one prompt is queued on P, one is being computed there and one is leased; one is being loaded on
D and one is being decoded. After each fault every request ends, survivors have all their pages back, a text
that is there is that of a server alone, and the pair goes on. More of a leased prompt is in `test_faults`.
"""

import os
import signal
from collections.abc import Callable, Collection, Generator

import pytest

from tests.conftest import HAS_NIXL
from tests.e2e.connectors.chaos import LONG, STREAMED, Duo, End, Scene, census, clear, kill
from tests.e2e.connectors.fleet import Node, Pair, Prompts, ask, prefill, split_of, text_of, until

# Five servers start before the first scene.
pytestmark = [pytest.mark.e2e, pytest.mark.connectors, pytest.mark.timeout(900)]

Alone = Callable[..., str]


@pytest.fixture(scope="module")
def running(
    free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Generator[Duo, None, None]:
    """Two servers for all scenes."""
    if not HAS_NIXL:
        pytest.skip("nixl is not installed")
    ports: set[int] = set()
    while len(ports) < 3:
        ports.add(free_port())
    duo = Duo.begin(sorted(ports), tmp_path_factory.mktemp("chaos"))
    yield duo
    assert duo.stop() == [0, 0]


@pytest.fixture
def duo(running: Duo) -> Generator[Duo, None, None]:
    """Both alive, also after a test that failed in the middle."""
    running.revive()
    yield running
    running.revive()


@pytest.fixture(scope="module")
def asked() -> Prompts:
    """The same prompts in every run: the servers are of this file alone."""
    return Prompts(b"chaos")


@pytest.fixture
def alone(pair16: Pair) -> Alone:
    """The text of a server that no fault meets and that reads no peer's page."""

    def text(prompt: list[int], **fields: int) -> str:
        return text_of(ask(pair16.prefill.url, prompt, **fields))

    return text


def continued(node: Node, prompt: list[int], end: End) -> str:
    """D's text for a prompt that P has answered."""
    assert end.status == 200 and end.body is not None
    return text_of(ask(node.url, prompt, kv_transfer_params=end.body["kv_transfer_params"]))


def assert_right(duo: Duo, scene: Scene, alone: Alone, without: Collection[str] = ()) -> None:
    """Each of the five has its text, but for those whose client or server has gone."""
    prompts = scene.prompts
    ends = {
        "decoding": lambda: scene.decoding.end().text,
        "loading": lambda: scene.loading.end().text,
        "prefilling": lambda: continued(duo.decode, prompts["prefilling"], scene.prefilling.end()),
        "queued": lambda: continued(duo.decode, prompts["queued"], scene.queued.end()),
        "leased": lambda: text_of(ask(duo.decode.url, prompts["leased"], kv_transfer_params=scene.params)),
    }
    longer = {"decoding": {"max_tokens": STREAMED}}
    texts = {phase: end() for phase, end in ends.items() if phase not in without}
    assert texts == {phase: alone(prompts[phase], **longer.get(phase, {})) for phase in texts}


def assert_well(duo: Duo, asked: Prompts, alone: Alone) -> None:
    """All pages are back, and D reads from P what P computes."""
    clear(duo.prefill, duo.decode)
    prompt = asked.take(50)
    answer = ask(duo.decode.url, prompt, kv_transfer_params=prefill(duo.prefill.url, prompt))
    assert split_of(answer) == (0, 0, 50)
    assert text_of(answer) == alone(prompt)
    clear(duo.prefill, duo.decode)


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
