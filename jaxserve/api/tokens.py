"""The fields of /tokenize and /detokenize; the shapes are vLLM's."""

from dataclasses import dataclass

from jaxserve.api.chat import Conversation, read_conversation
from jaxserve.api.errors import invalid
from jaxserve.api.fields import Fields
from jaxserve.api.generation import ModelFacts, read_model
from jaxserve.api.prompts import read_token_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeCall:
    """A valid request to /tokenize.

    Attributes:
        source: a text, or a conversation for the chat template.
        add_special_tokens: let the tokenizer add its begin token; the default is true for a text only.
        return_token_strs: answer with the tokens as text too.
    """

    source: str | Conversation
    add_special_tokens: bool
    return_token_strs: bool


def read_tokenize(body: dict[str, object], facts: ModelFacts) -> TokenizeCall:
    """Reads and checks a request body. An empty prompt is legal here and has no tokens.

    Raises:
        ApiError: naming the field.
    """
    fields = Fields(body)
    read_model(fields, facts, required=False)
    prompt = fields.raw("prompt")
    if prompt is None and fields.raw("messages") is None:
        raise invalid("prompt", "or `messages` is required", code="missing_required_parameter")
    if prompt is not None and not isinstance(prompt, str):
        raise invalid("prompt", "must be a string", code="invalid_type")
    if prompt is not None and fields.raw("messages") is not None:
        raise invalid("messages", "cannot be combined with `prompt`")
    source = read_conversation(fields) if prompt is None else prompt
    return TokenizeCall(
        source=source,
        add_special_tokens=fields.boolean("add_special_tokens", isinstance(source, str)),
        return_token_strs=fields.boolean("return_token_strs", False),
    )


def read_detokenize(body: dict[str, object], facts: ModelFacts) -> tuple[int, ...]:
    """The token ids of a request to /detokenize.

    Raises:
        ApiError: naming the field.
    """
    fields = Fields(body)
    read_model(fields, facts, required=False)
    if fields.raw("tokens") is None:
        raise invalid("tokens", "is required", code="missing_required_parameter")
    if fields.raw("tokens") == []:
        return ()
    return read_token_ids(fields.raw("tokens"), "tokens", facts)
