"""How long a server takes from its process's start to its first token, with and without compiled programs.

Each round starts `jaxserve serve` twice with one new folder for compiled programs: the first start fills it,
the second reads from it. Flags after `--` go to the server. Processor time is that of the server's process to
its end, so it holds the answer to one request of one token and the shutdown, too.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from jaxserve.bench.tables import grid
from jaxserve.weights.smollm2 import default_cache_dir
from jaxserve.weights.source import resolve

LIMIT_S = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start. Seconds from the process's start; processor seconds of all its threads."""

    ready_s: float
    token_s: float
    cpu_s: float


def start(model: str, cache: Path, flags: list[str]) -> Start:
    """Starts a server, asks for one token and ends it.

    Raises:
        RuntimeError: it ended early or was not ready in LIMIT_S.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "jaxserve",
        "serve",
        model,
        "--port",
        str(port),
        "--cache-dir",
        str(cache),
    ]
    began = time.monotonic()
    process = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=60) as client:
            wait_until_ready(client, process, began)
            ready = time.monotonic() - began
            asked = {"model": model, "prompt": "The sea", "max_tokens": 1, "stream": True}
            with client.stream("POST", "/v1/completions", json=asked) as answer:
                next(line for line in answer.iter_lines() if line.startswith("data: {"))
            token = time.monotonic() - began
    finally:
        process.send_signal(signal.SIGTERM)
        _, _, used = os.wait4(process.pid, 0)
        process.returncode = 0
    return Start(ready_s=ready, token_s=token, cpu_s=used.ru_utime + used.ru_stime)


def wait_until_ready(client: httpx.Client, process: "subprocess.Popen[bytes]", began: float) -> None:
    """Returns when /ready answers 200.

    Raises:
        RuntimeError: see `start`.
    """
    while time.monotonic() - began < LIMIT_S:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            if client.get("/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise RuntimeError(f"the server was not ready in {LIMIT_S:g} s")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every start here, too")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="of the server")
    args = parser.parse_args()
    model = str(resolve(args.model, cache_dir=default_cache_dir(os.environ)).path)
    starts: dict[str, list[Start]] = {"first": [], "second": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name in starts:
                starts[name].append(start(model, Path(folder), args.flags))
                print(f"{name}: {starts[name][-1]}", file=sys.stderr)
    rows = [["start", "ready, s", "first token, s", "CPU s"]]
    for name, seen in starts.items():
        medians = [statistics.median(getattr(each, field) for each in seen) for field in Start.__slots__]
        rows.append([name, *(f"{value:.1f}" for value in medians)])
    print(grid(rows))
    if args.json is not None:
        values = {name: [[s.ready_s, s.token_s, s.cpu_s] for s in seen] for name, seen in starts.items()}
        args.json.write_text(json.dumps(values) + "\n")


if __name__ == "__main__":
    main()
