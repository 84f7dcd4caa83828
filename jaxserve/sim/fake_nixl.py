"""A NIXL without NIXL: agents of one process that copy real bytes by address, with faults on order.

It has the part of `nixl_agent` that the driver uses, with the same signatures, answers and errors, and the
semantics that were measured of NIXL 1.5 over UCX on TCP (a test plays the same scripts on both):

- a transfer is PROC until it has been polled; an error raises, again and again; a stopped peer leaves it PROC
  for ever;
- DONE says nothing about the content: half of a READ's bytes are copied when it is posted, half when it ends;
- releasing a handle, removing a peer and deregistering memory stop nothing: the rest is written later, unless
  the reading agent has been deleted or the peer has died;
- nor does a post that fails: what it had asked for before may be written later;
- a peer is one life under its name: another one is refused until the first has been removed, and what was
  prepared for that one is of no use then.

As with shared memory, and unlike TCP, a transfer does not need its source's polls.

Nothing here runs by itself: no thread, no clock, no chance. Polls and explicit calls move everything.
An agent is deleted as in Python: when nobody refers to it or to one of its handles.
"""

import ctypes
import json
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np


class FakeNixlError(Exception):
    """What the real agent raises, with its name for the status as the message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What goes wrong with one transfer.

    Attributes:
        post_fails: `transfer` raises; the first half of the descriptors is written by
            `FakeNixlNetwork.deliver_late`.
        never_ends: PROC at every poll; the rest is written by `FakeNixlNetwork.deliver_late`.
        errors: the poll that would say DONE raises, and so does the next one after
            `FakeNixlNetwork.deliver_late`; half of the bytes have been written, and no more will be.
        flips_bit: DONE, with one bit of the last descriptor's first byte flipped.
        writes_nothing: DONE, and the target is as it was.
        cycles: polls at which it is PROC; None: as many as the network says.
        seconds: it is PROC for that long, on the network's clock.
    """

    post_fails: bool = False
    never_ends: bool = False
    errors: bool = False
    flips_bit: bool = False
    writes_nothing: bool = False
    cycles: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Posted:
    """A transfer that is about to be posted, for whoever draws its fault.

    Attributes:
        reader, source: names of the two agents.
    """

    reader: str
    source: str
    num_bytes: int
    num_descriptors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """Of a finished transfer; microseconds, one per poll here. Names are NIXL's."""

    startTime: int
    postDuration: int
    xferDuration: int
    totalBytes: int
    descCount: int


Descs = list[tuple[int, int, int]]
"""(address, bytes, device) each."""


@dataclass(slots=True, eq=False)
class _Transfer:
    """A copy under way. `copies`: (target, source, bytes), the first `written` bytes of them done."""

    reader: str
    source: str
    copies: Descs
    fault: Fault
    polls_left: int
    ends_at: float
    polls: int = 0
    written: int = 0
    ended: bool = False
    error: str = ""

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes for _, _, num_bytes in self.copies)

    def write(self, upto: int) -> None:
        """On to so many bytes."""
        begin = 0
        for target, source, num_bytes in self.copies:
            first, last = max(self.written - begin, 0), min(upto - begin, num_bytes)
            if first < last and not self.fault.writes_nothing:
                ctypes.memmove(target + first, source + first, last - first)
            begin += num_bytes
        self.written = max(self.written, upto)

    def complete(self) -> None:
        self.write(self.num_bytes)
        self.ended = True
        if self.fault.flips_bit:
            byte = ctypes.c_uint8.from_address(self.copies[-1][0])
            byte.value ^= 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LateWrite:
    """What a transfer that was given up still writes. Attributes: reader, source: names of its agents."""

    reader: str
    source: str
    transfer: _Transfer

    def deliver(self) -> None:
        """Writes it."""
        self.transfer.complete()


@dataclass(slots=True, eq=False)
class _Met:
    """A life that an agent has learned of, with the memory that its metadata names."""

    life_id: str
    regions: Descs


@dataclass(slots=True, eq=False)
class XferHandle:
    """As `nixl_xfer_handle`: it keeps its agent alive. `copies`: (target, source, bytes)."""

    agent: "FakeNixlAgent"
    copies: Descs
    met: _Met
    transfer: _Transfer | None = None


@dataclass(slots=True, eq=False)
class DlistHandle:
    """As `nixl_prepped_dlist_handle`. `met`: the peer whose memory it names; None: the agent's own."""

    agent: "FakeNixlAgent"
    descs: Descs
    met: _Met | None
    released: bool = False


