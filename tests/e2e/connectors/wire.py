"""A link in user space: frames that one interface sends come out of the other, late, with losses, or never.

The kernel's own (netem) would not do: many kernels lack it, it cannot be told to break after so many bytes,
and its losses are not drawn from a seed.
"""

import array
import collections
import errno
import fcntl
import random
import select
import socket
import struct
import threading
import time

_ETH_P_ALL = 3
_SOL_PACKET, _PACKET_IGNORE_OUTGOING = 263, 23
_SO_RCVBUFFORCE = 33
_SIOCETHTOOL, _ETHTOOL_STXCSUM = 0x8946, 0x17
_FRAME_BYTES = 1 << 16
_TURN_FRAMES = 256
"""At most so many frames are taken from one side before the other has its turn."""
_BUFFER_BYTES = 32 << 20


def finish_checksums(interface: str) -> None:
    """Has the kernel compute checksums itself, and cut what it sends into frames of the MTU.

    What leaves a veth is otherwise not fit to be seen: it counts on never meeting a real wire.
    """
    value = array.array("I", [_ETHTOOL_STXCSUM, 0])
    request = struct.pack("16sP", interface.encode(), value.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCETHTOOL, request)


class _End:
    """One end: its socket, and what is on its way out of it, (due_s, frame) in order."""

    def __init__(self, interface: str) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        try:
            self.socket.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
            self.socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
            self.socket.bind((interface, _ETH_P_ALL))
            self.socket.setblocking(False)
        except OSError:
            self.socket.close()
            raise
        self.leaving: collections.deque[tuple[float, bytes]] = collections.deque()


class Wire:
    """Joins two interfaces of this namespace, from its making until `close`. Its orders come from any thread.

    Raises:
        OSError: no right to raw sockets, or no such interface.
    """

    def __init__(self, first: str, second: str, *, seed: int) -> None:
        self._ends = [_End(first)]
        try:
            self._ends.append(_End(second))
        except OSError:
            self._ends[0].socket.close()
            raise
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._delay_s = self._loss = 0.0
        self._broken = False
        self._breaks_after: int | None = None
        self._carried = [0, 0]
        self._lost = 0
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name=f"wire {first} {second}", daemon=True)
        self._thread.start()

    def be(self, *, delay_s: float = 0.0, loss: float = 0.0) -> None:
        """Every frame takes `delay_s` now, and is lost with probability `loss`. Mends a broken wire."""
        with self._lock:
            self._delay_s, self._loss = delay_s, loss
            self._broken, self._breaks_after = False, None

    def break_now(self) -> None:
        """Carries nothing more; nobody is told."""
        with self._lock:
            self._broken = True

    def break_after(self, num_bytes: int) -> None:
        """Breaks when so many more bytes have come from the first end."""
        with self._lock:
            self._breaks_after = self._carried[0] + num_bytes

    @property
    def broken(self) -> bool:
        """It carries nothing."""
        return self._broken

    @property
    def carried_bytes(self) -> int:
        """What came from the first end and was not lost."""
        return self._carried[0]

    @property
    def lost(self) -> int:
        """Frames that it has lost for no reason but `loss`."""
        return self._lost

    def close(self) -> None:
        """Ends it."""
        self._stop.close()
        self._thread.join()
        for end in self._ends:
            end.socket.close()

    # From here on: in the thread.

    def _run(self) -> None:
        sockets = [end.socket for end in self._ends]
        with self._stopped:
            while True:
                dues = [end.leaving[0][0] for end in self._ends if end.leaving]
                wait_s = max(0.0, min(dues) - time.monotonic()) if dues else None
                readable, _, _ = select.select([*sockets, self._stopped], [], [], wait_s)
                if self._stopped in readable:
                    return
                for side, sock in enumerate(sockets):
                    if sock in readable:
                        self._take(side)
                for end in self._ends:
                    self._let_go(end)

    def _take(self, side: int) -> None:
        entering, leaving = self._ends[side].socket, self._ends[1 - side].leaving
        for _ in range(_TURN_FRAMES):
            try:
                frame = entering.recv(_FRAME_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENETDOWN:
                    raise
                return
            with self._lock:
                if self._breaks_after is not None and self._carried[0] >= self._breaks_after:
                    self._broken = True
                lost = self._random.random() < self._loss
                self._lost += lost and not self._broken
                due_s = time.monotonic() + self._delay_s
                if not (lost or self._broken):
                    self._carried[side] += len(frame)
                    leaving.append((max(due_s, leaving[-1][0]) if leaving else due_s, frame))

    def _let_go(self, end: _End) -> None:
        now = time.monotonic()
        while end.leaving and end.leaving[0][0] <= now:
            _, frame = end.leaving.popleft()
            if self._broken:
                continue
            try:
                end.socket.send(frame)
            except BlockingIOError:
                self._lost += 1  # as a switch does whose buffer is full
            except OSError as error:
                if error.errno not in (errno.ENETDOWN, errno.ENOBUFS, errno.ENXIO):
                    raise
