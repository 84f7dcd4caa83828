"""The three processes of `--disaggregated`: they start together, and none outlives the others."""

import argparse
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from jaxserve.cli.disaggregated import child_arguments, run_disaggregated
from jaxserve.config import ConfigError

FAKE = Path(__file__).with_name("fake_child.py")
ROOT = Path(__file__).resolve().parents[3]
PARENT = """
import argparse, sys
from jaxserve.cli.disaggregated import run_disaggregated
from jaxserve.cli.router import log_to_stderr
log_to_stderr("info")
fake, port, *given = sys.argv[1:]
args = argparse.Namespace(
    given=["serve", *given], host="127.0.0.1", port=int(port), api_key=[], shutdown_timeout=5.0
)
sys.exit(run_disaggregated(args, (sys.executable, fake)))
"""
WAIT_S = 60.0


def wait_for(condition: Callable[[], bool]) -> None:
    """Polls: other processes cannot be awaited."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trio:
    """The parent process, its router's URL and the file that holds what all three printed."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def child_ports(self) -> list[int]:
        lines = re.findall(r"^(?:prefill|decode ) \| flags (.*)$", self.log.read_text(), re.MULTILINE)
        return [int(re.findall(r"--port (\d+)", line)[-1]) for line in lines]

    def children_are_gone(self) -> bool:
        for port in self.child_ports():
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
            except httpx.TransportError:
                continue
            return False
        return True


@pytest.fixture
def start(tmp_path: Path, free_port: Callable[[], int]) -> Generator[Callable[..., Trio], None, None]:
    started: list[Trio] = []

    def begin(*given: str) -> Trio:
        port, log = free_port(), tmp_path / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", PARENT, str(FAKE), str(port), *given],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )
        started.append(Trio(process=process, url=f"http://127.0.0.1:{port}", log=log))
        return started[-1]

    yield begin
    for trio in started:
        trio.process.kill()
        trio.process.wait()
        wait_for(trio.children_are_gone)


def test_requests_go_through_both_and_sigterm_ends_all_three(start: Callable[..., Trio]) -> None:
    trio = start("MODEL", "--port", "1", "--disaggregated")
    wait_for(trio.ready)
    answer = httpx.post(f"{trio.url}/v1/completions", json={"prompt": "a"}, trust_env=False)
    assert answer.json() == {"got": {"do_remote_prefill": True}}
    ports = trio.child_ports()
    assert len(set(ports)) == 2
    trio.process.send_signal(signal.SIGTERM)
    assert trio.process.wait(WAIT_S) == 0
    assert trio.children_are_gone()
    assert trio.log.read_text().count("| ended\n") == 2, "a child was killed"


def test_a_child_that_dies_ends_the_others_with_its_exit_code(start: Callable[..., Trio]) -> None:
    trio = start("MODEL")
    wait_for(trio.ready)
    httpx.post(f"{trio.url}/tokenize", json={"prompt": "a"}, trust_env=False)
    assert trio.process.wait(WAIT_S) == 3
    assert "the decode server ended with exit code 3" in trio.log.read_text()
    assert trio.children_are_gone()


def test_a_child_that_cannot_start_ends_the_others(start: Callable[..., Trio]) -> None:
    trio = start("MODEL", "--fail")
    assert trio.process.wait(WAIT_S) == 7
    assert "the decode server ended with exit code 7" in trio.log.read_text()
    wait_for(trio.children_are_gone)


def test_no_child_outlives_a_parent_that_is_killed(start: Callable[..., Trio]) -> None:
    trio = start("MODEL")
    wait_for(trio.ready)
    assert not trio.children_are_gone()
    trio.process.kill()
    trio.process.wait(WAIT_S)
    wait_for(trio.children_are_gone)


def test_a_childs_own_flags_stand_last_among_the_options() -> None:
    given = ["serve", "--port", "8000", "--disagg", "--", "MODEL"]
    found = child_arguments(given, "kv_producer", 7, 8)
    assert found[:4] == given[:4]
    assert found[4:9] == ["--no-disaggregated", "--host", "127.0.0.1", "--port", "7"]
    assert found[9:11] == [
        "--kv-transfer-config",
        '{"kv_connector": "NixlConnector", "kv_role": "kv_producer"}',
    ]
    assert found[11:] == [
        *("--nixl-side-channel-host", "127.0.0.1", "--nixl-side-channel-port", "8"),
        *("--", "MODEL"),
    ]


def test_flags_that_the_servers_cannot_share_are_refused() -> None:
    args = argparse.Namespace(given=["serve"], record=Path("x"))
    with pytest.raises(ConfigError, match="--record cannot be given with --disaggregated"):
        run_disaggregated(args)
