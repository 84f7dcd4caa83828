"""A real server with the real model: accounting on /metrics, clients that go away, signals, idleness."""

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import Server, start_server, stop_server

pytestmark = pytest.mark.e2e

GREEDY = {"model": "smollm2", "temperature": 0, "ignore_eos": True}
FLAGS = ("--enforce-eager", "--max-num-seqs", "8", "--max-num-batched-tokens", "128", "--disable-log-stats")


def scrape(server: Server) -> dict[str, float]:
    """Series by name and label values; sums over nothing."""
    series = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            labels = {
                key: value for key, value in sample.labels.items() if key not in ("engine", "model_name")
            }
            series[sample.name + "".join(f"|{value}" for _, value in sorted(labels.items()))] = sample.value
    return series


def delta(before: dict[str, float], after: dict[str, float], name: str) -> float:
    return after[name] - before[name]


def complete(server: Server, **fields) -> dict:
    answer = httpx.post(f"{server.url}/v1/completions", json={**GREEDY, **fields}, timeout=300)
    assert answer.status_code == 200, answer.text
    return answer.json()


def wait_until_idle(server: Server) -> dict[str, float]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        series = scrape(server)
        if series["vllm:num_requests_running"] == 0 and series["vllm:num_requests_waiting"] == 0:
            return series
        time.sleep(0.1)
    raise AssertionError(f"still busy: {series}")


def test_prompt_tokens_by_source_are_exact(server):
    """Cold, then a hit, then n > 1: deltas of the sums, not of one label."""
    prompt = [int(token) for token in range(1000, 1070)]
    before = wait_until_idle(server)
    cold = complete(server, prompt=prompt, max_tokens=4)["usage"]
    middle = wait_until_idle(server)
    assert cold["prompt_tokens_details"] == {
        "cached_tokens": 0, "local_compute": 70, "local_cache_hit": 0, "external_kv_transfer": 0,
    }  # fmt: skip
    by_source = "vllm:prompt_tokens_by_source_total"
    assert delta(before, middle, f"{by_source}|local_compute") == 70
    assert delta(before, middle, f"{by_source}|local_cache_hit") == 0
    warm = complete(server, prompt=prompt, max_tokens=4, n=3)["usage"]
    after = wait_until_idle(server)
    assert warm["prompt_tokens"] == 70 and warm["completion_tokens"] == 12
    assert warm["prompt_tokens_details"] == {
        "cached_tokens": 64, "local_compute": 6, "local_cache_hit": 64, "external_kv_transfer": 0,
    }  # fmt: skip
    assert delta(middle, after, f"{by_source}|local_compute") == 6
    assert delta(middle, after, f"{by_source}|local_cache_hit") == 64
    assert delta(middle, after, f"{by_source}|external_kv_transfer") == 0
    assert delta(middle, after, "vllm:prompt_tokens_total") == 70
    assert delta(middle, after, "vllm:prompt_tokens_cached_total") == 64
    assert delta(middle, after, "vllm:generation_tokens_total") == 12
    assert delta(before, after, "vllm:request_success_total|length") == 4
    assert delta(before, after, "vllm:time_to_first_token_seconds_count") == 2
    assert after["vllm:kv_cache_usage_perc"] == 0


def test_no_series_speaks_of_recomputed_tokens(server):
    assert "recomputed" not in httpx.get(f"{server.url}/metrics").text


