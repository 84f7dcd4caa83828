"""The server as a process: it opens, drains, ends, and idles."""

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

import httpx
import pytest

from jaxserve.server import ServerOptions, reserve_port
from tests.jaxserve.server.catalogue import COMPLETIONS

ROOT = Path(__file__).resolve().parents[3]
PROMPT = {"model": "fake", "prompt": "hi"}
MAX_IDLE_SHARE = 0.02


@contextlib.contextmanager
def started(
    port: int, *, shutdown_s: float = 5, step_s: float = 0
) -> Generator[subprocess.Popen[bytes], None, None]:
    command = [
        sys.executable,
        "-m",
        "tests.jaxserve.server.fake_server",
        str(port),
        str(shutdown_s),
        str(step_s),
    ]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(300):
                with contextlib.suppress(httpx.TransportError):
                    # Whoever can connect at all must be answered.
                    assert httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
                    break
                time.sleep(0.05)
            yield process
        finally:
            process.kill()


class Call(threading.Thread):
    """One request in the background."""

    def __init__(self, port: int, body: dict[str, object]) -> None:
        super().__init__()
        self._port = port
        self._body = body
        self.response: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        url = f"http://127.0.0.1:{self._port}{COMPLETIONS}"
        with contextlib.suppress(httpx.TransportError):
            self.response = httpx.post(url, json=self._body, timeout=30)

    def result(self) -> httpx.Response:
        self.join()
        assert self.response is not None, "the connection broke"
        return self.response


def wait_for_running(port: int, count: int) -> None:
    """Until so many requests are with the engine: one that is still being read would be refused."""
    for _ in range(500):
        if f"fake_running {count}\n" in httpx.get(f"http://127.0.0.1:{port}/metrics").text:
            return
        time.sleep(0.02)
    raise AssertionError(f"never were {count} requests with the engine")


def test_what_runs_is_finished_and_the_rest_refused(free_port: Callable[[], int]) -> None:
    port = free_port()
    with started(port, step_s=0.1) as process:
        calls = [Call(port, PROMPT | {"max_tokens": 25, "stream": stream}) for stream in (False, True)]
        wait_for_running(port, 2)
        process.terminate()
        time.sleep(0.2)
        assert httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 503
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        refused = httpx.post(f"http://127.0.0.1:{port}{COMPLETIONS}", json=PROMPT)
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        whole, streamed = [call.result() for call in calls]
        assert process.wait(timeout=10) == 0
    assert whole.json()["usage"]["completion_tokens"] == 25
    assert '"finish_reason":"length"' in streamed.text and streamed.text.endswith("data: [DONE]\n\n")


def test_the_drain_is_bounded_and_clients_are_told(free_port: Callable[[], int]) -> None:
    port = free_port()
    with started(port, step_s=0.1, shutdown_s=0.5) as process:
        calls = [Call(port, PROMPT | {"max_tokens": 2000, "stream": stream}) for stream in (False, True)]
        wait_for_running(port, 2)
        begin = time.monotonic()
        process.terminate()
        assert process.wait(timeout=10) == 0
        assert time.monotonic() - begin < 4
        whole, streamed = [call.result() for call in calls]
    assert (whole.status_code, streamed.status_code) == (503, 200)
    assert all("shutting down" in response.text for response in (whole, streamed))
    assert streamed.text.endswith("data: [DONE]\n\n")


def test_one_signal_that_comes_twice_still_drains(free_port: Callable[[], int]) -> None:
    port = free_port()
    with started(port, step_s=0.1, shutdown_s=60) as process:
        call = Call(port, PROMPT | {"max_tokens": 20})
        wait_for_running(port, 1)
        process.terminate()
        process.terminate()
        assert call.result().json()["usage"]["completion_tokens"] == 20
        assert process.wait(timeout=10) == 0


def test_a_second_signal_ends_at_once(free_port: Callable[[], int]) -> None:
    port = free_port()
    with started(port, step_s=0.1, shutdown_s=60) as process:
        call = Call(port, PROMPT | {"max_tokens": 2000})
        wait_for_running(port, 1)
        process.terminate()
        time.sleep(0.3)
        assert process.poll() is None
        begin = time.monotonic()
        process.terminate()
        assert process.wait(timeout=10) == 128 + signal.SIGTERM
        assert time.monotonic() - begin < 2
        call.join()


def test_nobody_can_connect_to_a_reserved_port() -> None:
    with reserve_port(ServerOptions(port=0)) as sock:
        port = sock.getsockname()[1]
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port)) != 0
        sock.listen()
        with pytest.raises(OSError, match="in use"):
            reserve_port(ServerOptions(port=port))


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads CPU time from /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_sleeps_and_ends_at_a_signal(
    free_port: Callable[[], int], number: signal.Signals
) -> None:
    with started(free_port()) as process:
        time.sleep(0.5)
        before = cpu_seconds(process.pid)
        time.sleep(3)
        assert (cpu_seconds(process.pid) - before) / 3 < MAX_IDLE_SHARE
        begin = time.monotonic()
        process.send_signal(number)
        assert process.wait(timeout=10) == 0
        assert time.monotonic() - begin < 2
