"""One choice of an answer, whole or chunk by chunk, as OpenAI's JSON with vLLM's additions."""

from dataclasses import dataclass

from jaxserve.api.generation import Generation
from jaxserve.api.logprobs import (
    TextOffsets,
    Vocabulary,
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
)
from jaxserve.outputs import Delta, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What every chunk of one answer repeats.

    Attributes:
        reply_id: "cmpl-..." or "chatcmpl-...".
        chat: the route.
        created: Unix time, seconds.
        generation: what was asked.
        only_prompt: leave the generated token out.
        peer_cached_tokens: of the prompt, found in its cache by the peer that sent its KV; None: not said.
        prompts: per prompt its text (None: given as token ids, and nobody asked for its echo) and its ids.
    """

    reply_id: str
    chat: bool
    created: int
    generation: Generation
    prompts: tuple[tuple[str | None, tuple[int, ...]], ...]
    only_prompt: bool = False
    peer_cached_tokens: int | None = None

    def head(self, *, chunk: bool) -> dict[str, object]:
        """The fields before the choices."""
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {
            "id": self.reply_id,
            "object": kind,
            "created": self.created,
            "model": self.generation.model,
            "system_fingerprint": None,
        }


class ChoiceWriter:
    """Writes one choice: whole, or chunk by chunk."""

    def __init__(
        self,
        envelope: Envelope,
        prompt: int,
        index: int,
        vocabulary: Vocabulary,
        prompt_scores: tuple[TokenLogprobs | None, ...] | None = None,
    ) -> None:
        self._envelope = envelope
        self._generation = envelope.generation
        self._vocabulary = vocabulary
        self._prompt_text, self._prompt_ids = envelope.prompts[prompt]
        self._prompt_scores = prompt_scores
        self._index = prompt * self._generation.sampling.n + index
        self._offsets = TextOffsets(
            vocabulary, skip_special_tokens=self._generation.sampling.skip_special_tokens
        )
        self._started = False

    def whole(self, delta: Delta) -> dict[str, object]:
        """The choice of an answer that is not streamed."""
        choice = self._completion(delta) if not self._envelope.chat else self._chat(delta)
        if self._generation.return_token_ids:
            choice["token_ids"] = [] if self._envelope.only_prompt else list(delta.token_ids)
        return choice

    def chunk(self, delta: Delta) -> list[dict[str, object]]:
        """The choices of the chunks for one delta: a first one with the role (chat), then the delta's."""
        first = not self._started
        chunks: list[dict[str, object]] = []
        if self._envelope.chat:
            if first:
                chunks.append(self._role())
            if not self._says_something(delta):
                return chunks
            chunks.append(self._chat_chunk(delta))
        else:
            if not (self._says_something(delta) or (first and self._generation.echo)):
                return chunks
            chunks.append(self._completion(delta))
        self._started = True
        if self._generation.return_token_ids:
            chunks[-1]["token_ids"] = [] if self._envelope.only_prompt else list(delta.token_ids)
            if first:
                chunks[0]["prompt_token_ids"] = list(self._prompt_ids)
        return chunks

    def _says_something(self, delta: Delta) -> bool:
        wants_tokens = self._generation.return_token_ids or self._generation.sampling.logprobs is not None
        return bool(delta.text or delta.finish_reason or (wants_tokens and delta.token_ids))

    def _role(self) -> dict[str, object]:
        self._started = True
        delta = {"role": "assistant", "content": ""}
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _chat_chunk(self, delta: Delta) -> dict[str, object]:
        return {
            "index": self._index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._chat_logprobs(delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    def _chat(self, delta: Delta) -> dict[str, object]:
        return {
            "index": self._index,
            "message": {"role": "assistant", "content": delta.text, "refusal": None},
            "logprobs": self._chat_logprobs(delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    def _chat_logprobs(self, delta: Delta) -> dict[str, object] | None:
        if self._generation.sampling.logprobs is None:
            return None
        return chat_logprobs(delta.logprobs or (), self._vocabulary, as_ids=self._generation.tokens_as_ids)

    def _completion(self, delta: Delta) -> dict[str, object]:
        """One choice of /v1/completions; the prompt comes first where its echo was asked for."""
        echo = self._generation.echo and not self._started
        self._started = True
        text = "" if self._envelope.only_prompt else delta.text
        choice: dict[str, object] = {
            "index": self._index,
            "text": (self._prompt_text or "") + text if echo else text,
            "logprobs": self._completion_logprobs(delta, echo=echo),
            "finish_reason": "length" if self._envelope.only_prompt else delta.finish_reason,
            "stop_reason": None if self._envelope.only_prompt else delta.stop_reason,
        }
        top = self._generation.prompt_logprobs
        if top is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self._prompt_scores or (), self._vocabulary, top=top)
        if self._generation.return_token_ids and not self._generation.stream:
            choice["prompt_token_ids"] = list(self._prompt_ids)
        return choice

    def _completion_logprobs(self, delta: Delta, *, echo: bool) -> dict[str, object] | None:
        top = self._generation.sampling.logprobs
        if top is None:
            return None
        entries: list[tuple[int, TokenLogprobs | None]] = []
        if echo:
            scores = self._prompt_scores or delta.prompt_logprobs or ()
            entries += zip(self._prompt_ids, scores, strict=False)
        if not self._envelope.only_prompt:
            entries += [(entry.token_id, entry) for entry in delta.logprobs or ()]
        return completion_logprobs(
            entries, self._vocabulary, self._offsets, top=top, as_ids=self._generation.tokens_as_ids
        )
