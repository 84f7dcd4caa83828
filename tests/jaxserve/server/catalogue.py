"""Bad requests, and what each must be answered with. Written for any model; the server lives through all."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
JSON_HEADERS = {"content-type": "application/json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad:
    """One bad request.

    Attributes:
        name: for the test's id.
        path: route.
        body: bytes as sent.
        status: expected.
        param: expected `error.param`.
        code: expected `error.code`; None: not checked.
        headers: as sent.
    """

    name: str
    path: str
    body: bytes
    status: int = 400
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON_HEADERS))


def catalogue(model: str, vocab_size: int, max_model_len: int) -> list[Bad]:
    """Every bad request that applies to a model of this size."""
    return [
        *_bodies(),
        *_fields(model, vocab_size, max_model_len),
        *_prompts(model, vocab_size, max_model_len),
        *_chats(model),
        *_unsupported(model),
        *_transfers(model),
        *_tokens(model, vocab_size),
    ]


def _bodies() -> Iterator[Bad]:
    raw = {
        "empty": b"",
        "open-brace": b"{",
        "trailing-comma": b'{"model": "m",}',
        "trailing-text": b"{}x",
        "array": b"[]",
        "string": b'"a"',
        "null": b"null",
        "number": b"1",
        "invalid-utf8": b'{"prompt": "\xff\xfe"}',
        "bom": b'\xef\xbb\xbf{"model": "m"}',
        "utf16": '{"model": "m"}'.encode("utf-16"),
        "deep-arrays": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "deep-objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    }
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
        for name, body in raw.items():
            yield Bad(name=f"{name}-{path}", path=path, body=body, code="invalid_json")
        yield Bad(name=f"duplicate-{path}", path=path, body=b'{"model": "a", "model": "b"}', param="model")
        for kind in (
            "text/plain",
            "multipart/form-data; boundary=x",
            "application/x-www-form-urlencoded",
            "",
        ):
            headers = {"content-type": kind}
            yield Bad(name=f"type-{kind}-{path}", path=path, body=b"{}", status=415, headers=headers)
        gzip = JSON_HEADERS | {"content-encoding": "gzip"}
        code = "unsupported_encoding"
        yield Bad(name=f"gzip-{path}", path=path, body=b"{}", status=415, code=code, headers=gzip)
        too_large = b'{"prompt": "' + b"a" * (17 << 20) + b'"}'
        yield Bad(name=f"too-large-{path}", path=path, body=too_large, status=413, code="request_too_large")


def _fields(model: str, vocab_size: int, max_model_len: int) -> Iterator[Bad]:
    """Values that both generation routes refuse."""
    bad: dict[str, list[str]] = {
        "max_tokens": [
            "-1",
            "1.5",
            '"5"',
            "true",
            "[]",
            "9223372036854775808",
            str(max_model_len + 1),
            "9" * 5000,
        ],
        "min_tokens": ["-1", "1.5", "9223372036854775807", str(max_model_len + 1)],
        "n": ["0", "-1", "129", "5000000", "1.5", '"1"', "true", "9" * 30],
        "temperature": ["-0.1", "2.1", "NaN", "Infinity", "-Infinity", "1e999", '"1"', "true", "[1]"],
        "top_p": ["0", "-1", "1.0001", "NaN", '"1"'],
        "top_k": ["-2", "2.5", "2147483648", "1e300", '"1"', "false"],
        "min_p": ["-0.1", "2", "NaN"],
        "repetition_penalty": ["0", "-1", "1e308", "NaN"],
        "presence_penalty": ["2.1", "-2.1", "NaN", "1e308"],
        "frequency_penalty": ["2.1", "-2.1", "Infinity", '"0"'],
        "seed": ["18446744073709551616", "9223372036854775808", "1.5", '"1"', "true"],
        "stop": [
            '""',
            "[null]",
            "[1]",
            "1",
            "{}",
            '[""]',
            json.dumps(["a" * 500_000]),
            json.dumps(["x"] * 17),
            json.dumps([str(i) for i in range(10_000)]),
        ],
        "stop_token_ids": ["[-1]", f"[{vocab_size}]", "[1.5]", '["1"]', "[true]", "1", json.dumps([1] * 129)],
        "logit_bias": [
            f'{{"{vocab_size}": 1}}',
            '{"-1": 1}',
            '{"a": 1}',
            '{"1": 101}',
            '{"1": "1"}',
            '{"1": true}',
            "[]",
            '{"1": NaN}',
            '{"1": 1, "01": 2}',
            json.dumps({str(i): 1 for i in range(1025)}),
        ],
        "ignore_eos": ["1", '"true"', "[]"],
        "skip_special_tokens": ["0", '"no"'],
        "include_stop_str_in_output": ['"yes"'],
        "stream": ["1", '"true"', "[]"],
        "stream_options": ['{"include_usage": true}', "[]", "true"],
        "prompt_logprobs": ["-1", "21", "1.5", "true"],
        "truncate_prompt_tokens": ["0", "-2", str(max_model_len + 1), "1.5", '"1"'],
        "cache_salt": ['""', '"\\u0000"', "1", json.dumps("a" * 257)],
        "priority": ["1.5", '"high"', "2147483648"],
        "request_id": ['""', '"a\\nb"', "1", json.dumps("a" * 129)],
        "user": ["1", '"a\\u0000b"', json.dumps("a" * 513)],
        "metadata": ["1", "[]", json.dumps({str(i): "" for i in range(17)}), json.dumps({"k" * 65: "v"})],
        "metadata.k": ['{"k": 1}', json.dumps({"k": "v" * 513})],
        "return_token_ids": ['"yes"'],
        "best_of": ["0", "10", "1000000000"],
        "echo": ["1", '"a"'],
        "add_special_tokens": ["1"],
        "model": ["null", "1", '""', '"a\\u0000"', json.dumps("a" * 500_000)],
    }
    for route, prompt in (
        (COMPLETIONS, '"prompt": "hi"'),
        (CHAT, '"messages": [{"role": "user", "content": "hi"}]'),
    ):
        for param, values in bad.items():
            key = param.partition(".")[0]
            for value in values:
                parts = [prompt, f'"{key}": {value}']
                if key != "model":
                    parts.append(f'"model": {json.dumps(model)}')
                body = ("{" + ", ".join(parts) + "}").encode()
                named = "logit_bias.1" if value == '{"1": NaN}' else param
                yield Bad(name=f"{route}-{param}-{value[:24]}", path=route, body=body, param=named)
        for name in ("nobody/knows", "../../etc/passwd", "https://example.org/m"):
            body = ("{" + prompt + f', "model": "{name}"}}').encode()
            code = "model_not_found"
            yield Bad(
                name=f"{route}-model-{name}", path=route, body=body, status=404, param="model", code=code
            )
        body = ("{" + prompt + f', "model": {json.dumps(model)}, "max_tokens": 2, "min_tokens": 3}}').encode()
        yield Bad(name=f"{route}-min-over-max", path=route, body=body, param="min_tokens")
        body = ("{" + prompt + "}").encode()
        yield Bad(name=f"{route}-no-model", path=route, body=body, param="model")


def _prompts(model: str, vocab_size: int, max_model_len: int) -> Iterator[Bad]:
    def bad(name: str, prompt: object, code: str | None = None, param: str = "prompt", **more: object) -> Bad:
        body = json.dumps({"model": model, "prompt": prompt, **more}).encode()
        return Bad(name=f"prompt-{name}", path=COMPLETIONS, body=body, param=param, code=code)

    yield bad("null", None)
    yield bad("empty", "")
    yield bad("empty-list", [])
    yield bad("empty-string-in-list", ["a", ""])
    yield bad("empty-ids-in-list", [[1], []])
    yield bad("number", 1)
    yield bad("object", {"a": 1})
    yield bad("nulls", [None])
    yield bad("mixed", ["a", [1]])
    yield bad("mixed-ids", [1, "a"])
    yield bad("deep", [[[1]]])
    yield bad("floats", [1.0, 2.5])
    yield bad("booleans", [True])
    yield bad("65-prompts", ["a"] * 65)
    yield bad("many-prompts", ["a"] * 100_000)
    for token_id in (-1, vocab_size, 2**31, 2**63 - 1):
        yield bad(f"token-{token_id}", [1, token_id], "token_out_of_range")
        yield bad(f"tokens-{token_id}", [[1], [token_id]], "token_out_of_range")
    full = "context_length_exceeded"
    yield bad("fills-context", [1] * max_model_len, full)
    yield bad("over-context", [1] * (max_model_len + 1), full)
    yield bad(
        "far-over-context", [1] * (100 * max_model_len) if max_model_len <= 2048 else "a b" * 300_000, full
    )
    yield bad("text-over-context", "a b" * (2 * max_model_len), full)
    yield bad("no-room", [1] * (max_model_len - 1), full, "max_tokens", max_tokens=2)
    yield bad("max-tokens-0", "hi", None, "max_tokens", max_tokens=0)
    yield bad("logprobs-negative", "hi", None, "logprobs", logprobs=-1)
    yield bad("logprobs-21", "hi", None, "logprobs", logprobs=21)
    yield bad("logprobs-huge", "hi", None, "logprobs", logprobs=10**9)
    yield bad("logprobs-true", "hi", None, "logprobs", logprobs=True)
    yield bad("n-times-prompts", ["a"] * 64, None, "n", n=17)
    yield bad("prompt-logprobs-streamed", "a", None, "prompt_logprobs", prompt_logprobs=1, stream=True)
    surrogate = f'{{"model": {json.dumps(model)}, "prompt": "a\\ud800"}}'.encode()
    yield Bad(name="prompt-surrogate", path=COMPLETIONS, body=surrogate, param="prompt")
    missing = json.dumps({"model": model}).encode()
    yield Bad(name="prompt-missing", path=COMPLETIONS, body=missing, param="prompt")


def _chats(model: str) -> Iterator[Bad]:
    def bad(name: str, param: str, messages: object = None, code: str | None = None, **more: object) -> Bad:
        said = [{"role": "user", "content": "hi"}] if messages is None else messages
        body = json.dumps({"model": model, "messages": said, **more}).encode()
        return Bad(name=f"chat-{name}", path=CHAT, body=body, param=param, code=code)

    yield bad("empty", "messages", [])
    yield bad("string", "messages", "hi")
    yield bad("many", "messages", [{"role": "user", "content": "a"}] * 10_000)
    yield bad("no-object", "messages[0]", ["hi"])
    yield bad("no-role", "messages[0].role", [{"content": "hi"}])
    yield bad("role", "messages[0].role", [{"role": "root", "content": "hi"}])
    yield bad("role-number", "messages[0].role", [{"role": 1, "content": "hi"}])
    yield bad("null-content", "messages[0].content", [{"role": "user", "content": None}])
    yield bad("number-content", "messages[0].content", [{"role": "user", "content": 1}])
    yield bad("string-part", "messages[0].content[0]", [{"role": "user", "content": ["hi"]}])
    yield bad("long-name", "messages[0].name", [{"role": "user", "content": "hi", "name": "}" * 1024}])
    for kind in ("image_url", "input_audio", "video_url", "file", "nothing"):
        url = {"url": "file:///etc/passwd"}
        part = [{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": kind, kind: url}]}]
        yield bad(f"part-{kind}", "messages[0].content[1].type", part, "unsupported_content")
    calls = [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]
    yield bad("tool-calls", "messages[0].tool_calls", calls, "unsupported_parameter")
    yield bad("logprobs-number", "logprobs", logprobs=3)
    yield bad("top-logprobs-alone", "top_logprobs", top_logprobs=3)
    yield bad("top-logprobs-21", "top_logprobs", logprobs=True, top_logprobs=21)
    yield bad("top-logprobs-negative", "top_logprobs", logprobs=True, top_logprobs=-1)
    yield bad("top-logprobs-huge", "top_logprobs", logprobs=True, top_logprobs=10**9)
    yield bad("max-tokens-0", "max_tokens", max_tokens=0)
    yield bad("max-completion-tokens-0", "max_completion_tokens", max_completion_tokens=0)
    yield bad("max-completion-tokens", "max_completion_tokens", max_completion_tokens=10**9)
    yield bad("echo", "echo", echo=True)
    yield bad("template", "chat_template", chat_template="{% for a in b %}")
    for key, value in (
        ("chat_template", "x"),
        ("messages", "x"),
        ("tools", []),
        ("a b", 1),
        ("__class__", 1),
    ):
        yield bad(f"kwargs-{key}", f"chat_template_kwargs.{key}", chat_template_kwargs={key: value})
    yield bad("kwargs-deep", "chat_template_kwargs.a", chat_template_kwargs={"a": [1]})
    yield bad("kwargs-list", "chat_template_kwargs", chat_template_kwargs=[1])
    yield bad("continue", "continue_final_message", continue_final_message=True, add_generation_prompt=True)


def _unsupported(model: str) -> Iterator[Bad]:
    refused: dict[str, object] = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "auto",
        "functions": [{"name": "f"}],
        "function_call": "auto",
        "response_format": {"type": "json_object"},
        "structured_outputs": {"json": {}},
        "guided_json": {"type": "object"},
        "guided_regex": "a+",
        "guided_choice": ["a"],
        "guided_grammar": "root ::= 'a'",
        "prompt_embeds": "AAAA",
        "lora_request": {"name": "a"},
        "audio": {"voice": "a"},
        "modalities": ["text", "audio"],
        "logits_processors": ["a.b"],
        "bad_words": ["a"],
        "allowed_token_ids": [1],
        "use_beam_search": True,
        "length_penalty": 2.0,
        "suffix": "the end",
        "chat_template": "{{ messages }}",
        "best_of": 2,
    }
    prompts = ((COMPLETIONS, {"prompt": "hi"}), (CHAT, {"messages": [{"role": "user", "content": "hi"}]}))
    for path, prompt in prompts:
        for key, value in refused.items():
            body = json.dumps({"model": model, **prompt, key: value}).encode()
            code = "unsupported_parameter"
            yield Bad(name=f"unsupported-{key}-{path}", path=path, body=body, param=key, code=code)


FORGED: dict[str, object] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[1, 2, 3]],
    "remote_engine_id": "somebody",
    "remote_request_id": "cmpl-1",
    "remote_host": "10.0.0.1",
    "remote_port": 1,
    "tp_size": 1,
    "remote_num_tokens": 2,
}
"""What a prefill engine answers with, but for what proves it."""


def _transfers(model: str) -> Iterator[Bad]:
    """`kv_transfer_params` that no engine takes, whatever it is connected to."""
    forged: dict[str, object] = {
        "forged": FORGED,
        "metadata-service": FORGED | {"remote_host": "169.254.169.254", "remote_port": 80},
        "host-number": FORGED | {"remote_host": 1},
        "host-long": FORGED | {"remote_host": "a" * 100_000},
        "host-lines": FORGED | {"remote_host": "a\r\nHost: b"},
        "port-0": FORGED | {"remote_port": 0},
        "port-high": FORGED | {"remote_port": 65536},
        "port-text": FORGED | {"remote_port": "22"},
        "tp-huge": FORGED | {"tp_size": 10**9},
        "tp-0": FORGED | {"tp_size": 0},
        "ids-huge": FORGED | {"remote_block_ids": [[2**63 - 1]]},
        "ids-negative": FORGED | {"remote_block_ids": [[-1]]},
        "ids-flat": FORGED | {"remote_block_ids": [1]},
        "ids-text": FORGED | {"remote_block_ids": "1"},
        "ids-many": FORGED | {"remote_block_ids": [list(range(100_000))]},
        "groups-many": FORGED | {"remote_block_ids": [[1]] * 100_000},
        "tokens-negative": FORGED | {"remote_num_tokens": -1},
        "engine-list": FORGED | {"remote_engine_id": ["a"]},
        "request-of-another": FORGED | {"remote_request_id": "cmpl-2"},
        "mac-text": FORGED | {"mac": "0" * 64, "epoch": "0" * 32, "generations": [[1, 2, 3]]},
        "mac-list": FORGED | {"mac": [[]], "epoch": {}, "generations": None},
        "both": FORGED | {"do_remote_decode": True},
        "prefill-text": {"do_remote_prefill": "yes"},
        "many-keys": {str(key): 1 for key in range(65)},
        "list": [FORGED],
        "empty-list": [],
        "text": "do_remote_prefill",
        "number": 1,
        "true": True,
        "false": False,
    }
    prompts = ((COMPLETIONS, {"prompt": "hi"}), (CHAT, {"messages": [{"role": "user", "content": "hi"}]}))
    for path, prompt in prompts:
        for name, value in forged.items():
            body = json.dumps({"model": model, **prompt, "kv_transfer_params": value}).encode()
            yield Bad(name=f"transfer-{name}-{path}", path=path, body=body, param="kv_transfer_params")
    decode = {"do_remote_decode": True, "do_remote_prefill": False}
    body = json.dumps({"model": model, "prompt": ["a", "b"], "kv_transfer_params": decode}).encode()
    yield Bad(name="transfer-two-prompts", path=COMPLETIONS, body=body, param="kv_transfer_params")


def _tokens(model: str, vocab_size: int) -> Iterator[Bad]:
    def bad(path: str, name: str, param: str, status: int = 400, **body: object) -> Bad:
        return Bad(
            name=f"{path}-{name}", path=path, body=json.dumps(body).encode(), status=status, param=param
        )

    yield bad("/tokenize", "nothing", "prompt")
    yield bad("/tokenize", "number", "prompt", prompt=1)
    yield bad("/tokenize", "both", "messages", prompt="a", messages=[{"role": "user", "content": "a"}])
    yield bad("/tokenize", "strs", "return_token_strs", prompt="a", return_token_strs=1)
    yield bad("/tokenize", "model", "model", 404, prompt="a", model="nope")
    template = {"messages": [{"role": "user", "content": "a"}], "chat_template": "x"}
    yield bad("/tokenize", "template", "chat_template", **template)
    yield bad("/detokenize", "nothing", "tokens", model=model)
    yield bad("/detokenize", "string", "tokens", tokens="a")
    yield bad("/detokenize", "negative", "tokens", tokens=[-1])
    yield bad("/detokenize", "vocabulary", "tokens", tokens=[vocab_size])
    yield bad("/detokenize", "float", "tokens", tokens=[1.5])
    yield bad("/detokenize", "model", "model", 404, tokens=[1], model="nope")