def test_reset_prefix_cache_forgets(server):
    prompt = [int(token) for token in range(2000, 2040)]
    complete(server, prompt=prompt, max_tokens=1)
    assert httpx.post(f"{server.url}/reset_prefix_cache").status_code == 200
    usage = complete(server, prompt=prompt, max_tokens=1)["usage"]
    assert usage["prompt_tokens_details"]["local_cache_hit"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_pages(server, stream):
    """The connection is cut while the answer is being made; its pages come back without a token more."""
    before = wait_until_idle(server)
    body = json.dumps({**GREEDY, "prompt": "Once upon a time", "max_tokens": 4000, "stream": stream}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        client.sendall(head.encode() + body)
        deadline = time.monotonic() + 120
        while scrape(server)["vllm:generation_tokens_total"] < before["vllm:generation_tokens_total"] + 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        cut = time.monotonic()
    after = wait_until_idle(server)
    assert time.monotonic() - cut < 20
    assert after["vllm:kv_cache_usage_perc"] == 0
    assert delta(before, after, "vllm:request_success_total|abort") == 1


def test_an_idle_server_rests(server):
    """Under 2% of a core over ten seconds: no polling loop anywhere."""
    wait_until_idle(server)
    time.sleep(1)
    before = cpu_seconds(server.process.pid)
    time.sleep(10)
    assert cpu_seconds(server.process.pid) - before < 0.2


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_sigterm_finishes_what_runs_refuses_what_comes_and_exits_0(free_port, tmp_path):
    running = start_server(free_port(), tmp_path / "log", *FLAGS)
    try:
        complete(running, prompt="warm", max_tokens=2)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            asked = pool.submit(complete, running, prompt="Once upon a time", max_tokens=60)
            while scrape(running)["vllm:num_requests_running"] == 0:
                time.sleep(0.02)
            running.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            late = httpx.post(f"{running.url}/v1/completions", json={**GREEDY, "prompt": "x"}, timeout=30)
            assert late.status_code == 503 and "retry-after" in late.headers
            assert httpx.get(f"{running.url}/ready").status_code == 503
            assert asked.result(timeout=120)["usage"]["completion_tokens"] == 60
        assert running.process.wait(timeout=60) == 0
    finally:
        stop_server(running)


@pytest.mark.slow
def test_a_full_queue_answers_429_and_small_pools_preempt(free_port, tmp_path):
    record = tmp_path / "record"
    flags = ("--enforce-eager", "--max-num-seqs", "4", "--max-num-queued-reqs", "2", "--disable-log-stats",
             "--num-gpu-blocks-override", "10", "--record", str(record), "--dtype", "float32")  # fmt: skip
    running = start_server(free_port(), tmp_path / "log", *flags)
    try:
        complete(running, prompt="warm", max_tokens=2)
        url, refused = f"{running.url}/v1/completions", []
        body = {**GREEDY, "prompt": "The old man and the sea went out", "max_tokens": 90}

        def insist(_: int) -> str:
            """A patient client: as long as it is refused, it asks again."""
            while (answer := httpx.post(url, json=body, timeout=300)).status_code == 429:
                refused.append(answer)
                time.sleep(0.2)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["text"]

        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            texts = list(pool.map(insist, range(12)))
        assert refused and all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert {answer.json()["error"]["type"] for answer in refused} == {"rate_limit_error"}
        assert len(set(texts)) == 1, "preempted or not, the text is the same"
        after = wait_until_idle(running)
        assert after["vllm:num_preemptions_total"] > 0
        assert after["vllm:admission_rejections_total|max_num_queued_reqs"] == len(refused)
        too_long = httpx.post(
            f"{running.url}/v1/completions", json={**GREEDY, "prompt": "a " * 400}, timeout=60
        )
        assert too_long.status_code == 400
    finally:
        assert stop_server(running) == 0
    done = subprocess.run(
        [sys.executable, "-m", "jaxserve", "replay", str(record)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "every plan is the same" in done.stdout, done.stderr


def test_the_port_opens_only_when_the_server_can_answer(free_port, tmp_path):
    """A client that probes any URL for readiness must not be fooled: refused, then 200, nothing between."""
    port = free_port()
    command = [sys.executable, "-m", "jaxserve", "serve", "--port", str(port), *FLAGS]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        refused, deadline = 0, time.monotonic() + 200
        while time.monotonic() < deadline:
            try:
                answer = httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5)
            except httpx.ConnectError:
                refused += 1
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.05)
                continue
            assert answer.status_code == 200
            break
        assert refused > 0
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0


def test_a_port_in_use_or_a_wrong_flag_fails_before_anything_is_loaded(server):
    port = server.url.rpartition(":")[2]
    for flags, message in (
        (["--port", port], "in use"),
        (["--port", "70000"], "--port"),
        (["--block-size", "12"], "--block-size"),
        (["--max-num-seqs", "64", "--max-num-batched-tokens", "8"], "--max-num-batched-tokens"),
        (["--metrics-prefix", "a b"], "--metrics-prefix"),
        (["--block-size", "16", "--page-size", "32"], "one option"),
        (["--shutdown-timeout", "nan"], "--shutdown-timeout"),
        (["--served-model-name", ""], "--served-model-name"),
        (["--record", "/no-such-folder/record"], "--record"),
        (["--no-such-flag"], "no-such-flag"),
    ):
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "jaxserve", "serve", "no-such-model", *flags],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 2 and message in done.stderr, (flags, done.stderr)
        assert "Traceback" not in done.stderr and time.monotonic() - began < 60


@pytest.mark.slow
def test_converted_weights_serve_the_same_text(server, tmp_path):
    """GGUF to an Orbax folder and back into an engine: same greedy text, tokenizer and template included."""
    folder = tmp_path / "orbax"
    cli = [sys.executable, "-m", "jaxserve"]
    subprocess.run(
        [*cli, "convert", "smollm2", "--to", "orbax", str(folder), "--dtype", "float32"], check=True
    )
    outputs = []
    for model in ("smollm2", str(folder)):
        done = subprocess.run(
            [*cli, "generate", model, "-p", "def fibonacci(n):\n", "--max-tokens", "24", "--dtype", "float32",
             "--enforce-eager", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "64M"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] and "fibonacci" in outputs[0]
    done = subprocess.run(
        [*cli, "chat", str(folder), "-q", "Say hello.", "--max-tokens", "8", "--enforce-eager",
         "--max-num-seqs", "8"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip()


def test_no_server_process_imports_torch(server):
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" not in maps
