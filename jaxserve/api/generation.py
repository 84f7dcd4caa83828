"""What completions and chat completions have in common: one reader, so that one rule holds on both routes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from jaxserve.api.errors import ApiError, invalid, printable, unsupported
from jaxserve.api.fields import INT64_MAX, INT64_MIN, Fields
from jaxserve.api.known import UNSUPPORTED
from scheduler.types import SamplingParams

MAX_N = 128
MAX_SEQUENCES = 1024
"""Sequences of one HTTP request: prompts times n."""

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_BYTES = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIASES = 1024
MAX_LABEL_CHARS = 256
MAX_REQUEST_ID_CHARS = 128
MAX_USER_CHARS = 512
MAX_METADATA = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
MAX_MODEL_NAME_CHARS = 256
MAX_TRANSFER_KEYS = 64
INT32_MAX = 2**31 - 1

_TOKEN_ID = re.compile(r"[0-9]{1,10}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What validation must know of the model.

    Attributes:
        names: names under which it is served; the first is the main one.
        vocab_size: token ids are below this.
        max_model_len: bound on prompt + output tokens.
        eos_token_ids: the model's own end tokens.
        defaults: sampling values of generation_config.json, by vLLM's names.
    """

    names: tuple[str, ...]
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    defaults: Mapping[str, float | int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A generation request but for its prompt.

    Attributes:
        model: the name that the client used.
        sampling: max_tokens is None where the client named none.
        truncate_prompt_tokens: keep this many of the last prompt tokens, -1: as many as fit; None: all.
        add_special_tokens: let the tokenizer add its begin token.
        cache_salt: see `scheduler.types.Request`.
        priority: see `scheduler.types.Request`.
        label: the client's own id for the response; None: ours.
        stream: answer with server-sent events.
        include_usage: end the stream with a usage chunk.
        continuous_usage: put usage in every chunk.
        return_token_ids: put token ids in the answer.
        tokens_as_ids: logprobs name tokens "token_id:N".
        echo: begin the text with the prompt.
        prompt_logprobs: as the client asked; `sampling` may ask for more, for the echo.
        max_tokens_field: where max_tokens came from, for errors.
        kv_transfer_params: as the client gave it, for the engine to understand; empty: nothing is asked.
        unknown: keys that nobody knows, to be logged.
    """

    model: str
    sampling: SamplingParams
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool = True
    cache_salt: str = ""
    priority: int = 0
    label: str | None = None
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    tokens_as_ids: bool = False
    echo: bool = False
    prompt_logprobs: int | None = None
    max_tokens_field: str = "max_tokens"
    kv_transfer_params: Mapping[str, object] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()


def read_model(fields: Fields, facts: ModelFacts, *, required: bool) -> str:
    """The served name that the client asked for.

    Raises:
        ApiError: 404 `model_not_found`; 400 where it is no printable string, or missing though required.
    """
    name = fields.label("model", limit=MAX_MODEL_NAME_CHARS)
    if name is None:
        if required:
            raise invalid("model", "is required", code="missing_required_parameter")
        return facts.names[0]
    if name not in facts.names:
        raise model_not_found(name)
    return name


def model_not_found(name: str) -> ApiError:
    """OpenAI's answer for an unknown model."""
    shown = printable(name, 64)
    return ApiError(404, f"The model `{shown}` does not exist.", param="model", code="model_not_found")


def refuse_unsupported(fields: Fields) -> None:
    """Raises ApiError 400 `unsupported_parameter` for a known field that asks for what we cannot do."""
    for key in sorted(UNSUPPORTED):
        if fields.asks_for(key):
            raise unsupported(key)
    response_format = fields.mapping("response_format")
    if response_format is not None and response_format.raw("type") != "text":
        raise unsupported("response_format", 'other than {"type": "text"} is not supported by this server')
    if fields.asks_for("modalities") and fields.raw("modalities") != ["text"]:
        raise unsupported("modalities", 'other than ["text"] is not supported by this server')
    if fields.asks_for("length_penalty") and fields.raw("length_penalty") != 1:
        raise unsupported("length_penalty")


def read_generation(
    fields: Fields,
    facts: ModelFacts,
    *,
    known: frozenset[str],
    max_tokens: int | None,
    max_tokens_field: str,
    logprobs: int | None,
    echo: bool,
    add_special_tokens: bool,
) -> Generation:
    """Reads the shared fields; the route has read its own and passes on what they mean.

    Args:
        known: every key of the route.
        max_tokens: as the route reads it; None: the client named none.
        max_tokens_field: where it came from.
        logprobs: None: none; N: the chosen token and the N most likely.
        echo: begin the text with the prompt.
        add_special_tokens: the route's default.
    """
    stream = fields.boolean("stream", False)
    stream_options = fields.mapping("stream_options")
    if stream_options is not None and not stream:
        raise invalid("stream_options", "is only allowed when `stream` is true")
    options = stream_options or Fields({})
    prompt_logprobs = fields.integer("prompt_logprobs", low=0, high=MAX_LOGPROBS)
    if stream and prompt_logprobs is not None:
        raise unsupported("prompt_logprobs", "is not supported with `stream`")
    _check_labels(fields)
    sampling = _read_sampling(fields, facts, max_tokens=max_tokens, logprobs=logprobs)
    scored = [n for n in (prompt_logprobs, logprobs if echo else None) if n is not None]
    return Generation(
        model=read_model(fields, facts, required=True),
        sampling=replace(sampling, prompt_logprobs=max(scored, default=None)),
        truncate_prompt_tokens=_read_truncation(fields, facts),
        add_special_tokens=fields.boolean("add_special_tokens", add_special_tokens),
        cache_salt=fields.label("cache_salt", limit=MAX_LABEL_CHARS) or "",
        priority=fields.integer("priority", low=-INT32_MAX, high=INT32_MAX) or 0,
        label=fields.label("request_id", limit=MAX_REQUEST_ID_CHARS),
        stream=stream,
        include_usage=options.boolean("include_usage", False),
        continuous_usage=options.boolean("continuous_usage_stats", False),
        return_token_ids=fields.boolean("return_token_ids", False),
        tokens_as_ids=fields.boolean("return_tokens_as_token_ids", False),
        echo=echo,
        prompt_logprobs=prompt_logprobs,
        max_tokens_field=max_tokens_field,
        kv_transfer_params=fields.entries("kv_transfer_params", limit=MAX_TRANSFER_KEYS),
        unknown=fields.unknown(known),
    )


def _check_labels(fields: Fields) -> None:
    if fields.raw("user") != "":
        fields.label("user", limit=MAX_USER_CHARS)
    metadata = fields.mapping("metadata")
    for key, value in fields.entries("metadata", limit=MAX_METADATA).items():
        if len(key) > MAX_METADATA_KEY_CHARS:
            raise invalid("metadata", f"must have keys of at most {MAX_METADATA_KEY_CHARS} characters")
        if not isinstance(value, str) or len(value) > MAX_METADATA_VALUE_CHARS:
            name = metadata.name(key) if metadata else "metadata"
            raise invalid(name, f"must be a string of at most {MAX_METADATA_VALUE_CHARS} characters")


def _read_truncation(fields: Fields, facts: ModelFacts) -> int | None:
    keep = fields.integer("truncate_prompt_tokens", low=-1, high=facts.max_model_len)
    if keep == 0:
        raise invalid("truncate_prompt_tokens", "must be -1 or at least 1")
    return keep


def _read_sampling(
    fields: Fields, facts: ModelFacts, *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    n = fields.integer("n", low=1, high=MAX_N) or 1
    best_of = fields.integer("best_of", low=1, high=MAX_N)
    if best_of is not None and best_of != n:
        raise unsupported("best_of", "other than `n` is not supported by this server")
    high = facts.max_model_len if max_tokens is None else max_tokens
    min_tokens = fields.integer("min_tokens", low=0, high=high) or 0
    return SamplingParams(
        n=n,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=_or_default(fields.number("temperature", low=0, high=2), facts, "temperature", 1.0),
        top_k=_read_top_k(fields, facts),
        top_p=_or_default(fields.number("top_p", low=0, high=1, above_low=True), facts, "top_p", 1.0),
        min_p=_or_default(fields.number("min_p", low=0, high=1), facts, "min_p", 0.0),
        seed=fields.integer("seed", low=INT64_MIN, high=INT64_MAX),
        repetition_penalty=_or_default(
            fields.number("repetition_penalty", low=0, high=100, above_low=True),
            facts,
            "repetition_penalty",
            1.0,
        ),
        presence_penalty=fields.number("presence_penalty", low=-2, high=2) or 0.0,
        frequency_penalty=fields.number("frequency_penalty", low=-2, high=2) or 0.0,
        logit_bias=_read_logit_bias(fields, facts),
        stop=_read_stop(fields),
        stop_token_ids=_read_stop_token_ids(fields, facts),
        ignore_eos=fields.boolean("ignore_eos", False),
        logprobs=logprobs,
        skip_special_tokens=fields.boolean("skip_special_tokens", True),
        include_stop_str_in_output=fields.boolean("include_stop_str_in_output", False),
    )


def _or_default(value: float | None, facts: ModelFacts, key: str, otherwise: float) -> float:
    return float(facts.defaults.get(key, otherwise)) if value is None else value


def _read_top_k(fields: Fields, facts: ModelFacts) -> int:
    top_k = fields.integer("top_k", low=-1, high=INT32_MAX)
    if top_k is None:
        top_k = int(facts.defaults.get("top_k", 0))
    return min(max(top_k, 0), facts.vocab_size)


def _read_logit_bias(fields: Fields, facts: ModelFacts) -> tuple[tuple[int, float], ...]:
    biases: dict[int, float] = {}
    for key, value in fields.entries("logit_bias", limit=MAX_LOGIT_BIASES).items():
        if not _TOKEN_ID.fullmatch(key):
            raise invalid("logit_bias", "must have token ids, written as strings, for keys")
        if int(key) >= facts.vocab_size:
            raise invalid("logit_bias", f"names a token outside the vocabulary of {facts.vocab_size}")
        if int(key) in biases:
            raise invalid("logit_bias", "names a token twice")
        biases[int(key)] = fields.as_number(value, "logit_bias", low=-100, high=100)
    return tuple(biases.items())


def _read_stop(fields: Fields) -> tuple[str, ...]:
    value = fields.raw("stop")
    stops = [value] if isinstance(value, str) else fields.items("stop", limit=MAX_STOPS) or []
    for stop in stops:
        if not isinstance(stop, str):
            raise invalid("stop", "must be a string or an array of strings", code="invalid_type")
        if not stop or len(stop.encode()) > MAX_STOP_BYTES:
            raise invalid("stop", f"must hold strings of 1 to {MAX_STOP_BYTES} bytes")
    return tuple(dict.fromkeys(stop for stop in stops if isinstance(stop, str)))


def _read_stop_token_ids(fields: Fields, facts: ModelFacts) -> tuple[int, ...]:
    ids = fields.items("stop_token_ids", limit=MAX_STOP_TOKEN_IDS) or []
    return tuple(
        fields.as_integer(token_id, "stop_token_ids", low=0, high=facts.vocab_size - 1) for token_id in ids
    )
