"""The official client, against a real port."""

import asyncio

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from jaxserve.outputs import QueueFull
from jaxserve.server import ServerOptions
from scheduler.types import FinishReason
from tests.jaxserve.server.conftest import Live, live_server
from tests.jaxserve.server.fake_engine import ANSWER, FakeEngine

SAID = [{"role": "user", "content": "hi"}]
TEXT = "".join(ANSWER)


@pytest.fixture
def client(live: Live):
    with OpenAI(base_url=f"{live.url}/v1", api_key="anything", max_retries=0) as client:
        yield client


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake", "alias/with-slash"]
    assert client.models.retrieve("alias/with-slash").model_extra["max_model_len"] == 2048


def test_completion(client: OpenAI) -> None:
    reply = client.completions.create(
        model="fake", prompt=["hi", "yo"], max_tokens=10, n=2, logprobs=2, echo=True, extra_body={"top_k": 5}
    )
    assert [choice.text for choice in reply.choices] == ["hi" + TEXT] * 2 + ["yo" + TEXT] * 2
    assert reply.choices[0].logprobs.tokens[:3] == ["h", "i", "Hello"]
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 40
    assert reply.usage.prompt_tokens_details.cached_tokens == 2
    assert reply.usage.prompt_tokens_details.model_extra["local_compute"] == 2


def test_completion_stream(client: OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="fake",
            prompt=[104, 105],
            max_tokens=10,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = ["", ""]
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [TEXT, TEXT]
    assert chunks[-1].usage.total_tokens == 22


def test_chat(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model="fake", messages=SAID, max_completion_tokens=10, n=2, logprobs=True, top_logprobs=2, seed=1
    )
    assert [choice.message.content for choice in reply.choices] == [TEXT, TEXT]
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].logprobs.content[1].bytes == list(" wörld".encode())
    assert len(reply.choices[0].logprobs.content[1].top_logprobs) == 2
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 20


def test_chat_stream(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="fake",
            messages=SAID,
            max_tokens=10,
            n=2,
            logprobs=True,
            top_logprobs=1,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts, roles = ["", ""], []
    for chunk in chunks[:-1]:
        delta = chunk.choices[0].delta
        texts[chunk.choices[0].index] += delta.content or ""
        roles += [delta.role] if delta.role else []
    assert (texts, roles) == ([TEXT, TEXT], ["assistant", "assistant"])
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 20)


def test_the_clients_own_stream_reader(client: OpenAI, live: Live) -> None:
    live.engine.finish = FinishReason.STOP
    with client.chat.completions.stream(model="fake", messages=SAID, max_tokens=10) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == ANSWER[0]


def test_closing_a_stream_aborts(live: Live) -> None:
    live.engine.step_s = 0.01

    async def take_one() -> str:
        async with AsyncOpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0) as client:
            stream = await client.completions.create(model="fake", prompt="hi", max_tokens=2000, stream=True)
            async for chunk in stream:
                await stream.close()
                return chunk.choices[0].text
        return ""

    assert asyncio.run(take_one()) == "Hello"
    for _ in range(200):
        if not live.engine.running:
            break
        asyncio.run(asyncio.sleep(0.01))
    assert len(live.engine.aborted) == 1


def test_errors_have_their_types(client: OpenAI, live: Live) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fake", prompt="hi", max_tokens=10**6)
    assert (caught.value.param, caught.value.code) == ("max_tokens", "context_length_exceeded")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nope", messages=SAID)
    live.engine.failure = QueueFull("full")
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="fake", prompt="hi")
    live.engine.failure, live.engine.fails_after = None, 2
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="fake", prompt="hi")
    with pytest.raises(openai.APIError, match="X-Request-Id"):
        list(client.completions.create(model="fake", prompt="hi", stream=True))


def test_a_full_queue_is_tried_again(live: Live) -> None:
    live.engine.failure = QueueFull("full")
    with OpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=1) as client:
        live.loop.call_later(0.3, setattr, live.engine, "failure", None)
        assert client.completions.create(model="fake", prompt="hi", max_tokens=1).choices[0].text == "Hello"
    assert len(live.engine.seen) == 2


def test_api_keys() -> None:
    with live_server(FakeEngine(), ServerOptions(port=0, api_keys=("right",))) as live:
        with OpenAI(base_url=f"{live.url}/v1", api_key="right") as client:
            assert client.models.list().data[0].id == "fake"
        with (
            OpenAI(base_url=f"{live.url}/v1", api_key="wrong") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()
