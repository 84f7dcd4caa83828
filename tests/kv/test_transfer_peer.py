"""Transfers that fail: who may have their target pages, and from when on."""

import numpy as np
import pytest

from jaxserve.sim.fake_nixl import Fault
from kv.moves import Loaded, Safe
from tests.kv.pair import Pair, only_loaded

FAILS = Fault(post_fails=True)


def test_pages_of_a_post_that_failed_are_safe_once_its_agent_is_gone() -> None:
    pair = Pair()
    pair.network.faults = [FAILS, FAILS]
    pair.load(pair.p.lease("r", [5, 9], 8), [20, 21])
    loaded = only_loaded(pair.run())
    assert (loaded.num_pages, loaded.safe, loaded.retries) == (0, True, 1)
    assert pair.reading == [], "its agent is gone"
    pair.d.pool.rows[[20, 21]] = 3  # the pages have another owner now
    assert pair.network.deliver_late() == 0
    assert (pair.d.pool.rows[[20, 21]] == 3).all()


@pytest.mark.parametrize("fault", [FAILS, Fault(errors=True)])
def test_pages_of_a_failed_transfer_wait_for_the_agent_while_others_read_with_it(fault: Fault) -> None:
    pair = Pair(quarantine_pages_max=8)
    first, second = pair.p.lease("r", [5, 9], 8), pair.p.lease("r2", [6, 7], 8)
    pair.network.faults = [Fault(cycles=1000), fault]
    pair.load(first, [20, 21])
    pair.until_read()
    pair.load(second, [30, 31], move_id=2)
    (agent,) = pair.reading
    pair.run()
    assert not pair.d.events, "the second is to be tried again, and cannot yet"
    pair.tick(29.9)
    loads = {event.move_id: event for event in pair.tick(0.2) if isinstance(event, Loaded)}
    assert (loads[1].safe, loads[2].safe) == (False, False)
    assert pair.d.transfers.quarantined_pages == 4
    events = pair.run()
    assert [event.move_id for event in events if isinstance(event, Safe)] == [1, 2]
    assert agent not in pair.network.agents and pair.d.transfers.quarantined_pages == 0
    pair.d.pool.rows[[20, 21, 30, 31]] = 3
    pair.network.deliver_late()
    assert (pair.d.pool.rows[[20, 21, 30, 31]] == 3).all()


def test_a_load_whose_post_failed_is_read_by_another_agent_once_the_first_has_no_more_to_do() -> None:
    pair = Pair()
    first, second = pair.p.lease("r", [5, 9], 8), pair.p.lease("r2", [6, 7], 8)
    pair.network.faults = [Fault(cycles=20), FAILS]
    pair.load(first, [20, 21])
    pair.until_read()
    pair.load(second, [30, 31], move_id=2)
    loads = [event for event in pair.run(80) if isinstance(event, Loaded)]
    assert [(load.move_id, load.num_pages, load.retries, load.safe) for load in loads] == [
        (1, 2, 0, True),
        (2, 2, 1, True),
    ]
    assert len(pair.reading) == 1 and pair.reading[0].endswith("-2")
    assert np.array_equal(pair.d.pool.rows[[20, 21, 30, 31]], pair.p.pool.rows[[5, 9, 6, 7]])


def test_staging_that_a_failed_post_may_write_is_not_used_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(p_page=4, d_page=8)
    monkeypatch.setattr("kv.transfer_peer.STAGING_BYTES", 4 * pair.p.pool.rows.shape[1])
    pair.network.faults = [Fault(cycles=50), Fault(), FAILS]  # of the first, and of the second's two batches
    for index, pages in enumerate(([5, 6], [7, 8, 9, 10], [11, 12])):
        source = pair.p.lease(f"r{index}", pages, 4 * len(pages))
        pair.load(source, range(20 + 2 * index, 20 + 2 * index + len(pages) // 2), move_id=index)
    for _ in range(200):
        pair.tick(0.001)
        targets = [
            copy[0] for transfer in pair.network._transfers if not transfer.ended for copy in transfer.copies
        ]
        assert len(targets) == len(set(targets))
    loads = [event for event in pair.d.events if isinstance(event, Loaded)]
    assert sorted((load.move_id, load.num_pages, load.safe) for load in loads) == [
        (0, 1, True),
        (1, 2, True),
        (2, 1, True),
    ]
    assert np.array_equal(pair.d.pool.tokens([20, 22, 23, 24]), pair.p.pool.tokens(range(5, 13)))
