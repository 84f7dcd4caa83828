"""The commands of docs/features/nixl_connector_usage.md, as they stand there, on ports that are free."""

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import HAS_NIXL
from tests.house.test_docs import blocks, document, shell_words

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CHEAP = (
    *("--enforce-eager", "--dtype", "float32", "--num-gpu-blocks-override", "64"),
    *("--max-num-seqs", "8", "--max-num-batched-tokens", "128"),
)
READY_S, END_S = 240.0, 30.0
PORT = re.compile(r"(?<=port )\d{4}|(?<=localhost:)\d{4}")


def first_section(free_port: Callable[[], int]) -> list[list[str]]:
    """The words of the first section's commands; each port is another one, the same wherever it stands."""
    text = document("docs/features/nixl_connector_usage.md")
    section = text.partition("## P, D and a router")[2].partition("\n## ")[0]
    script = "\n".join(blocks(section, "sh")[:4]).replace("\\\n", " ")
    ports: dict[str, str] = {}
    for port in dict.fromkeys(PORT.findall(script)):
        fresh = str(free_port())
        while fresh in ports.values():
            fresh = str(free_port())
        ports[port] = fresh
    script = PORT.sub(lambda found: ports[found.group()], script)
    return [words for words in shell_words(script.splitlines()) if words]


@contextlib.contextmanager
def running(name: str, words: list[str], folder: Path) -> Generator[str, None, None]:
    """A `jaxserve` command as a process; its URL. It must end well."""
    cheap = CHEAP if words[1] == "serve" else ()
    with (folder / f"{name}.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *words, *cheap], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield f"http://localhost:{words[words.index('--port') + 1]}"
        process.terminate()
        assert process.wait(timeout=END_S) == 0, (folder / f"{name}.txt").read_text()[-4000:]
    finally:
        process.kill()
        process.wait()


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready", timeout=10, trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"{url} is not ready")


def post(url: str, body: Any) -> dict[str, Any]:
    answer = httpx.post(url, json=body, timeout=120, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.skipif(not HAS_NIXL, reason="nixl is not installed")
def test_the_first_commands_serve_an_answer_whose_prompt_p_has_computed(
    free_port: Callable[[], int], tmp_path: Path
) -> None:
    p, d, router, curl = first_section(free_port)
    assert [words[:2] for words in (p, d, router)] == [
        ["jaxserve", "serve"],
        ["jaxserve", "serve"],
        ["jaxserve", "router"],
    ]
    assert curl[0] == "curl"
    body = json.loads(curl[curl.index("-d") + 1])
    with running("p", p, tmp_path) as p_url, running("d", d, tmp_path) as d_url:
        for url in (p_url, d_url):
            wait_until_ready(url)
        with running("router", router, tmp_path) as router_url:
            wait_until_ready(router_url)
            answer = post(f"http://{curl[1]}", body)
            alone = post(f"{p_url}/v1/completions", body)
    assert answer["choices"][0]["text"] == alone["choices"][0]["text"] != ""
    details = answer["usage"]["prompt_tokens_details"]
    assert details["external_kv_transfer"] == answer["usage"]["prompt_tokens"] > 0
    assert details["local_compute"] == details["local_cache_hit"] == 0
