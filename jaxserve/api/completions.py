"""The fields of /v1/completions."""

from dataclasses import dataclass

from jaxserve.api.errors import invalid
from jaxserve.api.fields import INT64_MAX, Fields
from jaxserve.api.generation import (
    MAX_LOGPROBS,
    MAX_SEQUENCES,
    Generation,
    ModelFacts,
    read_generation,
    refuse_unsupported,
)
from jaxserve.api.known import COMMON
from jaxserve.api.prompts import Prompt, read_prompts

KNOWN = COMMON | {"prompt"}

DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionCall:
    """A valid request to /v1/completions.

    Attributes:
        prompts: at least one text or list of token ids.
        generation: everything else.
        only_prompt: `max_tokens` is 0: the answer is the echoed prompt. One token is generated, since the
            engine has no request without, and left out.
    """

    prompts: tuple[Prompt, ...]
    generation: Generation
    only_prompt: bool = False


def read_completion(body: dict[str, object], facts: ModelFacts) -> CompletionCall:
    """Reads and checks a request body.

    Raises:
        ApiError: naming the field.
    """
    fields = Fields(body)
    refuse_unsupported(fields)
    echo = fields.boolean("echo", False)
    max_tokens = fields.integer("max_tokens", low=0, high=INT64_MAX)
    if max_tokens == 0 and not echo:
        raise invalid("max_tokens", "must be at least 1 unless `echo` is true")
    generation = read_generation(
        fields,
        facts,
        known=KNOWN,
        max_tokens=1 if max_tokens == 0 else max_tokens,
        max_tokens_field="max_tokens",
        logprobs=fields.integer("logprobs", low=0, high=MAX_LOGPROBS),
        echo=echo,
        add_special_tokens=True,
    )
    prompts = read_prompts(fields, facts)
    if len(prompts) * generation.sampling.n > MAX_SEQUENCES:
        raise invalid("n", f"times the number of prompts must be at most {MAX_SEQUENCES}")
    if generation.kv_transfer_params and len(prompts) > 1:
        raise invalid("kv_transfer_params", "goes with a single prompt")
    return CompletionCall(prompts=prompts, generation=generation, only_prompt=max_tokens == 0)
