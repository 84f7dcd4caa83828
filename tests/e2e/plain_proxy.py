"""The request flow of vLLM's toy proxy, and nothing else: P first with one token, then D with P's parameters.

What drives us in other people's scripts does this, so that the tests that use it say whether P and D alone,
without our router, keep to vLLM's protocol. Written from a description of the flow.
"""

import contextlib
import uuid
from collections.abc import Generator, Mapping
from typing import Any

import httpx

TIMEOUT_S = 180.0
DROPPED = ("stream_options", "min_tokens", "min_completion_tokens")
ASK_TO_KEEP = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def prefill(prefill_url: str, path: str, body: Mapping[str, Any], request_id: str) -> dict[str, Any] | None:
    """P's `kv_transfer_params` for a client's body; None: it gave none."""
    asked = {key: value for key, value in body.items() if key not in DROPPED}
    asked |= {"kv_transfer_params": ASK_TO_KEEP, "stream": False, "max_tokens": 1}
    if "max_completion_tokens" in asked:
        asked["max_completion_tokens"] = 1
    headers = {"X-Request-Id": request_id}
    answer = httpx.post(
        prefill_url + path, json=asked, headers=headers, timeout=TIMEOUT_S, trust_env=False
    ).raise_for_status()
    return answer.json().get("kv_transfer_params")


def complete(prefill_url: str, decode_url: str, path: str, body: Mapping[str, Any]) -> httpx.Response:
    """D's answer, read whole.

    Raises:
        httpx.HTTPStatusError: P refused.
    """
    with stream(prefill_url, decode_url, path, body) as response:
        response.read()
    return response


@contextlib.contextmanager
def stream(
    prefill_url: str, decode_url: str, path: str, body: Mapping[str, Any]
) -> Generator[httpx.Response, None, None]:
    """D's answer as it comes.

    Raises:
        httpx.HTTPStatusError: P refused.
    """
    request_id = str(uuid.uuid4())
    params = prefill(prefill_url, path, body, request_id)
    asked = {**body, "kv_transfer_params": params} if params else body
    with httpx.stream(
        "POST",
        decode_url + path,
        json=asked,
        headers={"X-Request-Id": request_id},
        timeout=TIMEOUT_S,
        trust_env=False,
    ) as response:
        yield response
