"""The fields of /v1/chat/completions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from jaxserve.api.errors import ApiError, invalid, printable, unsupported
from jaxserve.api.fields import INT64_MAX, Fields, names
from jaxserve.api.generation import (
    MAX_LOGPROBS,
    Generation,
    ModelFacts,
    read_generation,
    refuse_unsupported,
)
from jaxserve.api.known import COMMON

CHAT_FIELDS = names(
    "messages add_generation_prompt continue_final_message chat_template chat_template_kwargs"
)

KNOWN = COMMON | CHAT_FIELDS | {"max_completion_tokens", "top_logprobs"}

ROLES = ("system", "developer", "user", "assistant")
MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_NAME_CHARS = 64
MAX_TEMPLATE_KWARGS = 32
MAX_TEMPLATE_VALUE_CHARS = 1024

RESERVED_KWARGS = names(
    """messages tools documents add_generation_prompt continue_final_message chat_template tokenize
    bos_token eos_token unk_token pad_token conversation template"""
)
"""Template variables that a client must not set through chat_template_kwargs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What the chat template is given.

    Attributes:
        messages: objects with `role`, `content` (a string) and perhaps `name`.
        add_generation_prompt: end with the opening of the assistant's turn.
        continue_final_message: leave the last message open instead.
        template_kwargs: further template variables.
    """

    messages: tuple[Mapping[str, str], ...]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCall:
    """A valid request to /v1/chat/completions."""

    conversation: Conversation
    generation: Generation


def read_chat(body: dict[str, object], facts: ModelFacts) -> ChatCall:
    """Reads and checks a request body.

    Raises:
        ApiError: naming the field.
    """
    fields = Fields(body)
    refuse_unsupported(fields)
    if fields.boolean("echo", False):
        raise unsupported("echo", "is not supported for chats")
    limit = "max_tokens" if fields.raw("max_completion_tokens") is None else "max_completion_tokens"
    fields.integer("max_tokens", low=1, high=INT64_MAX)
    generation = read_generation(
        fields,
        facts,
        known=KNOWN,
        max_tokens=fields.integer(limit, low=1, high=INT64_MAX),
        max_tokens_field=limit,
        logprobs=_read_logprobs(fields),
        echo=False,
        add_special_tokens=False,
    )
    return ChatCall(conversation=read_conversation(fields), generation=generation)


def _read_logprobs(fields: Fields) -> int | None:
    wanted = fields.boolean("logprobs", False)
    top = fields.integer("top_logprobs", low=0, high=MAX_LOGPROBS)
    if top and not wanted:
        raise invalid("top_logprobs", "needs `logprobs` to be true")
    return (top or 0) if wanted else None


def read_conversation(fields: Fields) -> Conversation:
    """The fields that the chat template needs.

    Raises:
        ApiError: naming the field, with its index among the messages.
    """
    if fields.asks_for("chat_template"):
        raise unsupported("chat_template", "from a client is not accepted")
    items = fields.items("messages", limit=MAX_MESSAGES)
    if not items:
        raise invalid("messages", "must hold at least one message", code="missing_required_parameter")
    messages = tuple(_read_message(item, f"messages[{index}]") for index, item in enumerate(items))
    continue_final = fields.boolean("continue_final_message", False)
    add_prompt = fields.boolean("add_generation_prompt", not continue_final)
    if continue_final and add_prompt:
        raise invalid("continue_final_message", "cannot be combined with `add_generation_prompt`")
    return Conversation(
        messages=messages,
        add_generation_prompt=add_prompt,
        continue_final_message=continue_final,
        template_kwargs=_read_template_kwargs(fields),
    )


def _read_message(item: object, path: str) -> Mapping[str, str]:
    if not isinstance(item, dict):
        raise invalid(path, "must be an object", code="invalid_type")
    fields = Fields(item, path)
    role = fields.raw("role")
    if not isinstance(role, str) or role not in ROLES:
        raise invalid(fields.name("role"), f"must be one of {', '.join(ROLES)}")
    for key in ("tool_calls", "function_call", "audio"):
        if fields.asks_for(key):
            raise unsupported(fields.name(key))
    message = {"role": role, "content": _read_content(fields)}
    name = fields.label("name", limit=MAX_NAME_CHARS)
    return message if name is None else message | {"name": name}


def _read_content(fields: Fields) -> str:
    """Text, or text parts joined by line breaks as vLLM does."""
    value = fields.raw("content")
    path = fields.name("content")
    if isinstance(value, str):
        return value
    if value is None:
        raise invalid(path, "is required", code="missing_required_parameter")
    if not isinstance(value, list):
        raise invalid(path, "must be a string or an array of text parts", code="invalid_type")
    parts = fields.items("content", limit=MAX_PARTS) or []
    return "\n".join(_read_part(part, f"{path}[{index}]") for index, part in enumerate(parts))


def _read_part(part: object, path: str) -> str:
    if not isinstance(part, dict):
        raise invalid(path, "must be an object", code="invalid_type")
    kind = part.get("type")
    if kind != "text":
        shown = printable(kind, 32) if isinstance(kind, str) else "of no type"
        message = f"`{path}`: content parts other than text are not supported, this one is {shown}."
        raise ApiError(400, message, param=f"{path}.type", code="unsupported_content")
    text = part.get("text")
    if not isinstance(text, str):
        raise invalid(f"{path}.text", "must be a string", code="invalid_type")
    return text


def _read_template_kwargs(fields: Fields) -> Mapping[str, str | int | float | bool | None]:
    kwargs: dict[str, str | int | float | bool | None] = {}
    for key, value in fields.entries("chat_template_kwargs", limit=MAX_TEMPLATE_KWARGS).items():
        path = f"chat_template_kwargs.{printable(key, MAX_NAME_CHARS)}"
        if not key.isidentifier() or key.startswith("_") or len(key) > MAX_NAME_CHARS:
            raise invalid(path, "is no name of a template variable")
        if key in RESERVED_KWARGS:
            raise unsupported(path, "cannot be set by a client")
        if not (value is None or isinstance(value, (str, int, float))):
            raise invalid(path, "must be a string, a number, true, false or null", code="invalid_type")
        if isinstance(value, str) and len(value) > MAX_TEMPLATE_VALUE_CHARS:
            raise invalid(path, f"must have at most {MAX_TEMPLATE_VALUE_CHARS} characters")
        kwargs[key] = value
    return MappingProxyType(kwargs)
