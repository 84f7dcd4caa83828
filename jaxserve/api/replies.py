"""Answers and chunks as OpenAI's JSON, with vLLM's additions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from jaxserve.api.choices import ChoiceWriter, Envelope
from jaxserve.api.errors import internal_error, load_failed, unavailable
from jaxserve.api.generation import ModelFacts
from jaxserve.api.logprobs import Vocabulary, prompt_logprobs
from jaxserve.outputs import Delta, TokenLogprobs
from kv.moves import LOAD_FAILED
from metrics.stats import PrefillStats
from scheduler.types import FinishReason


def check_finish(delta: Delta) -> None:
    """Raises ApiError where a sequence ended for a reason that is no answer.

    An abort that reaches a client that still listens means that the server is going away.
    """
    if delta.finish_reason is FinishReason.ERROR:
        raise load_failed() if delta.message == LOAD_FAILED else internal_error()
    if delta.finish_reason is FinishReason.ABORT:
        raise unavailable("The server is shutting down and ended this request.")


def merge(deltas: Sequence[Delta]) -> Delta:
    """Deltas of one sequence, one after another, as one."""
    if len(deltas) == 1:
        return deltas[0]
    scored = [delta.logprobs for delta in deltas if delta.logprobs is not None]
    return Delta(
        request_id=deltas[0].request_id,
        index=deltas[0].index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=tuple(entry for entries in scored for entry in entries) if scored else None,
        finish_reason=deltas[-1].finish_reason,
        stop_reason=deltas[-1].stop_reason,
        message=deltas[-1].message,
        prefill=next((delta.prefill for delta in deltas if delta.prefill is not None), None),
        prompt_logprobs=next(
            (delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None), None
        ),
        kv_transfer_params=deltas[-1].kv_transfer_params,
    )


def usage(
    prompt_tokens: int,
    completion_tokens: int,
    prefills: Iterable[PrefillStats],
    *,
    peer_cached_tokens: int | None = None,
) -> dict[str, object]:
    """The `usage` object; the sources of several prompts are summed.

    Args:
        prompt_tokens: of all prompts.
        completion_tokens: of all sequences.
        prefills: one per prompt whose first token is there.
        peer_cached_tokens: the number of a peer that sent the prompt's KV. It becomes `cached_tokens`, as in
            vLLM: for a client the two engines are one, and a transfer is no cache hit. It says nothing where
            the transfer brought nothing.
    """
    parts = list(prefills)
    hit = sum(part.local_cache_hit for part in parts)
    external = sum(part.external_kv_transfer for part in parts)
    cached = hit + external if peer_cached_tokens is None or not external else peer_cached_tokens
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": cached,
            "local_compute": sum(part.local_compute for part in parts),
            "local_cache_hit": hit,
            "external_kv_transfer": external,
        },
    }


@dataclass(slots=True)
class Tally:
    """What an answer has used so far."""

    prompt_tokens: int
    peer_cached_tokens: int | None = None
    completion_tokens: int = 0
    prefills: dict[int, PrefillStats] = field(default_factory=dict)

    @classmethod
    def of(cls, envelope: Envelope) -> "Tally":
        """Of an answer that has not begun."""
        return cls(
            prompt_tokens=sum(len(ids) for _, ids in envelope.prompts),
            peer_cached_tokens=envelope.peer_cached_tokens,
        )

    def add(self, prompt: int, delta: Delta, *, counts_output: bool) -> None:
        """Counts one delta of prompt number `prompt`."""
        if counts_output:
            self.completion_tokens += len(delta.token_ids)
        if delta.prefill is not None:
            self.prefills[prompt] = delta.prefill

    def usage(self) -> dict[str, object]:
        """The `usage` object."""
        return usage(
            self.prompt_tokens,
            self.completion_tokens,
            self.prefills.values(),
            peer_cached_tokens=self.peer_cached_tokens,
        )


def full_reply(
    envelope: Envelope, deltas: Sequence[tuple[int, Delta]], vocabulary: Vocabulary
) -> dict[str, object]:
    """The whole answer.

    Args:
        envelope: of this answer.
        deltas: (prompt number, its sequence's only delta), every sequence once.
        vocabulary: names tokens.

    Raises:
        ApiError: a sequence ended in an error.
    """
    tally = Tally.of(envelope)
    choices: list[dict[str, object]] = []
    in_order = sorted(deltas, key=lambda item: (item[0], item[1].index))
    prompt_scores = {prompt: delta.prompt_logprobs for prompt, delta in deltas if delta.prompt_logprobs}
    for prompt, delta in in_order:
        check_finish(delta)
        tally.add(prompt, delta, counts_output=not envelope.only_prompt)
        writer = ChoiceWriter(envelope, prompt, delta.index, vocabulary, prompt_scores.get(prompt))
        choices.append(writer.whole(delta))
    reply = envelope.head(chunk=False) | {"choices": choices, "usage": tally.usage()}
    if envelope.chat:
        top = envelope.generation.prompt_logprobs
        scores = prompt_scores.get(0) or ()
        reply["prompt_logprobs"] = None if top is None else prompt_logprobs(scores, vocabulary, top=top)
        if envelope.generation.return_token_ids:
            reply["prompt_token_ids"] = list(envelope.prompts[0][1])
    params = next((delta.kv_transfer_params for _, delta in in_order if delta.kv_transfer_params), None)
    return reply if params is None else reply | {"kv_transfer_params": params}


class ChunkWriter:
    """Writes the chunks of one streamed answer."""

    def __init__(self, envelope: Envelope, vocabulary: Vocabulary) -> None:
        self._envelope = envelope
        self._vocabulary = vocabulary
        self._head = envelope.head(chunk=True)
        self._choices: dict[tuple[int, int], ChoiceWriter] = {}
        self._prompt_scores: dict[int, tuple[TokenLogprobs | None, ...]] = {}
        self._tally = Tally.of(envelope)

    def chunks(self, prompt: int, delta: Delta) -> list[dict[str, object]]:
        """The chunks for one delta of prompt number `prompt`.

        Raises:
            ApiError: the sequence ended in an error.
        """
        check_finish(delta)
        self._tally.add(prompt, delta, counts_output=not self._envelope.only_prompt)
        if delta.prompt_logprobs is not None:
            self._prompt_scores[prompt] = delta.prompt_logprobs
        key = (prompt, delta.index)
        if key not in self._choices:
            self._choices[key] = ChoiceWriter(
                self._envelope, prompt, delta.index, self._vocabulary, self._prompt_scores.get(prompt)
            )
        chunks = [self._head | {"choices": [choice]} for choice in self._choices[key].chunk(delta)]
        if delta.kv_transfer_params:  # it comes with the reason of the end, so that there is a chunk
            chunks[-1]["kv_transfer_params"] = delta.kv_transfer_params
        generation = self._envelope.generation
        if generation.continuous_usage:
            return [chunk | {"usage": self._tally.usage()} for chunk in chunks]
        if generation.include_usage:
            return [chunk | {"usage": None} for chunk in chunks]
        return chunks

    def last(self) -> list[dict[str, object]]:
        """The usage chunk, where it was asked for."""
        if not self._envelope.generation.include_usage:
            return []
        return [self._head | {"choices": [], "usage": self._tally.usage()}]


def model_card(name: str, facts: ModelFacts, created: int) -> dict[str, object]:
    """One entry of /v1/models."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "jaxserve",
        "root": facts.names[0],
        "parent": None,
        "max_model_len": facts.max_model_len,
    }
