"""Reading streams, and what a request says."""

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.bench.client import Ask, Endpoint, body_of, carries_tokens, events
from jaxserve.bench.datasets import Prompt

ENDPOINT = Endpoint(label="A", url="http://a/v1", model="m")
STREAM = 'data: {"text": "é"}\r\n\r\n: ping\n\nevent: x\ndata:two\ndata: lines\n\ndata: [DONE]\n\n'.encode()


def read(chunks: list[bytes]) -> list[str]:
    async def source() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    async def collect() -> list[str]:
        return [event async for event in events(source())]

    return asyncio.run(collect())


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
@settings(deadline=None, max_examples=50)
def test_events_are_the_same_however_the_bytes_are_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    chunks = [STREAM[a:b] for a, b in pairwise(edges)]
    assert read(chunks) == ['{"text": "é"}', "two\nlines", "[DONE]"]


def test_a_last_event_without_an_empty_line() -> None:
    assert read([b"data: a\n\ndata: b\n"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("event", "carries"),
    [
        ({"choices": [{"text": "a"}]}, True),
        ({"choices": [{"text": ""}]}, False),
        ({"choices": [{"text": "", "token_ids": [5]}]}, True),
        ({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, False),
        ({"choices": [{"delta": {"content": "a"}}]}, True),
        ({"choices": [{"delta": {"reasoning_content": "a"}}]}, True),
        ({"choices": [], "usage": {}}, False),
    ],
)
def test_which_events_count(event: dict[str, object], carries: bool) -> None:
    assert carries_tokens(event) is carries


def test_a_completion_body() -> None:
    ask = Ask(chat=False, output_len=9, ignore_eos=True, extra={"top_k": 3})
    path, body = body_of(ENDPOINT, ask, Prompt(token_ids=(1, 2)))
    assert path == "/completions"
    assert body == {
        "model": "m",
        "prompt": [1, 2],
        "max_tokens": 9,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "top_k": 3,
    }


def test_a_chat_body() -> None:
    ask = Ask(chat=True, output_len=9)
    path, body = body_of(ENDPOINT, ask, Prompt(text="hi", output_len=2))
    assert path == "/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "hi"}]
    assert body["max_tokens"] == 2 and "ignore_eos" not in body


def test_prompts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="no token ids"):
        body_of(ENDPOINT, Ask(chat=True, output_len=1), Prompt(token_ids=(1,)))
    with pytest.raises(ValueError, match="no messages"):
        body_of(ENDPOINT, Ask(chat=False, output_len=1), Prompt(messages=({"role": "user"},)))
