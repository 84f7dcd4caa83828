"""Room in the queue: asked for early, or found missing by a request that is submitted."""

from typing import cast

import pytest

from jaxserve.inbox import Inbox
from jaxserve.outputs import QueueFull
from jaxserve.sequence import LiveRequest
from metrics.counts import LabelledCounts
from metrics.engine import REJECTION_REASONS


class Live:
    """What the inbox needs of a live request."""

    def __init__(self, request_id: str) -> None:
        self.request = self
        self.request_id = request_id
        self.admitted = False


def live(request_id: str) -> LiveRequest:
    return cast(LiveRequest, Live(request_id))


def test_whoever_is_refused_early_is_counted_like_one_that_is_refused_late() -> None:
    nothing = LabelledCounts.empty(REJECTION_REASONS)
    inbox = Inbox(max_num_queued_reqs=2, rejections=nothing)
    first = live("a")
    inbox.submit(first)
    inbox.check_room()
    inbox.submit(live("b"))
    with pytest.raises(QueueFull):
        inbox.check_room()
    with pytest.raises(QueueFull):
        inbox.submit(live("c"))
    assert inbox.rejections == nothing.add("max_num_queued_reqs").add("max_num_queued_reqs")
    assert inbox.num_live == 2, "who is refused leaves nothing behind"
    inbox.leave_queue(first)
    inbox.check_room()
    inbox.submit(live("c"))
