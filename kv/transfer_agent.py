"""One NIXL agent with the pool registered, as the protocol uses it. The agent itself is an argument."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kv.driver import Region
from kv.unexpected import MISTAKES, Unexpected, raised
from kv.wire import Welcome


class Agent(Protocol):
    """What is used of `nixl_agent`. Handles and descriptor lists are opaque. Failures raise, any class."""

    def register_memory(self, reg_list: np.ndarray, mem_type: str) -> Any: ...
    def deregister_memory(self, dereg_list: Any) -> None: ...
    def get_agent_metadata(self) -> bytes: ...
    def add_remote_agent(self, metadata: bytes) -> str | bytes: ...
    def remove_remote_agent(self, agent: str) -> None: ...
    def get_xfer_descs(self, descs: np.ndarray, mem_type: str) -> Any: ...
    def prep_xfer_dlist(self, agent_name: str, xfer_list: Any) -> Any: ...
    def release_dlist_handle(self, handle: Any) -> None: ...
    def make_prepped_xfer(
        self,
        operation: str,
        local_xfer_side: Any,
        local_indices: np.ndarray,
        remote_xfer_side: Any,
        remote_indices: np.ndarray,
    ) -> Any: ...
    def transfer(self, handle: Any) -> str: ...
    def check_xfer_state(self, handle: Any) -> str: ...
    def get_xfer_telemetry(self, handle: Any) -> Any: ...
    def release_xfer_handle(self, handle: Any) -> None: ...
    def get_new_notifs(self) -> dict[str, list[bytes]]: ...


MakeAgent = Callable[[str], Agent]


class AgentError(RuntimeError):
    """NIXL said no; the message is its own, one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Of one finished transfer."""

    num_bytes: int
    num_descriptors: int
    seconds: float
    post_seconds: float


def page_descs(address: int, page_bytes: int, num_pages: int, device_id: int) -> np.ndarray:
    """Descriptors of pages, uint64 `[num_pages, 3]`: address, bytes, device."""
    descs = np.empty((num_pages, 3), np.uint64)
    descs[:, 0] = np.uint64(address) + np.arange(num_pages, dtype=np.uint64) * np.uint64(page_bytes)
    descs[:, 1] = page_bytes
    descs[:, 2] = device_id
    return descs


class PoolAgent:
    """An agent with the pool registered: to be read from, or to read from one peer.

    Handles of transfers stay in here, so that `destroy` deletes the agent for certain: a handle that somebody
    keeps would keep NIXL's agent alive, and an agent that lives may still write.
    """

    def __init__(
        self,
        make_agent: MakeAgent,
        name: str,
        regions: Sequence[Region],
        memory: str,
        unexpected: Unexpected = raised,
    ) -> None:
        """Args: unexpected: told of errors that are not NIXL's own, before they end what was asked for.

        Raises:
            AgentError: no agent can be made.
        """
        self.name = name
        self._unexpected = unexpected
        self._regions = tuple(regions)
        self._memory = memory
        self._transfers: dict[int, Any] = {}
        self._next = 0
        self._lists: list[Any] = []
        self._registered: list[Any] = []
        self._remote = ""
        self._agent: Agent | None = None
        try:
            self._agent = make_agent(name)
            pool = np.array([[r.address, r.num_bytes, r.device_id] for r in regions], np.uint64)
            self._registered.append(self._agent.register_memory(pool, memory))
        except Exception as error:
            raise self._said(error, "make an agent and register the pool") from None

    def metadata(self) -> bytes:
        """What a peer needs to read from here."""
        return self._alive.get_agent_metadata()

    def meet(self, welcome: Welcome, staging: np.ndarray | None) -> None:
        """Learns of the peer, and prepares descriptors of all its pages and of all targets: the pool's pages,
        or the rows of `staging`.

        Raises:
            AgentError: NIXL cannot use the peer's metadata or memory.
        """
        agent = self._alive
        try:
            if staging is None:
                local = np.concatenate(
                    [page_descs(r.address, r.page_bytes, r.num_pages, r.device_id) for r in self._regions]
                )
            else:
                rows, row_bytes = staging.shape
                whole = np.array([[staging.ctypes.data, rows * row_bytes, 0]], np.uint64)
                self._registered.append(agent.register_memory(whole, "DRAM"))
                local = page_descs(staging.ctypes.data, row_bytes, rows, 0)
            remote = np.concatenate([page_descs(*region) for region in welcome.regions])
            name = agent.add_remote_agent(welcome.agent_metadata)
            self._remote = name.decode() if isinstance(name, bytes) else name
            here = agent.get_xfer_descs(local, self._memory if staging is None else "DRAM")
            there = agent.get_xfer_descs(remote, welcome.memory)
            self._lists.append(agent.prep_xfer_dlist("NIXL_INIT_AGENT", here))
            self._lists.append(agent.prep_xfer_dlist(self._remote, there))
        except Exception as error:
            raise self._said(error, "prepare transfers") from None

    def post(self, targets: Sequence[int], sources: Sequence[int]) -> int:
        """Begins to read the peer's pages into targets, by index; returns a number for the transfer.

        Raises:
            AgentError: NIXL has refused it, perhaps after a part was asked for: that may still be written.
        """
        agent = self._alive
        local, remote = self._lists
        handle = None
        try:
            handle = agent.make_prepped_xfer(
                "READ", local, np.array(targets, np.int32), remote, np.array(sources, np.int32)
            )
            if agent.transfer(handle) == "ERR":
                raise AgentError("NIXL_ERR")
        except Exception as error:
            if handle is not None:
                self._quietly(agent.release_xfer_handle, handle)
            raise self._said(error, "post") from None
        self._next += 1
        self._transfers[self._next] = handle
        return self._next

    def ended(self, number: int) -> Measured | None:
        """Whether a transfer is done; None: not yet. A transfer that ended, well or not, is forgotten.

        Raises:
            AgentError: it ended without success. After a broken connection no more of it is written; after
                another error of NIXL's that is not known.
        """
        agent = self._alive
        handle = self._transfers[number]
        try:
            state = agent.check_xfer_state(handle)
            if state == "ERR":
                raise AgentError("NIXL_ERR")
            if state != "DONE":
                return None
            told = agent.get_xfer_telemetry(handle)
        except Exception as error:
            self._forget(number)
            raise self._said(error, "read") from None
        self._forget(number)
        return Measured(
            num_bytes=told.totalBytes,
            num_descriptors=told.descCount,
            seconds=told.xferDuration / 1e6,
            post_seconds=told.postDuration / 1e6,
        )

    def progress(self) -> int:
        """Lets NIXL serve its peers. Returns the number of notifications that came: nobody should send any,
        since they are not authentic."""
        return sum(len(messages) for messages in self._alive.get_new_notifs().values())

    def destroy(self) -> None:
        """Deletes the agent: when this returns, nothing of its transfers can be written any more."""
        agent = self._agent
        if agent is None:
            return
        for handle in self._transfers.values():
            self._quietly(agent.release_xfer_handle, handle)
        for prepared in self._lists:
            self._quietly(agent.release_dlist_handle, prepared)
        if self._remote:
            self._quietly(agent.remove_remote_agent, self._remote)
        for registered in self._registered:
            self._quietly(agent.deregister_memory, registered)
        handle = prepared = registered = None
        self._transfers.clear()
        self._lists.clear()
        self._registered.clear()
        self._agent = None

    @property
    def _alive(self) -> Agent:
        if self._agent is None:
            raise AgentError(f"agent {self.name} has been destroyed")
        return self._agent

    def _forget(self, number: int) -> None:
        self._quietly(self._alive.release_xfer_handle, self._transfers.pop(number))

    def _said(self, error: Exception, doing: str) -> AgentError:
        """NIXL's exceptions have no class of their own below Exception."""
        if isinstance(error, MISTAKES):
            self._unexpected(error)
        text = " ".join(str(error).split()) or type(error).__name__
        return AgentError(f"NIXL could not {doing}: {text}")

    def _quietly(self, release: Callable[[Any], None], what: Any) -> None:
        """Releases at the end of a life; a refusal changes nothing, since deleting the agent ends all."""
        try:
            release(what)
        except Exception as error:
            if isinstance(error, MISTAKES):
                self._unexpected(error)
