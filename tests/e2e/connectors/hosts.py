"""Two hosts on one machine: a network namespace each, joined by veth pairs and a wire that may fail.

    test's process (root namespace)
      |  control, 198.18.N.0/30          |  control, 198.18.N.4/30      for HTTP
    [host 0]--link0---- wire ----link0--[host 1]   198.19.N.0/24        for the side channel and the pages

Needs root (or CAP_NET_ADMIN, CAP_SYS_ADMIN and CAP_NET_RAW) and iproute2.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.e2e.connectors.fleet import until
from tests.e2e.connectors.wire import Wire, finish_checksums
from tests.e2e.servers import START_S, Server, stop_server

LINK = "link0"
"""The name, on both hosts, of the interface that leads to the other."""


class NoHosts(Exception):
    """This machine does not let us make namespaces and links; the message says what it refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One namespace.

    Attributes:
        address: on the control network: where the test reaches it.
        link_address: on the link: where the other host reaches it.
    """

    namespace: str
    address: str
    link_address: str

    def command(self, *command: str) -> list[str]:
        """The command, run on this host."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def start(self, arguments: Sequence[str], port: int, log: Path, environ: Mapping[str, str]) -> Server:
        """Starts `jaxserve serve ARGUMENTS` here and waits until it is ready.

        Raises:
            AssertionError: it ended, or was not ready in START_S.
        """
        serve = [sys.executable, "-m", "jaxserve", "serve", *arguments]
        command = self.command(*serve, "--host", self.address, "--port", str(port))
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environ}
            )
        server = Server(url=f"http://{self.address}:{port}", process=process, log=log)

        def ready() -> bool:
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                return httpx.get(f"{server.url}/ready", timeout=5, trust_env=False).status_code == 200
            except httpx.TransportError:
                return False

        try:
            until(ready, f"the server on {self.namespace} is ready", START_S)
        except BaseException:
            stop_server(server)
            raise
        return server


class TwoHosts:
    """Both hosts and the wire between them; a context that leaves nothing behind.

    Raises:
        NoHosts: on entering.
    """

    def __init__(self) -> None:
        name, net = os.urandom(3).hex(), os.urandom(1)[0]
        self._ends = [f"jx{name}w{side}" for side in range(2)]
        self._controls = [f"jx{name}c{side}" for side in range(2)]
        self._nets = [f"198.18.{net}.{4 * side}" for side in range(2)]
        self.hosts = tuple(
            Host(
                namespace=f"jx-{name}-{side}",
                address=f"198.18.{net}.{4 * side + 2}",
                link_address=f"198.19.{net}.{side + 1}",
            )
            for side in range(2)
        )
        self._gateways = [f"198.18.{net}.{4 * side + 1}/30" for side in range(2)]
        self._wire: Wire | None = None

    @property
    def wire(self) -> Wire:
        """Between the hosts; its first end is that of the first host."""
        assert self._wire is not None
        return self._wire

    def __enter__(self) -> "TwoHosts":
        if shutil.which("ip") is None:
            raise NoHosts("there is no `ip` (on Debian and Ubuntu: apt install iproute2)")
        try:
            for side in range(2):
                self._make(side)
            self._wire = Wire(*self._ends, seed=1)
        except OSError as error:
            self.__exit__()
            raise NoHosts(f"no raw sockets: {error}") from error
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None
        for host in self.hosts:
            subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True, check=False)
        # The other end of a pair goes with the namespace, but only when the kernel gets round to it.
        for interface in (*self._ends, *self._controls):
            subprocess.run(["ip", "link", "delete", interface], capture_output=True, check=False)

    def _make(self, side: int) -> None:
        host, end, control = self.hosts[side], self._ends[side], self._controls[side]
        namespace = host.namespace
        _ip("netns", "add", namespace)
        _ip("link", "add", end, "type", "veth", "peer", "name", f"{end}p")
        finish_checksums(f"{end}p")
        _ip("link", "set", f"{end}p", "netns", namespace, "name", LINK)
        _ip("link", "add", control, "type", "veth", "peer", "name", "control0", "netns", namespace)
        for interface in (end, control):
            _ip("link", "set", interface, "addrgenmode", "none", "up")
        _ip("address", "add", self._gateways[side], "dev", control)
        _ip("-n", namespace, "address", "add", f"{host.address}/30", "dev", "control0")
        _ip("-n", namespace, "address", "add", f"{host.link_address}/24", "dev", LINK)
        for interface in ("lo", "control0", LINK):
            _ip("-n", namespace, "link", "set", interface, "up")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoHosts(f"ip {' '.join(arguments)}: {done.stderr.strip() or done.returncode}")
