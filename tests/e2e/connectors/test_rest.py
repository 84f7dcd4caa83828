"""A pair with nothing to do: no polling, no foreign libraries, no ports that nobody asked for."""

import contextlib
import os
import re
import time
from pathlib import Path

import pytest

from tests.e2e.connectors.fleet import Node, Pair, ask, at_rest

pytestmark = [pytest.mark.e2e, pytest.mark.connectors, pytest.mark.timeout(900)]

WINDOW_S = 10.0
WINDOWS = 3
LISTEN = "0A"
LOOPBACK = "0100007F"


def test_an_idle_pair_rests(pair16: Pair, prompts) -> None:
    """Under 2% of a core each, after a transfer. What else runs on the machine may disturb a window."""
    ask(pair16.router_url, prompts.take(40))
    nodes = (pair16.prefill, pair16.decode)
    for node in nodes:
        at_rest(node.url)
    used: list[tuple[float, ...]] = []
    for _ in range(WINDOWS):
        before = [cpu_seconds(node) for node in nodes]
        time.sleep(WINDOW_S)
        used.append(tuple(cpu_seconds(node) - began for node, began in zip(nodes, before, strict=True)))
        if max(used[-1]) < 0.02 * WINDOW_S:
            return
    raise AssertionError(f"CPU seconds of P and D in windows of {WINDOW_S:g} s: {used}")


def cpu_seconds(node: Node) -> float:
    """CPU time of all threads of a server so far."""
    fields = Path(f"/proc/{node.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_neither_side_maps_torch(pair16: Pair) -> None:
    for node in (pair16.prefill, pair16.decode):
        maps = Path(f"/proc/{node.pid}/maps").read_text()
        assert "libtorch" not in maps and "nixl" in maps


def test_ports_are_those_that_were_asked_for(pair16: Pair) -> None:
    """P: HTTP and the side channel. D: HTTP. Beside them only UCX's own, and all on this machine alone."""
    prefill, decode = pair16.prefill, pair16.decode
    named = re.findall(r"side channel on \S+:(\d+)", log_of(prefill))
    assert len(named) == 1 and not re.findall(r"side channel on", log_of(decode))
    on_p, on_d = listening(prefill.pid), listening(decode.pid)
    assert {port for _, port in on_p} >= {int(named[0]), int(prefill.url.rpartition(":")[2])}
    assert int(decode.url.rpartition(":")[2]) in {port for _, port in on_d}
    assert len(on_p) == len(on_d) + 1
    assert {address for address, _ in on_p | on_d} == {LOOPBACK}


def log_of(node: Node) -> str:
    """What it has printed."""
    assert node.server is not None
    return node.server.log.read_text()


def listening(pid: int) -> set[tuple[str, int]]:
    """(address as /proc has it, port) of all IPv4 TCP sockets on which a process listens."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            inodes.add(os.readlink(link).removeprefix("socket:[").rstrip("]"))
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    places = [row[1].split(":") for row in rows if row[3] == LISTEN and row[9] in inodes]
    return {(address, int(port, 16)) for address, port in places}
