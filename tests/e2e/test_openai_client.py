"""The official client against a real server with the default model."""

from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from tests.e2e.conftest import Server

pytestmark = pytest.mark.e2e

MODEL = "smollm2"
PROMPT = "The capital of France is"
SAID = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="anything", max_retries=0, timeout=180) as client:
        yield client


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_completion_whole_and_streamed(client: OpenAI) -> None:
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked)
    assert "Paris" in whole.choices[0].text
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_several_prompts_as_token_ids(client: OpenAI) -> None:
    asked = {"model": MODEL, "max_tokens": 4, "temperature": 0, "extra_body": {"return_token_ids": True}}
    texts = client.completions.create(prompt=[PROMPT, "One two three"], **asked)
    ids = [choice.model_extra["prompt_token_ids"] for choice in texts.choices]
    tokens = client.completions.create(prompt=ids, **asked)
    assert [choice.text for choice in tokens.choices] == [choice.text for choice in texts.choices]
    assert tokens.usage.prompt_tokens == sum(map(len, ids))


def test_logprobs_and_echo(client: OpenAI) -> None:
    reply = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=3, temperature=0, echo=True, logprobs=2
    )
    choice = reply.choices[0]
    assert choice.text.startswith(PROMPT) and "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
    for offset, token in zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True):
        assert choice.text[offset:].startswith(token)
    greedy = zip(choice.logprobs.tokens[-3:], choice.logprobs.top_logprobs[-3:], strict=True)
    assert all(max(top, key=top.__getitem__) == token for token, top in greedy)


def test_echo_alone_scores_the_prompt(client: OpenAI) -> None:
    reply = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=0, echo=True, logprobs=0)
    assert reply.choices[0].text == PROMPT
    assert len(reply.choices[0].logprobs.tokens) == reply.usage.prompt_tokens
    assert reply.usage.completion_tokens == 0


def test_chat_whole_and_streamed(client: OpenAI) -> None:
    asked = {"model": MODEL, "messages": SAID, "max_completion_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    message = whole.choices[0].message
    assert message.role == "assistant" and "Paris" in message.content
    written = b"".join(bytes(token.bytes) for token in whole.choices[0].logprobs.content)
    assert written.decode().startswith(message.content)
    parts = [{"role": "user", "content": [{"type": "text", "text": SAID[0]["content"]}]}]
    chunks = list(
        client.chat.completions.create(
            **asked | {"messages": parts}, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_n_sequences_with_a_seed_come_back_the_same(client: OpenAI) -> None:
    asked = {"model": MODEL, "prompt": "My favourite animal is", "max_tokens": 8, "n": 3, "seed": 7}
    first = [choice.text for choice in client.completions.create(**asked).choices]
    second = [choice.text for choice in client.completions.create(**asked).choices]
    assert first == second and len(set(first)) > 1
    streamed = ["", "", ""]
    for chunk in client.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == first


def test_a_stop_string_ends_the_text(client: OpenAI) -> None:
    reply = client.completions.create(
        model=MODEL, prompt="1, 2, 3, 4,", max_tokens=30, temperature=0, stop=[" 7"]
    )
    assert " 7" not in reply.choices[0].text and "6" in reply.choices[0].text
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].model_extra["stop_reason"] == " 7"


def test_errors_have_their_types(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=SAID)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=SAID, response_format={"type": "json_object"})
    assert refused.value.param == "response_format"
