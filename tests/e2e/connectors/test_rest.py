"""A pair with nothing to do: no polling, no foreign libraries, no ports that nobody asked for."""

import os
import time
from pathlib import Path

import pytest

from tests.e2e.connectors.fleet import Node, Pair, ask, at_rest

pytestmark = [pytest.mark.e2e, pytest.mark.connectors]

WINDOW_S = 10.0
WINDOWS = 3


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
    """P: HTTP and the side channel. D: HTTP. Beside them only UCX's own, which answers UCX alone."""
    for node, wanted in ((pair16.prefill, 2), (pair16.decode, 1)):
        ours = listening(node.pid)
        assert int(node.url.rpartition(":")[2]) in {port for _, port in ours}
        local = {port for address, port in ours if address == "127.0.0.1"}
        assert len(local) == wanted, ours


def listening(pid: int) -> set[tuple[str, int]]:
    """IPv4 address and port of every TCP socket on which a process listens."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(link)
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and fields[9] in inodes:
            host, port = fields[1].split(":")
            octets = bytes.fromhex(host)[::-1]
            found.add((".".join(map(str, octets)), int(port, 16)))
    return found
