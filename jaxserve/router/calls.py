"""What the router asks of P and of D for one request of a client. Pure.

P gets a copy of the body that asks for one token and for its KV to be kept; D gets the client's body with
what P answered (the request flow of vLLM's proxies).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from jaxserve.api.body import parse_object
from jaxserve.api.errors import invalid
from jaxserve.api.fields import INT64_MAX, Fields, names

PARAMS = "kv_transfer_params"

ASK_TO_KEEP: Mapping[str, object] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""P's `kv_transfer_params`: compute the prompt and keep its pages for another server."""

DECODE_ONLY = names(
    "stream_options min_tokens min_completion_tokens best_of logprobs top_logprobs echo prompt_logprobs "
    "return_token_ids"
)
"""Fields that P does not get: they shape the answer, which D gives, or contradict one token."""

COUNTS = names("max_tokens max_completion_tokens min_tokens min_completion_tokens n best_of")
"""Fields that P does not see as the client wrote them, checked here: else P would work for a bad request."""

DIRECT_REASONS = ("prompt_logprobs", "several_prompts", "truncation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request to a generation route.

    Attributes:
        body: the client's JSON object.
        raw: the bytes that it came in.
        direct: one of DIRECT_REASONS: why D is to answer alone; None: P computes the prompt first.
    """

    body: Mapping[str, object]
    raw: bytes
    direct: str | None


def read_call(raw: bytes) -> Call:
    """Reads a client's body; what P and D will check is left to them.

    Raises:
        ApiError: 400: it is no JSON object, or a field that P would not see as it stands makes no sense.
    """
    body = parse_object(raw)
    fields = Fields(body)
    if body.get(PARAMS) is not None:
        raise invalid(PARAMS, "is set by the router, not by its clients", code="unsupported_parameter")
    stream = fields.boolean("stream", False)
    if fields.mapping("stream_options") is not None and not stream:
        raise invalid("stream_options", "is only allowed when `stream` is true")
    for key in sorted(COUNTS):
        fields.integer(key, low=0, high=INT64_MAX)
    return Call(body=body, raw=raw, direct=_direct(body))


def _direct(body: Mapping[str, object]) -> str | None:
    """Log-probabilities of the prompt need its forward pass, which pages from elsewhere replace.

    P's parameters name the pages of one prompt: given to several, each would read those of the first. A
    prompt that is cut to leave room for the answer is another one on P, whose answer is one token.
    """
    prompt = body.get("prompt")
    echoes_logprobs = body.get("echo") is True and body.get("logprobs") is not None
    if body.get("prompt_logprobs") is not None or echoes_logprobs:
        return "prompt_logprobs"
    if isinstance(prompt, list) and len(prompt) > 1 and isinstance(prompt[0], (str, list)):
        return "several_prompts"
    if body.get("truncate_prompt_tokens") == -1:
        return "truncation"
    return None


def prefill_body(call: Call) -> bytes:
    """P's body: one token, not streamed, and the pages kept."""
    asked = {key: value for key, value in call.body.items() if key not in DECODE_ONLY}
    asked |= {"stream": False, "max_tokens": 1, PARAMS: dict(ASK_TO_KEEP)}
    asked |= {key: 1 for key in ("max_completion_tokens", "n") if asked.get(key) is not None}
    return _json(asked)


def decode_body(call: Call, params: Mapping[str, object] | None) -> bytes:
    """D's body: the client's, with P's parameters; without any, the client's very bytes."""
    return call.raw if params is None else _json({**call.body, PARAMS: params})


def transfer_params(answer: bytes) -> Mapping[str, object] | None:
    """The `kv_transfer_params` of P's answer; None: it gave none, so that D must compute the prompt.

    Raises:
        ValueError: the answer is not what a completions route gives.
    """
    try:
        value = json.loads(answer)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    params = value.get(PARAMS)
    if not params:
        return None
    if not isinstance(params, dict):
        raise ValueError(f"{PARAMS} is not an object")
    return params


def refuses_params(answer: bytes) -> bool:
    """Whether a 400 of D's is about P's parameters, which are none of the client's doing."""
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    error = value.get("error") if isinstance(value, dict) else None
    return isinstance(error, dict) and error.get("param") == PARAMS


def _json(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
