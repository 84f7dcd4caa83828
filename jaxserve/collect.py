"""Prompts in, finished requests out: the two ends of `Engine.generate`."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxserve.outputs import CompletionOutput, Delta, EngineError, RequestOutput, TokenLogprobs
from scheduler.types import FinishReason, Request, SamplingParams

Prompt = str | Sequence[int]
"""Text, or token ids."""


@dataclass(slots=True, kw_only=False, eq=False)
class Collected:
    """A request's deltas, added up."""

    request: Request
    texts: dict[int, list[str]] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    ends: dict[int, Delta] = field(default_factory=dict)
    first: Delta | None = None

    def add(self, delta: Delta) -> bool:
        """Takes a delta; True: it was the request's last."""
        self.texts.setdefault(delta.index, []).append(delta.text)
        self.tokens.setdefault(delta.index, []).extend(delta.token_ids)
        self.logprobs.setdefault(delta.index, []).extend(delta.logprobs or ())
        if delta.prefill is not None:
            self.first = delta
        if delta.finish_reason is not None:
            self.ends[delta.index] = delta
        return len(self.ends) == self.request.sampling.n

    def output(self, prompt: str | None) -> RequestOutput:
        """The finished request.

        Raises:
            EngineError: a sequence failed.
        """
        failed = [end for end in self.ends.values() if end.finish_reason is FinishReason.ERROR]
        if failed:
            raise EngineError(failed[0].message or "the request failed")
        outputs = [
            CompletionOutput(
                index=index,
                text="".join(self.texts[index]),
                token_ids=tuple(self.tokens[index]),
                logprobs=None if self.request.sampling.logprobs is None else tuple(self.logprobs[index]),
                finish_reason=end.finish_reason or FinishReason.ABORT,
                stop_reason=end.stop_reason,
            )
            for index, end in sorted(self.ends.items())
        ]
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            outputs=tuple(outputs),
            prefill=None if self.first is None else self.first.prefill,
            prompt_logprobs=None if self.first is None else self.first.prompt_logprobs,
        )


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, text or token ids (NumPy's too), or many: as a list of prompts.

    Raises:
        ValueError: token ids and prompts are mixed.
    """
    if isinstance(prompts, str):
        return [prompts]
    ids = [int(entry) for entry in prompts if isinstance(entry, int | np.integer)]
    many = [entry for entry in prompts if not isinstance(entry, int | np.integer)]
    if ids and many:
        raise ValueError("prompts are texts or lists of token ids, not single ids among them")
    return [ids] if ids else [entry if isinstance(entry, str) else list(entry) for entry in many]


def pairs(
    prompts: Sequence[Prompt],
    sampling: SamplingParams | Sequence[SamplingParams] | None,
    default: SamplingParams,
) -> list[tuple[Prompt, SamplingParams]]:
    """Each prompt with its parameters.

    Raises:
        ValueError: there are not as many parameters as prompts.
    """
    if sampling is None or isinstance(sampling, SamplingParams):
        return [(prompt, sampling or default) for prompt in prompts]
    if len(sampling) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(sampling)} sampling parameters")
    return list(zip(prompts, sampling, strict=True))
