"""NIXL's own agents for the cases of the contract: the reader's process, and one process for each source.

    python -m tests.kv.nixl_real reader    names of cases on standard input, what they said on standard output
    python -m tests.kv.nixl_real source    orders on standard input

Two processes because one of them is killed and stopped, and neither is the test's: UCX has ended processes.
"""

import contextlib
import ctypes
import json
import mmap
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from kv.nixl import make_agent
from tests.kv.nixl_cases import CASES
from tests.kv.nixl_play import NUM_PAGES, PAGE, values

ROOT = Path(__file__).parents[2]
BUFFERS = {"UCX_TCP_SNDBUF": "256k", "UCX_TCP_RCVBUF": "256k", "UCX_NET_DEVICES": "lo"}
"""So that it does not depend on the machine how far a read comes ahead of who waits for it."""
LISTENING = "0A"
HEADROOM_BYTES = 1 << 20


def start(role: str, environ: dict[str, str]) -> subprocess.Popen[str]:
    """Starts one of the two processes."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.kv.nixl_real", role],
        cwd=ROOT,
        env={**os.environ, **BUFFERS, **environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=role == "reader",
    )


class RealSource:
    """See `tests.kv.nixl_play.Source`."""

    def __init__(self, process: subprocess.Popen[str], value: int) -> None:
        self.process = process
        self.alive = True
        self.spent = False
        self._stopped = False
        metadata, self.address = self._order("begin", value)
        self.metadata = bytes.fromhex(metadata)

    def fill(self, value: int) -> None:
        self._order("fill", value)

    def values(self) -> list[int]:
        return self._order("values")

    def serve(self) -> None:
        if self.alive and not self._stopped:
            try:
                self._order("serve")
            except (OSError, ValueError):  # it has died of what came: a source may
                self.kill()

    def stop(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)
        self._stopped = True

    def go_on(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)
        self._stopped = False

    def kill(self) -> None:
        self.alive = False
        self.process.kill()
        self.process.wait()

    def deregister(self) -> None:
        self._order("deregister")

    def delete(self) -> None:
        self._order("delete")

    def ports(self) -> list[int]:
        process = Path(f"/proc/{self.process.pid}")
        mine = {os.readlink(entry) for entry in (process / "fd").iterdir()}
        ports = []
        for line in (process / "net/tcp").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == LISTENING and f"socket:[{rest[5]}]" in mine:
                ports.append(int(local.split(":")[1], 16))
        assert ports, "UCX listens nowhere"
        return ports

    def lose(self, page: int) -> None:
        self._order("lose", page)
        self.spent = True

    def _order(self, *order: object) -> Any:
        pipe_in, pipe_out = self.process.stdin, self.process.stdout
        assert pipe_in is not None and pipe_out is not None
        pipe_in.write(json.dumps(order) + "\n")
        pipe_in.flush()
        return json.loads(pipe_out.readline())


class RealStage:
    """See `tests.kv.nixl_play.Stage`. Processes of sources that live on are used again."""

    def __init__(self) -> None:
        self._idle: list[subprocess.Popen[str]] = []
        self._sources: list[RealSource] = []
        self._keep_idle()

    def agent(self, name: str) -> Any:
        return make_agent(name)

    def source(self, *, value: int = 1) -> RealSource:
        self._sources.append(RealSource(self._idle.pop(0), value))
        return self._sources[-1]

    def starve(self, post: Callable[[], object]) -> None:
        """With no memory left in this process, UCX finds room for the first of many reads only."""
        (size,) = [
            line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmSize" in line
        ]
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (int(size) * 1024 + HEADROOM_BYTES, hard))
        try:
            post()
        except Exception as error:  # NIXL's, or that of C++ for memory
            assert isinstance(error, MemoryError) or "NIXL_ERR_BACKEND" in str(error), repr(error)
        else:
            raise AssertionError("the post has not failed")
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))

    def clear(self) -> None:
        """After a case."""
        for source in self._sources:
            if source.spent:
                source.kill()
            if source.alive:
                with contextlib.suppress(OSError, ValueError):
                    source.go_on()
                    source.delete()
                    self._idle.insert(0, source.process)
        self._sources.clear()
        self._keep_idle()

    def _keep_idle(self) -> None:
        """Starts processes before they are needed: it takes them a second."""
        while len(self._idle) < 2:
            self._idle.append(start("source", {}))


class _Served:
    """What a source's process holds."""

    def __init__(self) -> None:
        self._agent: Any = None
        self._registered: Any = None
        self._memory = mmap.mmap(-1, NUM_PAGES * PAGE)
        self._pages = np.frombuffer(self._memory, np.uint8).reshape(NUM_PAGES, PAGE)

    def begin(self, value: int) -> tuple[str, int]:
        self._pages[:] = value
        self._agent = make_agent("source")
        address = self._pages.ctypes.data
        whole = np.array([[address, self._pages.size, 0]], np.uint64)
        self._registered = self._agent.register_memory(whole, "DRAM")
        return self._agent.get_agent_metadata().hex(), address

    def fill(self, value: int) -> None:
        self._pages[:] = value

    def values(self) -> list[int]:
        return values(self._pages)

    def serve(self) -> None:
        self._agent.get_new_notifs()

    def deregister(self) -> None:
        self._agent.deregister_memory(self._registered)

    def delete(self) -> None:
        self._agent = self._registered = None

    def lose(self, page: int) -> None:
        """Gives the page back to the system; nothing of this process may touch it again."""
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(self._pages.ctypes.data + page * PAGE)
        if libc.munmap(address, ctypes.c_size_t(PAGE)):
            raise OSError(ctypes.get_errno(), "munmap")


def _serve(orders: TextIO, answers: TextIO) -> None:
    served = _Served()
    for line in orders:
        order, *args = json.loads(line)
        print(json.dumps(getattr(served, order)(*args)), file=answers, flush=True)


def _read(orders: TextIO, answers: TextIO) -> None:
    stage = RealStage()
    for line in orders:
        try:
            answer = {"said": CASES[line.strip()].script(stage)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        stage.clear()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    # NIXL and UCX write to standard output.
    mine = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    (_read if sys.argv[1] == "reader" else _serve)(sys.stdin, mine)
