"""A request body to engine requests: JSON, validation, chat template, tokens. Slow, so done in a thread."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from jaxserve.api.body import parse_object
from jaxserve.api.chat import Conversation, read_chat
from jaxserve.api.choices import Envelope
from jaxserve.api.completions import DEFAULT_MAX_TOKENS, read_completion
from jaxserve.api.errors import ApiError, context_length_exceeded, invalid, printable, unavailable
from jaxserve.api.generation import Generation, ModelFacts
from jaxserve.api.plain import ControlTokens
from jaxserve.api.prompts import Prompt, fit
from jaxserve.api.refusals import refused
from jaxserve.api.tokens import read_detokenize, read_tokenize
from jaxserve.outputs import RequestRefused, Transfer
from jaxserve.server.options import body_limit
from jaxserve.server.surface import EngineSurface, PrepareSurface
from jaxserve.text import TemplateBusyError, TemplateError
from scheduler.types import Request, SamplingParams

logger = logging.getLogger(__name__)

UNKNOWN_LOG_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request to a generation route, ready to run.

    Attributes:
        envelope: for the answer.
        requests: one per prompt, in order.
    """

    envelope: Envelope
    requests: tuple[Request, ...]


class Preparer:
    """Turns bodies into values. Stateless but for the rate of one log line; callable from any thread.

    Args:
        engine: that the requests are for.
        facts: of its model.
        clock: for intervals, in seconds.
        wall_clock: for what answers say of when they were made, in seconds since 1970.
    """

    def __init__(
        self,
        engine: PrepareSurface,
        facts: ModelFacts,
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._facts = facts
        self._clock, self._wall_clock = clock, wall_clock
        self._max_chars = body_limit(facts.max_model_len)
        tokenizer = engine.tokenizer
        self._control = ControlTokens(tokenizer.token(token_id) for token_id in tokenizer.special_ids)
        self._unknown_logged_at: float | None = None

    def completion(self, body: bytes) -> Prepared:
        """A request to /v1/completions.

        Raises:
            ApiError: naming the field.
        """
        call = read_completion(parse_object(body), self._facts)
        generation = call.generation
        add_special_tokens = generation.add_special_tokens
        fitted = [
            fit(
                self._tokens(prompt, add_special_tokens, "prompt"),
                generation,
                self._facts,
                param="prompt",
                default_max_tokens=DEFAULT_MAX_TOKENS,
            )
            for prompt in call.prompts
        ]
        texts = [
            self._echoed(prompt, ids, generation)
            for prompt, (ids, _) in zip(call.prompts, fitted, strict=True)
        ]
        return self._prepared(generation, fitted, texts, chat=False, only_prompt=call.only_prompt)

    def chat(self, body: bytes) -> Prepared:
        """A request to /v1/chat/completions.

        Raises:
            ApiError: naming the field.
        """
        call = read_chat(parse_object(body), self._facts)
        fitted = fit(
            self._chat_tokens(call.conversation, call.generation.add_special_tokens),
            call.generation,
            self._facts,
            param="messages",
            default_max_tokens=None,
        )
        return self._prepared(call.generation, [fitted], [None], chat=True, only_prompt=False)

    def tokenize(self, body: bytes) -> dict[str, object]:
        """The answer of /tokenize.

        Raises:
            ApiError: naming the field.
        """
        call = read_tokenize(parse_object(body), self._facts)
        if isinstance(call.source, str):
            ids = self._tokens(call.source, call.add_special_tokens, "prompt")
        else:
            ids = self._chat_tokens(call.source, call.add_special_tokens)
        return {
            "count": len(ids),
            "max_model_len": self._facts.max_model_len,
            "tokens": ids,
            "token_strs": [self._engine.tokenizer.token(i) for i in ids] if call.return_token_strs else None,
        }

    def detokenize(self, body: bytes) -> dict[str, object]:
        """The answer of /detokenize.

        Raises:
            ApiError: naming the field.
        """
        ids = read_detokenize(parse_object(body), self._facts)
        return {"prompt": self._engine.tokenizer.decode(ids, skip_special_tokens=False)}

    def _tokens(self, prompt: Prompt, add_special_tokens: bool, param: str) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return prompt
        if len(prompt) > self._max_chars:
            limit = f"of {self._max_chars} characters for a context of {self._facts.max_model_len} tokens"
            raise context_length_exceeded(param, f"The prompt exceeds the limit {limit}.")
        return tuple(self._engine.tokenizer.encode(prompt, add_special_tokens=add_special_tokens))

    def _chat_tokens(self, conversation: Conversation, add_special_tokens: bool) -> tuple[int, ...]:
        """The rendered conversation's tokens; control tokens come from the template alone."""
        broken, mark = self._control.broken(conversation)
        text = self._render(broken)
        first, *rest = [text] if mark is None else text.split(mark)
        ids = self._tokens(first, add_special_tokens, "messages")
        return ids + tuple(token_id for part in rest for token_id in self._tokens(part, False, "messages"))

    def _render(self, conversation: Conversation) -> str:
        if self._engine.chat is None:
            raise ApiError(400, "This model has no chat template.", param="messages", code="no_chat_template")
        try:
            return self._engine.chat.render(
                conversation.messages,
                add_generation_prompt=conversation.add_generation_prompt,
                continue_final_message=conversation.continue_final_message,
                template_kwargs=conversation.template_kwargs,
            )
        except TemplateBusyError:
            raise unavailable("Too many chat templates are being rendered.") from None
        except TemplateError as error:
            shown = printable(str(error), 300)
            raise ApiError(400, shown, param="messages", code="chat_template_error") from None

    def _echoed(self, prompt: Prompt, ids: tuple[int, ...], generation: Generation) -> str | None:
        if not generation.echo:
            return None
        if isinstance(prompt, str) and generation.truncate_prompt_tokens is None:
            return prompt
        return self._engine.tokenizer.decode(ids, generation.sampling.skip_special_tokens)

    def _prepared(
        self,
        generation: Generation,
        fitted: list[tuple[tuple[int, ...], SamplingParams]],
        texts: list[str | None],
        *,
        chat: bool,
        only_prompt: bool,
    ) -> Prepared:
        self._log_unknown(generation.unknown)
        prefix = "chatcmpl" if chat else "cmpl"
        transfer = self._transfer(generation, fitted[0][0])
        requests = tuple(
            self._request(prefix, ids, sampling, generation, transfer) for ids, sampling in fitted
        )
        reply_id = requests[0].request_id if generation.label is None else f"{prefix}-{generation.label}"
        envelope = Envelope(
            reply_id=reply_id,
            chat=chat,
            created=int(self._wall_clock()),
            generation=generation,
            prompts=tuple((text, ids) for text, (ids, _) in zip(texts, fitted, strict=True)),
            only_prompt=only_prompt,
            peer_cached_tokens=None if transfer.remote is None else transfer.remote.cached_tokens,
        )
        return Prepared(envelope=envelope, requests=requests)

    def _transfer(self, generation: Generation, ids: tuple[int, ...]) -> Transfer:
        """What the engine makes of `kv_transfer_params`, which go with a single prompt."""
        if not generation.kv_transfer_params:
            return Transfer()
        try:
            transfer = self._engine.open_transfer(generation.kv_transfer_params, ids, generation.cache_salt)
        except RequestRefused as why:
            raise refused(why) from None
        if transfer.lease and generation.sampling.n > 1:
            raise invalid("n", "must be 1 where `kv_transfer_params` ask for do_remote_decode")
        return transfer

    def _request(
        self,
        prefix: str,
        ids: tuple[int, ...],
        sampling: SamplingParams,
        generation: Generation,
        transfer: Transfer,
    ) -> Request:
        return Request(
            request_id=self._engine.new_request_id(prefix),
            prompt_token_ids=ids,
            sampling=sampling,
            eos_token_ids=self._facts.eos_token_ids,
            cache_salt=generation.cache_salt,
            priority=generation.priority,
            lease=transfer.lease,
            remote=transfer.remote,
        )

    def _log_unknown(self, keys: tuple[str, ...]) -> None:
        now, last = self._clock(), self._unknown_logged_at
        if keys and (last is None or now - last >= UNKNOWN_LOG_INTERVAL_S):
            self._unknown_logged_at = now
            shown = ", ".join(printable(key, 32) for key in keys[:8])
            logger.warning("unknown request fields are ignored, among them: %s", shown)


Prepare = Callable[[bytes], Prepared]
"""A generation route's way from body to requests."""


def facts_of(engine: EngineSurface) -> ModelFacts:
    """What validation must know of the engine's model."""
    return ModelFacts(
        names=engine.served_model_names,
        vocab_size=engine.vocab_size,
        max_model_len=engine.max_model_len,
        eos_token_ids=engine.tokenizer.eos_token_ids,
        defaults=engine.default_sampling,
    )
