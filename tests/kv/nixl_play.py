"""What a case of the contract with NIXL plays with: a reader in this process, and sources elsewhere.

Nothing here waits for time to pass. Agents have no thread of their own, so a source serves only when it is
told to, and how far a read has come is known exactly.
"""

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

PAGE, NUM_PAGES = 1 << 20, 32
"""Much more than a connection's buffers hold: no read over TCP ends before its source has served often."""
ROUNDS = 300
"""So often is looked where nothing may happen; a whole read needs about 50."""
DEADLINE_S = 60.0

Descs = np.ndarray
"""uint64 `[n, 3]`: address, bytes, device."""


class Source(Protocol):
    """An agent with memory to be read, in a process of its own. Attributes: address: of its pages."""

    metadata: bytes
    address: int

    def fill(self, value: int) -> None:
        """Overwrites all its pages."""
        ...

    def values(self) -> list[int]:
        """Which bytes its pages hold, sorted."""
        ...

    def serve(self) -> None:
        """Lets NIXL answer, once; a source that cannot answer does nothing."""
        ...

    def stop(self) -> None:
        """The process stands still (SIGSTOP)."""
        ...

    def go_on(self) -> None:
        """And goes on (SIGCONT)."""
        ...

    def kill(self) -> None:
        """The process dies (SIGKILL)."""
        ...

    def deregister(self) -> None:
        """Its memory is registered no more."""
        ...

    def delete(self) -> None:
        """Its agent is deleted; the process lives."""
        ...

    def ports(self) -> list[int]:
        """TCP ports on which its process listens."""
        ...

    def lose(self, page: int) -> None:
        """A page cannot be read any more: reads of it are done, and have brought nothing."""
        ...


class Stage(Protocol):
    """Where a case is played."""

    def agent(self, name: str) -> Any:
        """An agent of this process."""
        ...

    def source(self, *, value: int = 1) -> Source:
        """A source of the name "source" with `NUM_PAGES` pages, filled with a value."""
        ...

    def starve(self, post: Callable[[], object]) -> None:
        """Posts a transfer that fails when a part of it has been posted."""
        ...


def descs(address: int, page_bytes: int = PAGE) -> Descs:
    """Of all pages."""
    num_pages = NUM_PAGES * PAGE // page_bytes
    rows = np.zeros((num_pages, 3), np.uint64)
    rows[:, 0] = address + np.arange(num_pages, dtype=np.uint64) * page_bytes
    rows[:, 1] = page_bytes
    return rows


def values(pages: np.ndarray) -> list[int]:
    """Which bytes uint8 `[pages, bytes]` hold, sorted."""
    found: set[int] = set()
    for page in pages:  # most hold one, and sorting is slow
        found |= {int(page[0])} if page.min() == page.max() else {int(value) for value in np.unique(page)}
    return sorted(found)


def said(call: Callable[..., Any], *args: object) -> Any:
    """What a call answers; where it raises, NIXL's name for why."""
    try:
        answer = call(*args)
    except Exception as error:
        name = str(error).split()[0]
        assert name.startswith("NIXL_ERR"), repr(error)
        return name
    if isinstance(answer, bytes):
        return answer.decode()
    return answer if answer is None or isinstance(answer, str) else "made"


class Play:
    """An agent that reads from one source. Attributes: target: its pages, uint8 `[pages, bytes]`."""

    def __init__(self, stage: Stage, source: Source, *, page_bytes: int = PAGE) -> None:
        self.source = source
        self.page_bytes = page_bytes
        self.target = np.zeros((NUM_PAGES * PAGE // page_bytes, page_bytes), np.uint8)
        self.agent: Any = stage.agent("reader")
        self.registered = self.agent.register_memory(
            np.array([[self.target.ctypes.data, self.target.size, 0]], np.uint64), "DRAM"
        )
        self.agent.add_remote_agent(source.metadata)
        local = self.agent.get_xfer_descs(descs(self.target.ctypes.data, page_bytes), "DRAM")
        self.here = self.agent.prep_xfer_dlist("NIXL_INIT_AGENT", local)
        self.there = self.prepare()

    def prepare(self) -> Any:
        """Lists the source's pages, by the metadata that is known."""
        remote = self.agent.get_xfer_descs(descs(self.source.address, self.page_bytes), "DRAM")
        return self.agent.prep_xfer_dlist("source", remote)

    def make(
        self,
        targets: Sequence[int] | None = None,
        sources: Sequence[int] | None = None,
        operation: str = "READ",
    ) -> Any:
        """A transfer; of all pages, in an order in which no two lie side by side, unless some are named."""
        every = range(len(self.target))
        here = np.array(every if targets is None else targets, np.int32)
        there = np.array(every[::-1] if sources is None else sources, np.int32)
        return self.agent.make_prepped_xfer(operation, self.here, here, self.there, there)

    def state(self, handle: Any) -> str:
        """PROC, DONE, or the error."""
        return said(self.agent.check_xfer_state, handle)

    def begin(self) -> Any:
        """Posts a READ of all pages, and goes on until a part has arrived and a part has not."""
        handle = self.make()
        states = [said(self.agent.transfer, handle)]
        self.until(self.target.any, lambda: states.append(self.state(handle)))
        assert set(states) == {"PROC"} and not self.target.all(), states
        return handle

    def end(self, handle: Any, state: str = "PROC") -> str:
        """The first state that is not PROC, while the source serves."""
        states = [state]
        self.until(lambda: states[-1] != "PROC", lambda: states.append(self.state(handle)))
        return states[-1]

    def run(self, targets: Sequence[int] | None = None, sources: Sequence[int] | None = None) -> str:
        """Makes and posts a READ (see `make`); how it ends."""
        handle = self.make(targets, sources)
        return self.end(handle, said(self.agent.transfer, handle))

    def states(self, handle: Any) -> list[str]:
        """All states it is seen in while nobody serves."""
        return sorted({self.state(handle) for _ in range(ROUNDS)})

    def values(self) -> list[int]:
        """Which bytes the target holds, sorted."""
        return values(self.target)

    def until(self, condition: Callable[[], object], look: Callable[[], object] | None = None) -> None:
        """Lets the source serve until something is so."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, "it does not come to be"
            self.source.serve()
            (look or self._look)()

    def late(self) -> bool:
        """The target, once emptied, is written again while the source serves."""
        self.until(self.target.any)
        return True

    def quiet(self) -> bool:
        """Whether the target, once emptied, stays so while the source serves."""
        for _ in range(ROUNDS):
            self.source.serve()
            self._look()
        return not self.target.any()

    def free(self) -> None:
        """The pages have another owner now, who has written zeros."""
        self.target[:] = 0

    def delete(self) -> None:
        """Deletes the agent; the caller has no handle left."""
        self.agent = self.registered = self.here = self.there = None
        gc.collect()

    def _look(self) -> None:
        """Lets NIXL write what has come."""
        if self.agent is not None:
            self.agent.get_new_notifs()
