"""The one door to NIXL, and the driver that runs transfers in a thread of its own.

Agents have the UCX backend only, no listener and no progress thread: NIXL's progress thread polls without a
pause (it took 97% of a core in an idle process), so the driver's thread polls the agents itself, and only
while somebody reads. NIXL and UCX are configured before they are loaded, where the user has not done so:

- `NIXL_LOG_LEVEL=WARN`: NIXL writes its notices to standard output.
- `UCX_ERROR_SIGNALS=`: UCX installs handlers for crashes that would hide ours.
- `UCX_RCACHE_MAX_UNRELEASED=1024`: freed registered memory is returned.
- `UCX_KEEPALIVE_INTERVAL=inf`: no probes of peers. One that finds a dead peer on this machine under a queued
  read fails the connection, and deleting the agent then aborts the process (an assertion of UCX 1.23; one
  killed peer in ten). Reads from a dead peer fail without probes, the sockets have the kernel's, and a peer
  that is silent has our heartbeats and deadlines.
"""

import importlib
import importlib.util
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from types import ModuleType

from kv.channel import Channel
from kv.config import ConnectorConfig
from kv.driver import Clock, PageCopies, Region
from kv.moves import Command, Event
from kv.transfer_agent import Agent
from kv.transfer_desk import Desk
from kv.transfer_plan import EngineFacts
from kv.transfers import Transfers

UCX_DEFAULTS = {
    "NIXL_LOG_LEVEL": "WARN",
    "UCX_ERROR_SIGNALS": "",
    "UCX_RCACHE_MAX_UNRELEASED": "1024",
    "UCX_KEEPALIVE_INTERVAL": "inf",
}
BUSY_POLL_S = (50e-6, 500e-6)
"""Pause between polls while a transfer is under way: grows from the first to the second."""


_log = logging.getLogger("jaxserve.transfers")


class NixlUnavailable(RuntimeError):
    """NIXL cannot be imported. One line, with what to do."""


def available() -> bool:
    """Whether NIXL is installed; imports nothing."""
    return importlib.util.find_spec("nixl") is not None


def load() -> ModuleType:
    """NIXL's Python interface.

    Raises:
        NixlUnavailable: NIXL is not installed, or its libraries do not load.
    """
    for key, value in UCX_DEFAULTS.items():
        os.environ.setdefault(key, value)
    try:
        return importlib.import_module("nixl._api")  # only now: its libraries read the environment
    except (ImportError, OSError) as error:
        why = " ".join(str(error).split())
        raise NixlUnavailable(
            f"NixlConnector needs NIXL: pip install --no-deps nixl nixl-cu13 ({why})"
        ) from None


def stay_on_this_machine() -> None:
    """Keeps UCX off the network, unless the user has said otherwise: it listens on every interface else.

    For engines whose peers are on this machine. UCX checks nothing that reaches its ports.
    """
    os.environ.setdefault("UCX_NET_DEVICES", "lo")


def make_agent(name: str) -> Agent:
    """A NIXL agent over UCX: no listener, no etcd, no thread.

    Raises:
        NixlUnavailable: see `load`.
    """
    api = load()
    config = api.nixl_agent_config(
        enable_prog_thread=False, enable_listen_thread=False, capture_telemetry=True, backends=["UCX"]
    )
    return api.nixl_agent(name, config)


def _told(error: Exception) -> None:
    _log.error("a transfer failed on a mistake of ours", exc_info=error)


def _real_agent() -> Callable[[str], Agent]:
    load()
    return make_agent


class NixlDriver:
    """`kv.driver.Driver` of a NixlConnector: `Transfers` in a thread that sleeps until there is work."""

    def __init__(
        self,
        *,
        facts: EngineFacts,
        config: ConnectorConfig,
        regions: Sequence[Region],
        copies: PageCopies,
        make_channel: Callable[[Callable[[], None]], Channel],
        wake: Callable[[], None],
        clock: Clock = time.monotonic,
        make_agent: Callable[[str], Agent] | None = None,
        quarantine_pages_max: int | None = None,
    ) -> None:
        """Args:
            make_channel: makes the side channel, given what it calls, from any thread, when something came.
            wake: called from the thread whenever `poll` would return something.
            clock: of the loop; leases are judged by it.
            make_agent: None: of the real NIXL.

        Raises:
            NixlUnavailable: see `load`.
            AgentError: NIXL cannot use the pool.
            ChannelError: the side channel's address cannot be listened on.
        """
        self._clock = clock
        self._wake = wake
        self._work = threading.Event()
        self._order: Callable[[], None] | None = None
        self._ordered = threading.Event()
        self._stop = False
        if make_agent is None:
            make_agent = _real_agent()
        channel = make_channel(self._work.set)
        try:
            self._transfers = Transfers(
                make_agent=make_agent,
                channel=channel,
                copies=copies,
                regions=regions,
                facts=facts,
                config=config,
                quarantine_pages_max=quarantine_pages_max,
                unexpected=_told,
            )
        except BaseException:
            channel.close()
            raise
        self._desk = Desk(self._transfers, lock=threading.Lock())
        self._thread = threading.Thread(target=self._run, name=f"transfers {facts.engine_id}", daemon=True)
        self._thread.start()

    def start(self, commands: Sequence[Command]) -> None:
        """Begins moves; does not wait for them."""
        self._desk.start(commands)
        if commands:
            self._work.set()

    def poll(self) -> Sequence[Event]:
        """What has happened since the last call."""
        return self._desk.poll()

    def pool_moved(self, regions: Sequence[Region]) -> None:
        """See `Transfers.pool_moved`."""
        self._do(lambda: self._transfers.pool_moved(regions))

    def close(self) -> None:
        """Ends all moves and the thread. When this returns, nobody touches the pool."""
        if self._thread.is_alive():
            self._stop = True
            self._work.set()
            self._thread.join()

    @property
    def quarantined_pages(self) -> int:
        """See `Transfers.quarantined_pages`."""
        return self._transfers.quarantined_pages

    def _do(self, order: Callable[[], None]) -> None:
        """Has the thread do something, and waits for it."""
        self._ordered.clear()
        self._order = order
        self._work.set()
        while not self._ordered.wait(1.0) and not self._desk.ended:
            pass

    # From here on: in the thread.

    def _run(self) -> None:
        try:
            pause = BUSY_POLL_S[0]
            while not self._stop:
                self._work.clear()
                busy = self._turn()
                now = self._clock()
                at = self._transfers.next_wake(now)
                if at is None:
                    self._work.wait()
                elif at > now:
                    self._work.wait(at - now)
                else:
                    time.sleep(pause)
                pause = BUSY_POLL_S[0] if busy else min(2 * pause, BUSY_POLL_S[1])
        except Exception:
            # A fault of ours. The engine goes on without peers: every load fails, and computes instead.
            _log.exception("transfers have ended; pages are moved no more")
        finally:
            self._desk.end()
            self._wake()

    def _turn(self) -> bool:
        """One round. Returns whether something happened."""
        order, self._order = self._order, None
        if order is not None:
            order()
            self._ordered.set()
        busy, told = self._desk.round(self._clock)
        if told:
            self._wake()
        return busy
