"""One streamed request to an OpenAI endpoint, timed."""

import asyncio
import json
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from jaxserve.bench.datasets import Prompt
from jaxserve.bench.stats import RequestRecord

LONGEST_MESSAGE = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A server to measure.

    Attributes:
        label: its name in tables.
        url: up to and with "/v1".
        model: the name that requests carry.
    """

    label: str
    url: str
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What every request of a run asks for.

    Attributes:
        chat: use /chat/completions.
        output_len: tokens to ask for, where the prompt does not say.
        extra: keys to add to the body.
        timeout_s: bound on a whole request.
    """

    chat: bool
    output_len: int
    ignore_eos: bool = False
    temperature: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 600.0


class BadStream(Exception):
    """The server answered, and not with a good stream. Its text is for people."""


def body_of(endpoint: Endpoint, ask: Ask, prompt: Prompt) -> tuple[str, dict[str, Any]]:
    """Path and JSON body of a request.

    Raises:
        ValueError: a prompt that this endpoint has no words for.
    """
    body: dict[str, Any] = {
        "model": endpoint.model,
        "max_tokens": prompt.output_len or ask.output_len,
        "temperature": ask.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if ask.ignore_eos:
        body["ignore_eos"] = True
    body |= ask.extra
    if ask.chat:
        if prompt.token_ids is not None:
            raise ValueError("chat completions take no token ids; use text or messages")
        messages = prompt.messages or ({"role": "user", "content": prompt.text},)
        return "/chat/completions", body | {"messages": list(messages)}
    if prompt.messages is not None:
        raise ValueError("completions take no messages; use --endpoint chat")
    return "/completions", body | {
        "prompt": prompt.text if prompt.text is not None else list(prompt.token_ids or ())
    }


async def events(chunks: AsyncIterable[bytes]) -> AsyncIterator[str]:
    """The data of server-sent events, one string each, however the bytes were cut."""
    rest = b""
    data: list[bytes] = []
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data).decode()
                data = []
    if data:
        yield b"\n".join(data).decode()


def carries_tokens(event: Mapping[str, Any]) -> bool:
    """Whether an event of either endpoint brings new tokens; a chat's opening role does not."""
    choices = event.get("choices") or [{}]
    part = choices[0].get("delta", choices[0])
    return bool(
        part.get("text")
        or part.get("content")
        or part.get("reasoning_content")
        or part.get("reasoning")
        or choices[0].get("token_ids")
    )


@dataclass(slots=True)
class _Answer:
    """What has come of an answer so far."""

    arrivals: list[float] = field(default_factory=list)
    usage: Mapping[str, Any] = field(default_factory=dict)
    finished: bool = False


async def request(
    client: httpx.AsyncClient,
    endpoint: Endpoint,
    ask: Ask,
    prompt: Prompt,
    *,
    due: float,
    clock: Callable[[], float],
) -> RequestRecord:
    """Send one prompt and read its answer to the end.

    Args:
        due: when the request should have been sent, on `clock`; its times count from there.
        clock: seconds, ascending.

    Returns:
        Its record. A failure of the network or the server is in its `error` and raises nothing.
    """
    path, body = body_of(endpoint, ask, prompt)
    answer = _Answer()
    error = None
    try:
        async with asyncio.timeout(ask.timeout_s):
            await _stream(client, endpoint.url + path, body, answer, clock)
    except TimeoutError:
        error = f"no complete answer in {ask.timeout_s:g} s"
    except BadStream as bad:
        error = str(bad)
    except httpx.HTTPError as failed:
        error = f"{type(failed).__name__}: {failed}".removesuffix(": ")
    end = clock()
    details = answer.usage.get("prompt_tokens_details") or {}
    output_tokens = answer.usage.get("completion_tokens")
    if not answer.arrivals and output_tokens:
        answer.arrivals.append(
            end
        )  # Tokens without text, such as control tokens: all that is known is that they came.
    return RequestRecord(
        start=due,
        end=end,
        arrivals=tuple(answer.arrivals),
        prompt_tokens=answer.usage.get("prompt_tokens"),
        output_tokens=len(answer.arrivals) if output_tokens is None else output_tokens,
        cached_tokens=details.get("cached_tokens"),
        error=error,
    )


async def _stream(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], answer: _Answer, clock: Callable[[], float]
) -> None:
    async with client.stream("POST", url, json=body) as response:
        if response.status_code != 200:
            raise BadStream(f"HTTP {response.status_code}: {_message(await response.aread())}")
        async for data in events(response.aiter_bytes()):
            if data == "[DONE]":
                answer.finished = True
                continue  # Read to the end of the body, so that the connection can be used again.
            now = clock()
            try:
                event = json.loads(data)
            except json.JSONDecodeError as error:
                raise BadStream(f"not JSON in the stream: {data[:80]!r}") from error
            if event.get("error"):
                raise BadStream(_message(data.encode()))
            if carries_tokens(event):
                answer.arrivals.append(now)
            if event.get("usage"):
                answer.usage = event["usage"]
    if not answer.finished:
        raise BadStream("the stream ended before it was done")


def _message(content: bytes) -> str:
    """The message of an OpenAI error object, or else the beginning of whatever came."""
    try:
        error = json.loads(content)["error"]
        message = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        message = content.decode(errors="replace")
    return " ".join(str(message).split())[:LONGEST_MESSAGE]


async def first_model(client: httpx.AsyncClient, url: str) -> str:
    """The first model that a server names.

    Raises:
        BadStream: it does not answer, or names none.
    """
    try:
        response = await client.get(f"{url}/models", timeout=10)
        return response.raise_for_status().json()["data"][0]["id"]
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise BadStream(f"{url}/models does not name a model ({type(error).__name__}: {error})") from error
