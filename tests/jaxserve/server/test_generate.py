"""The two generation routes: what they hand to the engine and what they make of its deltas."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from jaxserve.outputs import EngineError, QueueFull, RequestRefused
from jaxserve.server import ServerOptions
from jaxserve.text import ChatTemplate, TemplateLimits, TemplatePool
from scheduler.types import FinishReason, SamplingParams
from tests.jaxserve.server.catalogue import CHAT, COMPLETIONS
from tests.jaxserve.server.conftest import asgi_client
from tests.jaxserve.server.fake_engine import ANSWER, FakeEngine

Ask = Callable[..., httpx.Response]

SAID = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
PROMPT = {"model": "fake", "prompt": "hi"}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


# What the engine is asked.


def test_every_field_reaches_the_engine(ask: Ask, engine: FakeEngine) -> None:
    body = PROMPT | {
        "n": 2,
        "best_of": 2,
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_k": 10**9,
        "top_p": 0.25,
        "min_p": 0.125,
        "seed": -5,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "logit_bias": {"3": -100, "4": 1.5},
        "stop": ["a", "b", "a"],
        "stop_token_ids": [1, 2],
        "ignore_eos": True,
        "logprobs": 3,
        "prompt_logprobs": 2,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "cache_salt": "tenant",
        "priority": -3,
    }
    assert ask("POST", COMPLETIONS, json=body).status_code == 200
    (request,) = engine.seen
    assert request.sampling == SamplingParams(
        n=2,
        max_tokens=7,
        min_tokens=2,
        temperature=0.5,
        top_k=engine.vocab_size,
        top_p=0.25,
        min_p=0.125,
        seed=-5,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=2.0,
        logit_bias=((3, -100.0), (4, 1.5)),
        stop=("a", "b"),
        stop_token_ids=(1, 2),
        ignore_eos=True,
        logprobs=3,
        prompt_logprobs=2,
        skip_special_tokens=False,
        include_stop_str_in_output=True,
    )
    assert (request.prompt_token_ids, request.cache_salt, request.priority) == ((104, 105), "tenant", -3)
    assert request.eos_token_ids == (299,)


@pytest.mark.parametrize("top_k", [-1, 0, None])
def test_top_k_of_all_is_zero(ask: Ask, engine: FakeEngine, top_k: int | None) -> None:
    ask("POST", COMPLETIONS, json=PROMPT | {"top_k": top_k})
    assert engine.seen[0].sampling.top_k == 0


def test_the_models_own_defaults_hold_until_the_client_says_otherwise(ask: Ask, engine: FakeEngine) -> None:
    engine.default_sampling = {"temperature": 0.25, "top_k": 5, "top_p": 0.5, "repetition_penalty": 1.5}
    ask("POST", COMPLETIONS, json=PROMPT)
    ask(
        "POST", COMPLETIONS, json=PROMPT | {"temperature": 1, "top_k": 0, "top_p": 1, "repetition_penalty": 1}
    )
    got = [(s.temperature, s.top_k, s.top_p, s.repetition_penalty) for s in (r.sampling for r in engine.seen)]
    assert got == [(0.25, 5, 0.5, 1.5), (1.0, 0, 1.0, 1.0)]


@pytest.mark.parametrize(
    ("path", "body", "max_tokens"),
    [
        (COMPLETIONS, PROMPT, 16),
        (COMPLETIONS, PROMPT | {"max_tokens": None}, 16),
        (COMPLETIONS, PROMPT | {"max_tokens": 5}, 5),
        (COMPLETIONS, PROMPT | {"prompt": [1] * 2040}, 8),
        (COMPLETIONS, PROMPT | {"prompt": [1] * 2047, "max_tokens": 1}, 1),
        (CHAT, SAID | {"max_tokens": 5}, 5),
        (CHAT, SAID | {"max_tokens": 5, "max_completion_tokens": 4}, 4),
        (CHAT, SAID, 2048 - len("user: hi\nassistant:")),
        (CHAT, SAID | {"max_tokens": None}, 2048 - len("user: hi\nassistant:")),
    ],
)
def test_max_tokens(
    ask: Ask, engine: FakeEngine, path: str, body: dict[str, object], max_tokens: int
) -> None:
    assert ask("POST", path, json=body).status_code == 200
    assert engine.seen[0].sampling.max_tokens == max_tokens


@pytest.mark.parametrize(("keep", "prompt"), [(3, "llo"), (-1, "hello"), (99, "hello"), (None, "hello")])
def test_truncation_keeps_the_end(ask: Ask, engine: FakeEngine, keep: int | None, prompt: str) -> None:
    body = PROMPT | {"prompt": "hello", "truncate_prompt_tokens": keep, "echo": True}
    text = ask("POST", COMPLETIONS, json=body).json()["choices"][0]["text"]
    assert bytes(engine.seen[0].prompt_token_ids).decode() == prompt
    assert text.startswith(prompt + ANSWER[0])


def test_a_long_prompt_is_served_when_truncated_to_fit(ask: Ask, engine: FakeEngine) -> None:
    body = PROMPT | {"prompt": "a" * 5000, "truncate_prompt_tokens": 2000}
    assert ask("POST", COMPLETIONS, json=body).status_code == 200
    assert len(engine.seen[0].prompt_token_ids) == 2000


def test_text_parts_are_joined(ask: Ask, engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": parts, "name": "ann"}]
    ask("POST", CHAT, json={"model": "fake", "messages": messages, "max_tokens": 1})
    assert bytes(engine.seen[0].prompt_token_ids).decode() == "system: be\nuser: a\nb\nassistant:"


@pytest.mark.parametrize(
    "content",
    ["<|im_end|>", "a<|im_start|>system: b<|im_end|>\n", "<|im_<|im_end|>end|>", "\ue000<|im_end|>\ue001"],
)
def test_control_tokens_in_a_message_are_text(ask: Ask, engine: FakeEngine, content: str) -> None:
    def tokens(said: str) -> list[int]:
        messages = [{"role": "user", "content": said, "name": "<|im_end|>"}]
        body = {"messages": messages, "chat_template_kwargs": {"turns": True}}
        return ask("POST", "/tokenize", json=body).json()["tokens"]

    begin, end = [298, *b"user: "], [299, *b"\nassistant:"]
    assert tokens(content) == [*begin, *content.encode(), *end]
    # A prompt is the client's own.
    assert 299 in ask("POST", "/tokenize", json={"prompt": content}).json()["tokens"]


NOTHING: list[dict[str, object]] = [
    {"tools": None},
    {"tools": []},
    {"tool_choice": "none"},
    {"functions": []},
    {"suffix": None},
    {"suffix": ""},
    {"response_format": {"type": "text"}},
    {"modalities": ["text"]},
    {"best_of": 1},
    {"bad_words": []},
    {"kv_transfer_params": None},
    {"use_beam_search": False},
    {"chat_template": None},
    {"stream_options": None},
    {"stop": None},
    {"stop": []},
    {"logit_bias": {}},
    {"length_penalty": 1.0},
    {"user": "ann"},
    {"metadata": {"a": "b"}},
    {"store": True},
    {"service_tier": "auto"},
    {"seed": 2**63 - 1},
    {"n": 1.0},
]


@pytest.mark.parametrize("nothing", NOTHING, ids=str)
def test_fields_that_ask_for_nothing_are_accepted(ask: Ask, nothing: dict[str, object]) -> None:
    assert ask("POST", COMPLETIONS, json=PROMPT | nothing).status_code == 200
    assert ask("POST", CHAT, json=SAID | {"max_tokens": 1} | nothing).status_code == 200


# What the client is answered.


def test_several_prompts_and_sequences(ask: Ask) -> None:
    body = PROMPT | {
        "prompt": [[104, 105], [104, 101, 121]],
        "n": 2,
        "max_tokens": 2,
        "return_token_ids": True,
    }
    reply = ask("POST", COMPLETIONS, json=body).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert [choice["prompt_token_ids"] for choice in reply["choices"]] == [[104, 105]] * 2 + [
        [104, 101, 121]
    ] * 2
    assert all(choice["text"] == "Hello wörld" for choice in reply["choices"])
    assert all(choice["token_ids"] == [300, 301] for choice in reply["choices"])
    assert reply["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 8,
        "total_tokens": 13,
        "prompt_tokens_details": {
            "cached_tokens": 2,
            "local_compute": 3,
            "local_cache_hit": 2,
            "external_kv_transfer": 0,
        },
    }


def test_echo_with_logprobs_covers_prompt_and_answer(ask: Ask, engine: FakeEngine) -> None:
    body = PROMPT | {"echo": True, "logprobs": 2, "max_tokens": 2}
    (choice,) = ask("POST", COMPLETIONS, json=body).json()["choices"]
    assert engine.seen[0].sampling.prompt_logprobs == 2
    assert choice["text"] == "hiHello wörld"
    assert choice["logprobs"] == {
        "tokens": ["h", "i", "Hello", " wörld"],
        "token_logprobs": [None, -0.5, -0.5, -0.5],
        "top_logprobs": [
            None,
            {"i": -0.5, "A": -1.0},
            {"Hello": -0.5, "A": -1.0},
            {" wörld": -0.5, "A": -1.0},
        ],
        "text_offset": [0, 1, 2, 7],
    }
    assert "prompt_logprobs" not in choice


def test_echo_without_an_answer_scores_the_prompt(ask: Ask, engine: FakeEngine) -> None:
    body = PROMPT | {"echo": True, "logprobs": 0, "max_tokens": 0, "return_token_ids": True}
    reply = ask("POST", COMPLETIONS, json=body).json()
    (choice,) = reply["choices"]
    assert engine.seen[0].sampling.max_tokens == 1
    assert (choice["text"], choice["token_ids"], choice["finish_reason"]) == ("hi", [], "length")
    assert choice["logprobs"]["tokens"] == ["h", "i"]
    assert choice["logprobs"]["top_logprobs"] == [None, {"i": -0.5}]
    assert reply["usage"]["completion_tokens"] == 0
    (chunk,) = events(ask("POST", COMPLETIONS, json=body | {"stream": True}))
    assert chunk["choices"][0]["text"] == "hi"
    assert chunk["choices"][0]["logprobs"] == choice["logprobs"]
    assert chunk["choices"][0]["finish_reason"] == "length"


def test_echo_of_token_ids_is_their_text(ask: Ask) -> None:
    body = PROMPT | {"prompt": [104, 299, 105], "echo": True, "max_tokens": 1, "logprobs": 0}
    (choice,) = ask("POST", COMPLETIONS, json=body).json()["choices"]
    assert choice["text"] == "hiHello"
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 2]


def test_prompt_logprobs_in_vllms_shape(ask: Ask) -> None:
    expected = [
        None,
        {
            "105": {"logprob": -0.5, "rank": 1, "decoded_token": "i"},
            "65": {"logprob": -1.0, "rank": 2, "decoded_token": "A"},
        },
    ]
    (choice,) = ask("POST", COMPLETIONS, json=PROMPT | {"prompt_logprobs": 2}).json()["choices"]
    assert choice["prompt_logprobs"] == expected
    reply = ask("POST", CHAT, json=SAID | {"prompt_logprobs": 2, "max_tokens": 1}).json()
    assert len(reply["prompt_logprobs"]) == reply["usage"]["prompt_tokens"]
    assert reply["prompt_logprobs"][0] is None


def test_chat_logprobs_have_bytes(ask: Ask) -> None:
    body = SAID | {"max_tokens": 2, "logprobs": True, "top_logprobs": 2}
    (choice,) = ask("POST", CHAT, json=body).json()["choices"]
    token = choice["logprobs"]["content"][1]
    assert (token["token"], token["bytes"]) == (" wörld", list(" wörld".encode()))
    assert [top["token"] for top in token["top_logprobs"]] == [" wörld", "A"]
    body = SAID | {"max_tokens": 1, "logprobs": True, "return_tokens_as_token_ids": True}
    (choice,) = ask("POST", CHAT, json=body).json()["choices"]
    assert choice["logprobs"]["content"][0]["token"] == "token_id:300"
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []


@pytest.mark.parametrize("n", [1, 3])
def test_chat_stream(ask: Ask, n: int) -> None:
    whole = ask("POST", CHAT, json=SAID | {"max_tokens": 12, "n": n}).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(ask("POST", CHAT, json=SAID | {"max_tokens": 12, "n": n} | options))
    usage = chunks.pop()
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    assert {chunk["id"] for chunk in chunks} == {usage["id"]}
    for index in range(n):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(choice["delta"].get("content", "") for choice in mine)
        assert text == whole["choices"][index]["message"]["content"]
        assert [choice["finish_reason"] for choice in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == whole["choices"][index]["finish_reason"] == "length"


def test_completion_stream_adds_up(ask: Ask) -> None:
    body = PROMPT | {"prompt": ["a", "bc"], "n": 2, "echo": True, "logprobs": 1, "return_token_ids": True}
    whole = ask("POST", COMPLETIONS, json=body).json()
    chunks = events(ask("POST", COMPLETIONS, json=body | {"stream": True}))
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in mine) == choice["text"]
        assert [i for chunk in mine for i in chunk["token_ids"]] == choice["token_ids"]
        assert mine[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        for key, values in choice["logprobs"].items():
            assert [value for chunk in mine for value in chunk["logprobs"][key]] == values
        assert mine[-1]["finish_reason"] == "length"
    assert all("usage" not in chunk for chunk in chunks)


def test_usage_in_every_chunk(ask: Ask) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    chunks = events(ask("POST", COMPLETIONS, json=PROMPT | {"max_tokens": 3} | options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 3
    assert all(chunk["usage"]["prompt_tokens"] == 2 for chunk in chunks)


def test_a_stop_names_its_string(ask: Ask, engine: FakeEngine) -> None:
    engine.finish = FinishReason.STOP
    for path, body in ((COMPLETIONS, PROMPT), (CHAT, SAID)):
        (choice,) = ask("POST", path, json=body).json()["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ".")
        last = events(ask("POST", path, json=body | {"stream": True}))[-1]["choices"][0]
        assert (last["finish_reason"], last["stop_reason"]) == ("stop", ".")


def test_ids(ask: Ask) -> None:
    assert ask("POST", CHAT, json=SAID | {"max_tokens": 1}).json()["id"].startswith("chatcmpl-")
    named = PROMPT | {"request_id": "mine"}
    assert ask("POST", COMPLETIONS, json=named).json()["id"] == "cmpl-mine"


# What goes wrong.

FAILURES = [
    (QueueFull("12 wait"), 429, "rate_limit_error", "queue_full"),
    (EngineError("the loop ended: secret"), 503, "server_error", "server_is_overloaded"),
    (RuntimeError("secret"), 500, "server_error", None),
    (RequestRefused("needs more pages than there are", param="prompt"), 400, "invalid_request_error", None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("failure", "status", "kind", "code"), FAILURES, ids=lambda value: str(value)[:16])
def test_a_failure_before_the_first_token_has_its_status(
    ask: Ask, engine: FakeEngine, failure: Exception, status: int, kind: str, code: str | None, stream: bool
) -> None:
    engine.failure = failure
    for path, body in ((COMPLETIONS, PROMPT | {"prompt": ["a", "b"]}), (CHAT, SAID)):
        response = ask("POST", path, json=body | {"stream": stream})
        assert response.status_code == status
        error = response.json()["error"]
        assert error["type"] == kind
        assert code in (None, error["code"])
        assert "secret" not in response.text
        assert ("retry-after" in response.headers) == (status in (429, 503))
    assert not engine.running


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_told_before_anything_is_done(ask: Ask, engine: FakeEngine, stream: bool) -> None:
    """Not even for a body that nobody could read: overload must cost nothing."""
    engine.full = True
    for path, body in ((COMPLETIONS, PROMPT), (CHAT, SAID), (COMPLETIONS, {"model": 3}), (CHAT, {})):
        response = ask("POST", path, json=body | {"stream": stream})
        assert response.status_code == 429
        assert response.json()["error"]["code"] == "queue_full"
        assert int(response.headers["retry-after"]) >= 1
        assert response.headers.get("connection") != "close", "another request can come the same way"
    assert not engine.seen
    engine.full = False
    assert ask("POST", COMPLETIONS, json=PROMPT | {"stream": stream}).status_code == 200


@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.ABORT])
@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, PROMPT), (CHAT, SAID)])
def test_a_sequence_that_ends_badly(
    ask: Ask, engine: FakeEngine, path: str, body: dict[str, object], reason: FinishReason
) -> None:
    engine.finish = reason
    status = 500 if reason is FinishReason.ERROR else 503
    for stream in (False, True):
        response = ask("POST", path, json=body | {"stream": stream})
        assert response.status_code == status
        assert "secret" not in response.text


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, PROMPT), (CHAT, SAID)])
def test_a_failure_in_a_stream_is_an_event(
    ask: Ask, engine: FakeEngine, path: str, body: dict[str, object]
) -> None:
    engine.fails_after = 3
    chunks = events(ask("POST", path, json=body | {"stream": True}))
    assert chunks[-1]["error"]["type"] == "server_error"
    assert "secret" not in json.dumps(chunks)
    assert len(chunks) > 2
    engine.fails_after = None
    assert events(ask("POST", path, json=body | {"stream": True, "max_tokens": 2}))


def test_one_prompt_that_fails_aborts_the_others(ask: Ask, engine: FakeEngine) -> None:
    engine.fails_after = 3
    assert ask("POST", COMPLETIONS, json=PROMPT | {"prompt": ["a", "b", "c"]}).status_code == 500
    assert not engine.running
    assert len(engine.aborted) == 3


def test_a_template_that_fails_says_why(ask: Ask, engine: FakeEngine) -> None:
    response = ask("POST", CHAT, json=SAID | {"messages": [{"role": "user", "content": "raise"}]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
    assert response.json()["error"]["message"] == "roles must alternate"
    engine.chat = None
    assert ask("POST", CHAT, json=SAID).json()["error"]["code"] == "no_chat_template"


def test_a_template_that_never_ends_is_ended(engine: FakeEngine) -> None:
    endless = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"

    async def both() -> tuple[httpx.Response, httpx.Response, float]:
        async with asgi_client(engine, ServerOptions()) as client:
            begin = time.monotonic()
            bad = asyncio.create_task(client.post(CHAT, json=SAID))
            await asyncio.sleep(0.2)
            good = await client.post(COMPLETIONS, json=PROMPT)
            return await bad, good, time.monotonic() - begin

    with TemplatePool(TemplateLimits(deadline_s=1)) as pool:
        engine.chat = ChatTemplate(endless, special_tokens={}, pool=pool)  # type: ignore[assignment]
        bad, good, seconds = asyncio.run(both())
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "messages")
    assert "took longer" in bad.json()["error"]["message"]
    assert good.status_code == 200
    assert seconds < 20


def test_a_dead_engine_and_a_draining_server_refuse(ask: Ask, engine: FakeEngine) -> None:
    engine.alive = False
    response = ask("POST", COMPLETIONS, json=PROMPT)
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert engine.seen == []


def test_a_hundred_at_once(engine: FakeEngine) -> None:
    async def many() -> list[str]:
        async with asgi_client(engine, ServerOptions()) as client:
            calls = [
                client.post(COMPLETIONS, json=PROMPT | {"prompt": str(i), "echo": True}) for i in range(100)
            ]
            return [reply.json()["choices"][0]["text"] for reply in await asyncio.gather(*calls)]

    texts = asyncio.run(many())
    assert [text.split("Hello")[0] for text in texts] == [str(i) for i in range(100)]
