"""A real server as a process: its start and its end."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

START_S = 480.0
STOP_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A running server: where it answers, its process, and the file that holds what it printed."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path


def start_server(port: int, log: Path, *flags: str, model: str = "smollm2") -> Server:
    """Start `jaxserve serve` as a process and wait until it is ready.

    Raises:
        RuntimeError: it ended or was not ready in START_S; the message holds the end of its output.
    """
    command = [sys.executable, "-m", "jaxserve", "serve", model, "--port", str(port), *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    server = Server(url=f"http://127.0.0.1:{port}", process=process, log=log)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{server.url}/ready", timeout=5).status_code == 200:
                return server
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    stop_server(server)
    raise RuntimeError(f"no server on port {port} (exit {process.poll()}):\n{log.read_text()[-4000:]}")


def stop_server(server: Server) -> int:
    """End the process, by force if it does not go in STOP_S; its exit status."""
    server.process.terminate()
    try:
        return server.process.wait(timeout=STOP_S)
    except subprocess.TimeoutExpired:
        server.process.kill()
        return server.process.wait()