@dataclass(slots=True, eq=False)
class _Life:
    """What the network knows of an agent; it outlives the agent's object."""

    name: str
    regions: Descs = field(default_factory=list)
    peers: dict[str, _Met] = field(default_factory=dict)
    state: str = "alive"  # or "paused", "dead", "deleted"


class FakeNixlNetwork:
    """Connects the agents it makes, and holds the faults to come.

    Attributes:
        faults: for the next transfers in the order of their posts; one each, none left: no fault.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = lambda: 0.0,
        draw: Callable[[Posted], Fault] = lambda posted: Fault(),
    ) -> None:
        """Args:
        clock: seconds, for transfers that take some.
        draw: the fault of a transfer for which none is in `faults`.
        """
        self._clock = clock
        self._draw = draw
        self.faults: list[Fault] = []
        self.cycles = 1
        self._lives: dict[str, _Life] = {}
        self._transfers: list[_Transfer] = []
        self._made: dict[str, int] = defaultdict(int)

    def agent(self, name: str) -> "FakeNixlAgent":
        """Makes an agent. Several may have one name, one after the other."""
        self._made[name] += 1
        life_id = f"{name}#{self._made[name]}"
        self._lives[life_id] = _Life(name)
        return FakeNixlAgent(self, life_id)

    def set_cycles_before_xfer_done(self, cycles: int) -> None:
        """Transfers posted from now on are PROC at the post and at `cycles` polls, then DONE."""
        self.cycles = cycles

    @property
    def agents(self) -> list[str]:
        """Names of the agents that have not been deleted and have not died."""
        return [life.name for life in self._lives.values() if life.state in ("alive", "paused")]

    def pause(self, name: str) -> None:
        """The process of an agent is stopped: reads from it stay PROC."""
        self._of(name).state = "paused"

    def resume(self, name: str) -> None:
        """It runs again: what was asked of it while it stood still is written now, wanted or not."""
        self._of(name).state = "alive"
        for transfer in self._transfers:
            if self._lives[transfer.source].name == name:
                self._late(transfer)

    def kill(self, name: str) -> None:
        """The process of an agent dies: reads from it fail at the next poll."""
        self._of(name).state = "dead"

    def deliver_late(self) -> int:
        """Ends all transfers whose two agents live: writes what is outstanding, unless they are to fail.
        Returns how many there were."""
        return sum(self._late(transfer) for transfer in self._transfers)

    def outlasting(self, handles: Iterable[XferHandle]) -> list[LateWrite]:
        """Those of transfers given up that `LateWrite.deliver` would write.

        Args:
            handles: of those that nobody waits for any more; posts that failed are looked for here.
        """
        known = {id(handle.transfer) for handle in handles}
        return [
            LateWrite(
                reader=self._lives[transfer.reader].name,
                source=self._lives[transfer.source].name,
                transfer=transfer,
            )
            for transfer in self._transfers
            if (transfer.fault.post_fails or id(transfer) in known)
            and not (transfer.ended or transfer.error)
            and not (transfer.fault.errors or transfer.fault.writes_nothing)
            and all(self._lives[end].state == "alive" for end in (transfer.reader, transfer.source))
        ]

    def has_written(self, fault: Fault) -> bool:
        """Whether the transfer with this fault (this very one) has ended, and not with an error."""
        return any(transfer.ended and transfer.fault is fault for transfer in self._transfers)

    def targets(self) -> set[int]:
        """Addresses that transfers under way may still write to, also those that nobody waits for."""
        return {target for transfer in self._going_on() for target, _, _ in transfer.copies}

    def under_way(self) -> list[tuple[str, str, Fault, list[int]]]:
        """(reader, source, fault, addresses that are read) of every transfer that has not ended, where both
        agents live."""
        lives = self._lives
        return [
            (
                lives[transfer.reader].name,
                lives[transfer.source].name,
                transfer.fault,
                [source for _, source, _ in transfer.copies],
            )
            for transfer in self._going_on()
        ]

    def _going_on(self) -> list[_Transfer]:
        lives = self._lives
        return [
            transfer
            for transfer in self._transfers
            if not (transfer.ended or transfer.error)
            and all(lives[end].state in ("alive", "paused") for end in (transfer.reader, transfer.source))
        ]

    def _late(self, transfer: _Transfer) -> bool:
        alive = all(self._lives[end].state == "alive" for end in (transfer.reader, transfer.source))
        if transfer.ended or transfer.error or not alive:
            return False
        if transfer.fault.errors:
            transfer.error = "NIXL_ERR_REMOTE_DISCONNECT"
        else:
            transfer.complete()
        return True

    def _of(self, name: str) -> _Life:
        return self._lives[f"{name}#{self._made[name]}"]

    def deleted(self, life_id: str) -> None:
        """An agent is gone, and with it what its transfers would still write."""
        if self._lives[life_id].state != "dead":
            self._lives[life_id].state = "deleted"
        self._transfers = [
            transfer for transfer in self._transfers if not transfer.ended and transfer.reader != life_id
        ]


class FakeNixlAgent:
    """One agent. See `nixl_agent` for what the methods mean."""

    def __init__(self, network: FakeNixlNetwork, life_id: str) -> None:
        self._network = network
        self._id = life_id
        self._life = network._lives[life_id]
        self.name = self._life.name
        # By weak reference: what is registered here would live as long as the agent, and all it refers to.
        weakref.finalize(self, _deleted, weakref.ref(network), life_id).atexit = False

    def set_cycles_before_xfer_done(self, cycles: int) -> None:
        """See `FakeNixlNetwork.set_cycles_before_xfer_done`."""
        self._network.set_cycles_before_xfer_done(cycles)

    def get_xfer_descs(
        self, descs: Sequence[tuple[int, int, int]] | np.ndarray, mem_type: str | None = None
    ) -> Descs:
        """Memory to move: (address, bytes, device) tuples or an N x 3 array."""
        return _descs(descs, mem_type)

    def register_memory(
        self, reg_list: Sequence[tuple[int, int, int, str]] | np.ndarray, mem_type: str | None = None
    ) -> Descs:
        """Makes memory reachable; metadata taken before does not name it."""
        descs = _descs(reg_list, mem_type)
        self._life.regions += descs
        return descs

    def deregister_memory(self, dereg_list: Descs) -> None:
        """The memory is named no more. Transfers under way go on: nothing is revoked."""
        for desc in dereg_list:
            if desc not in self._life.regions:
                raise FakeNixlError("NIXL_ERR_NOT_FOUND")
            self._life.regions.remove(desc)

    def get_agent_metadata(self) -> bytes:
        """What a peer needs to reach this agent and the memory registered so far."""
        return json.dumps([self._id, self.name, self._life.regions]).encode()

    def add_remote_agent(self, metadata: bytes) -> bytes:
        """Learns of a peer, or of more of its memory; returns its name, as bytes."""
        try:
            life_id, name, regions = json.loads(metadata)
        except ValueError:
            raise FakeNixlError("NIXL_ERR_MISMATCH") from None
        if name == self.name:
            raise FakeNixlError("NIXL_ERR_INVALID_PARAM")
        met = self._life.peers.setdefault(name, _Met(life_id, []))
        if met.life_id != life_id:
            raise FakeNixlError("NIXL_ERR_NOT_ALLOWED")
        met.regions += [region for region in regions if region not in met.regions]
        return name.encode()

    def remove_remote_agent(self, agent: str | bytes) -> None:
        """Forgets a peer, and what was prepared for it. Transfers under way go on."""
        self._life.peers.pop(_text(agent), None)

    def prep_xfer_dlist(
        self, agent_name: str | bytes, xfer_list: Descs | np.ndarray, mem_type: str | None = None
    ) -> DlistHandle:
        """Checks descriptors of one side once, for many transfers. "" or NIXL_INIT_AGENT: the local side."""
        name = _text(agent_name)
        descs = xfer_list if isinstance(xfer_list, list) else _descs(xfer_list, mem_type)
        met = None
        if name not in ("", "NIXL_INIT_AGENT"):
            met = self._life.peers.get(name)
            if met is None:
                raise FakeNixlError("NIXL_ERR_NOT_FOUND")
        _check(descs, self._life.regions if met is None else met.regions)
        return DlistHandle(self, descs, met)

    def release_dlist_handle(self, handle: DlistHandle) -> None:
        """The descriptors are needed no more."""
        handle.released = True

    def make_prepped_xfer(
        self,
        operation: str,
        local_xfer_side: DlistHandle,
        local_indices: Sequence[int] | np.ndarray,
        remote_xfer_side: DlistHandle,
        remote_indices: Sequence[int] | np.ndarray,
    ) -> XferHandle:
        """A transfer of prepared descriptors, by index."""
        sides = (local_xfer_side, remote_xfer_side)
        local, remote = local_xfer_side.descs, remote_xfer_side.descs
        met = remote_xfer_side.met
        if met is None or local_xfer_side.met is not None or any(side.released for side in sides):
            raise FakeNixlError("NIXL_ERR_INVALID_PARAM")
        self._know(met)
        ok = 0 < len(local_indices) == len(remote_indices)
        ok = ok and all(0 <= index < len(local) for index in local_indices)
        if not (ok and all(0 <= index < len(remote) for index in remote_indices)):
            raise FakeNixlError("NIXL_ERR_INVALID_PARAM")
        here, there = [local[i] for i in local_indices], [remote[i] for i in remote_indices]
        if any(a[1] != b[1] for a, b in zip(here, there, strict=True)):
            raise FakeNixlError("NIXL_ERR_INVALID_PARAM")
        to, of = {"READ": (here, there), "WRITE": (there, here)}[operation]
        return XferHandle(self, [(a[0], b[0], a[1]) for a, b in zip(to, of, strict=True)], met)

    def transfer(self, handle: XferHandle) -> str:
        """Posts a transfer. "PROC", or "DONE" where it takes no time."""
        network, met, before = self._network, handle.met, handle.transfer
        if before is not None and before.error:
            raise FakeNixlError(before.error)
        if before is not None and not before.ended:
            raise FakeNixlError("NIXL_ERR_REPOST_ACTIVE")
        self._know(met)
        posted = Posted(
            reader=self.name,
            source=network._lives[met.life_id].name,
            num_bytes=sum(num_bytes for _, _, num_bytes in handle.copies),
            num_descriptors=len(handle.copies),
        )
        fault = network.faults.pop(0) if network.faults else network._draw(posted)
        cycles = network.cycles if fault.cycles is None else fault.cycles
        ends_at = network._clock() + fault.seconds
        transfer = _Transfer(self._id, met.life_id, handle.copies, fault, cycles, ends_at)
        state = network._lives[met.life_id].state
        if state in ("dead", "deleted"):
            raise FakeNixlError("NIXL_ERR_REMOTE_DISCONNECT")
        if fault.post_fails:
            transfer.copies = handle.copies[: len(handle.copies) // 2]
            if transfer.copies:
                network._transfers.append(transfer)
            raise FakeNixlError("NIXL_ERR_BACKEND")
        handle.transfer = transfer
        network._transfers.append(transfer)
        if cycles == 0:
            return self.check_xfer_state(handle)
        if state == "alive":
            transfer.write(transfer.num_bytes // 2)
        return "PROC"

    def check_xfer_state(self, handle: XferHandle) -> str:
        """ "PROC" or "DONE"; raises where it failed."""
        transfer, network = handle.transfer, self._network
        if transfer is None:
            raise FakeNixlError("NIXL_ERR_NOT_POSTED")
        if transfer.ended:
            return "DONE"
        transfer.polls += 1
        state = network._lives[transfer.source].state
        waits = transfer.polls <= transfer.polls_left or network._clock() < transfer.ends_at
        waits = waits or transfer.fault.never_ends or state == "paused"
        if state in ("dead", "deleted") or (transfer.fault.errors and not waits):
            transfer.error = "NIXL_ERR_REMOTE_DISCONNECT"
        if transfer.error:
            if transfer in network._transfers:
                network._transfers.remove(transfer)
            raise FakeNixlError(transfer.error)
        if waits:
            return "PROC"
        transfer.complete()
        return "DONE"

    def get_xfer_telemetry(self, handle: XferHandle) -> Telemetry:
        """Of a transfer that is DONE."""
        transfer = handle.transfer
        if transfer is None or not transfer.ended:
            raise FakeNixlError((transfer and transfer.error) or "NIXL_ERR_NO_TELEMETRY")
        return Telemetry(
            startTime=0,
            postDuration=1,
            xferDuration=1 + transfer.polls,
            totalBytes=transfer.num_bytes,
            descCount=len(transfer.copies),
        )

    def release_xfer_handle(self, handle: XferHandle) -> None:
        """The handle is needed no more. A transfer under way goes on all the same."""

    def get_new_notifs(self) -> dict[str, list[bytes]]:
        """Messages of peers: nobody sends any."""
        return {}

    def _know(self, met: _Met) -> None:
        """Raises: FakeNixlError: the peer has been removed since."""
        if met not in self._life.peers.values():
            raise FakeNixlError("NIXL_ERR_NOT_FOUND")


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _descs(descs: Sequence[Sequence[int | str]] | np.ndarray, mem_type: str | None) -> Descs:
    if mem_type not in ("DRAM", "VRAM"):
        raise FakeNixlError("NIXL_ERR_INVALID_PARAM")
    return [(int(row[0]), int(row[1]), int(row[2])) for row in descs]


def _check(descs: Descs, regions: Descs) -> None:
    for address, num_bytes, _ in descs:
        if not any(
            start <= address and address + num_bytes <= start + length for start, length, _ in regions
        ):
            raise FakeNixlError("NIXL_ERR_NOT_FOUND")


def _deleted(network: "weakref.ref[FakeNixlNetwork]", life_id: str) -> None:
    alive = network()
    if alive is not None:
        alive.deleted(life_id)
