"""`jaxserve serve --disaggregated`: a prefill server, a decode server and a router with one command.

For trying it out on one machine. The servers are children on ports of their own that only this machine can
reach; the router has `--host` and `--port`.
"""

import argparse
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO

import httpx

from jaxserve.cli.router import server_options
from jaxserve.config import ConfigError
from jaxserve.router import RouterOptions, RouterServer
from jaxserve.server.run import reserve_port
from kv.config import CONSUMER, NIXL, PRODUCER

logger = logging.getLogger(__name__)

HERE = "127.0.0.1"
COMMAND = (sys.executable, "-m", "jaxserve.cli.tethered")
ROLES = (("prefill", PRODUCER), ("decode", CONSUMER))
READY_POLL_S = 0.2
END_S = 15.0
"""For a child that has nothing left to do, after the router has drained; then it is killed."""

LAST_LINES_S = 1.0
"""For what the children said last; a process of theirs may hold the pipe open for longer."""

OWN_FLAGS = (
    *("kv_transfer_config", "kv_offloading_size", "nixl_side_channel_host", "nixl_side_channel_port"),
    "record",
)
"""Flags that both children cannot share, or that are given to them here."""


class Interrupted(Exception):
    """SIGTERM came while the router did not serve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """One of the two servers."""

    name: str
    url: str
    process: subprocess.Popen[bytes]


def run_disaggregated(args: argparse.Namespace, command: Sequence[str] = COMMAND) -> int:
    """Starts P and D, waits until both are ready, and routes until a signal or a child's end.

    Args:
        args: of `jaxserve serve`; `args.given` is the command line, which the children get too.
        command: what runs a child; it is to end when its standard input is closed.

    Returns:
        The exit code: 0 after a signal, a child's own where one ended first.

    Raises:
        ConfigError: a flag that cannot be passed on, or the address cannot be had.
    """
    for name in OWN_FLAGS:
        if getattr(args, name, None) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} cannot be given with --disaggregated")
    server = server_options(args)
    try:
        sock = reserve_port(server)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {args.host} --port {args.port}: {error}") from error
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with sock, _children(args.given, command) as children:
            ended = _wait_until_ready(children)
            if ended is not None:
                return _told(ended)
            prefill, decode = children
            routing = RouterServer(RouterOptions(prefill=(prefill.url,), decode=(decode.url,), server=server))
            for child in children:
                threading.Thread(target=_watch, args=(child, routing), daemon=True).start()
            routing.run(sockets=[sock])
            return routing.exit_code
    except Interrupted:
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)


def child_arguments(given: Sequence[str], role: str, port: int, side_channel_port: int) -> list[str]:
    """The command line of a child: what the user gave, and at its end, where it wins, what is the child's."""
    config = {"kv_connector": NIXL, "kv_role": role}
    own = [
        *("--no-disaggregated", "--host", HERE, "--port", str(port)),
        *("--kv-transfer-config", json.dumps(config)),
        *("--nixl-side-channel-host", HERE, "--nixl-side-channel-port", str(side_channel_port)),
    ]
    options = given.index("--") if "--" in given else len(given)
    return [*given[:options], *own, *given[options:]]


def _free_ports(count: int) -> list[int]:
    """Ports that nobody has at this moment, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind((HERE, 0))
        return [sock.getsockname()[1] for sock in sockets]


@contextlib.contextmanager
def _children(given: Sequence[str], command: Sequence[str]) -> Generator[list[Child], None, None]:
    """Both servers, started; at the end of the block none is left."""
    ports = _free_ports(2 * len(ROLES))
    # Both live on one device: neither may take most of its memory beforehand.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    children: list[Child] = []
    copies: list[threading.Thread] = []
    try:
        for index, (name, role) in enumerate(ROLES):
            port, side_channel_port = ports[2 * index : 2 * index + 2]
            process = subprocess.Popen(
                [*command, *child_arguments(given, role, port, side_channel_port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the router: the servers end after it
            )
            children.append(Child(name=name, url=f"http://{HERE}:{port}", process=process))
            copies.append(threading.Thread(target=_copy_lines, args=(name, process.stdout), daemon=True))
            copies[-1].start()
        yield children
    finally:
        _end(children)
        for copy in copies:
            copy.join(LAST_LINES_S)


def _end(children: Sequence[Child]) -> None:
    """Ends the children, by force those that do not go in time or when a signal comes meanwhile."""
    try:
        for child in children:
            child.process.terminate()
        deadline = time.monotonic() + END_S
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(timeout=max(0.0, deadline - time.monotonic()))
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()
            if child.process.stdin is not None:
                child.process.stdin.close()


def _wait_until_ready(children: Sequence[Child]) -> Child | None:
    """Waits for all; the child that ended instead, if one did."""
    with httpx.Client(trust_env=False, timeout=2.0) as client:
        waiting = list(children)
        while waiting:
            for child in children:
                if child.process.poll() is not None:
                    return child
            waiting = [child for child in waiting if not _ready(client, child)]
            if waiting:
                time.sleep(READY_POLL_S)
    logger.info("both servers are ready")
    return None


def _ready(client: httpx.Client, child: Child) -> bool:
    try:
        return client.get(f"{child.url}/ready").status_code == 200
    except httpx.TransportError:
        return False


def _watch(child: Child, routing: RouterServer) -> None:
    """Ends the router when a child has ended. At the router's own end this finds it gone already."""
    child.process.wait()
    if not routing.should_exit:
        routing.stop(_told(child))


def _told(child: Child) -> int:
    """Says that a child has ended, and with which exit code; ours, as a shell has it after a signal."""
    code = child.process.returncode
    print(f"jaxserve: error: the {child.name} server ended with exit code {code}", file=sys.stderr)
    return code if 0 < code < 128 else 128 - code if code < 0 else 1


def _copy_lines(name: str, output: IO[bytes]) -> None:
    prefix = f"{name:7} | ".encode()
    with output:
        for line in output:
            sys.stderr.buffer.write(prefix + line)
            sys.stderr.buffer.flush()


def _interrupt(sig: int, frame: FrameType | None) -> None:
    raise Interrupted
