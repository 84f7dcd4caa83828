"""Prompts: read from JSON, then fitted to the model once they are tokens."""

from dataclasses import replace

from jaxserve.api.errors import ApiError, context_length_exceeded, invalid
from jaxserve.api.fields import Fields
from jaxserve.api.generation import Generation, ModelFacts
from scheduler.types import SamplingParams

Prompt = str | tuple[int, ...]
"""Text, or token ids."""

MAX_PROMPTS = 64


def read_prompts(fields: Fields, facts: ModelFacts) -> tuple[Prompt, ...]:
    """The field `prompt`: a string, token ids, or an array of either.

    Raises:
        ApiError: 400, `token_out_of_range` for an id outside the vocabulary.
    """
    value = fields.raw("prompt")
    if value is None:
        raise invalid("prompt", "is required", code="missing_required_parameter")
    if isinstance(value, str):
        return (_text(value),)
    if not isinstance(value, list):
        raise invalid("prompt", "must be a string, token ids, or an array of either", code="invalid_type")
    if not value:
        raise invalid("prompt", "must not be empty")
    if not isinstance(value[0], (str, list)):
        return (read_token_ids(value, "prompt", facts),)
    if len(value) > MAX_PROMPTS:
        raise invalid("prompt", f"must hold at most {MAX_PROMPTS} prompts")
    kind = type(value[0])
    prompts: list[Prompt] = []
    for item in value:
        if type(item) is not kind:
            raise invalid("prompt", "must not mix strings and token ids", code="invalid_type")
        prompts.append(_text(item) if isinstance(item, str) else read_token_ids(item, "prompt", facts))
    return tuple(prompts)


def _text(value: str) -> str:
    if not value:
        raise invalid("prompt", "must not be empty")
    return value


def read_token_ids(value: object, param: str, facts: ModelFacts) -> tuple[int, ...]:
    """A non-empty array of ids within the vocabulary."""
    if not isinstance(value, list):
        raise invalid(param, "must be an array of token ids", code="invalid_type")
    if not value:
        raise invalid(param, "must not be empty")
    if any(type(token_id) is not int for token_id in value):
        raise invalid(param, "must hold integers", code="invalid_type")
    if min(value) < 0 or max(value) >= facts.vocab_size:
        raise invalid(param, f"holds a token id outside [0, {facts.vocab_size})", code="token_out_of_range")
    return tuple(value)


def fit(
    token_ids: tuple[int, ...],
    generation: Generation,
    facts: ModelFacts,
    *,
    param: str,
    default_max_tokens: int | None,
) -> tuple[tuple[int, ...], SamplingParams]:
    """Cuts the prompt as asked and settles `max_tokens`.

    Args:
        token_ids: the tokenised prompt.
        param: the field that holds the prompt.
        default_max_tokens: where neither client nor model names one; None: the rest of the context.

    Returns:
        The prompt, and the sampling parameters with a number for max_tokens.

    Raises:
        ApiError: 400 `context_length_exceeded`, or the prompt has no tokens.
    """
    keep = generation.truncate_prompt_tokens
    if keep == -1:  # as many as leave room for the answer
        keep = max(1, facts.max_model_len - (generation.sampling.max_tokens or 1))
    if keep is not None:
        token_ids = token_ids[-keep:]
    if not token_ids:
        raise invalid(param, "has no tokens")
    room = facts.max_model_len - len(token_ids)
    sampling = generation.sampling
    if room < 1:
        raise _too_long(param, facts, f"the prompt has {len(token_ids)} and leaves no room for an answer")
    if sampling.max_tokens is None:
        default = facts.defaults.get("max_tokens", default_max_tokens)
        max_tokens = room if default is None else min(room, max(1, int(default)))
    else:
        max_tokens = sampling.max_tokens
    if max_tokens > room:
        asked = f"{len(token_ids)} in the prompt and {max_tokens} in the answer were asked for"
        raise _too_long(generation.max_tokens_field, facts, asked)
    if sampling.min_tokens > max_tokens:
        raise invalid("min_tokens", f"must be at most the {max_tokens} tokens that the answer may have")
    return token_ids, replace(sampling, max_tokens=max_tokens)


def _too_long(param: str, facts: ModelFacts, what: str) -> ApiError:
    limit = f"This model's maximum context length is {facts.max_model_len} tokens"
    return context_length_exceeded(param, f"{limit}, but {what}.")
