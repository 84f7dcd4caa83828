"""What the server needs of an engine."""

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Any, Protocol

from jaxserve.census import PageCensus
from jaxserve.outputs import Delta, Transfer
from scheduler.types import Request


class TokenizerSurface(Protocol):
    """Text to tokens and back; usable from any thread."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The model's own end tokens."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are control marks, not text."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`."""
        ...

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`."""
        ...

    def token(self, token_id: int) -> str:
        """The token as text."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text."""
        ...


class ChatSurface(Protocol):
    """The model's chat template."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] = ...,
    ) -> str:
        """The text of a conversation. Blocks.

        Raises:
            jaxserve.text.TemplateBusyError: no worker became free in time.
            jaxserve.text.TemplateError: with a message that a client may see.
        """
        ...


class PrepareSurface(Protocol):
    """What a request is made with before the engine takes it in; usable from any thread."""

    @property
    def tokenizer(self) -> TokenizerSurface:
        """The model's tokenizer."""
        ...

    @property
    def chat(self) -> ChatSurface | None:
        """The model's chat template; None: it has none."""
        ...

    def new_request_id(self, prefix: str) -> str:
        """An id that was never used before."""
        ...

    def open_transfer(
        self, params: Mapping[str, Any], prompt_token_ids: tuple[int, ...], cache_salt: str
    ) -> Transfer:
        """What a request's `kv_transfer_params` ask for, checked against our role and our peers' key.

        Args:
            params: what the client sent, not empty; nothing in it is to be trusted.
            prompt_token_ids: of the request.
            cache_salt: of the request.

        Raises:
            RequestRefused: with `param` "kv_transfer_params" and a reason for the client: this engine has no
                connector, or another role; the parameters are no peer's, or of another prompt.
        """
        ...


class EngineSurface(PrepareSurface, Protocol):
    """The engine as the server sees it.

    `chat.render`, the tokenizer, `new_request_id` and `open_transfer` are called from any thread, everything
    else on the event loop.
    """

    @property
    def served_model_names(self) -> tuple[str, ...]:
        """At least one; the first is the main one."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        ...

    @property
    def max_model_len(self) -> int:
        """Bound on prompt + output tokens."""
        ...

    @property
    def default_sampling(self) -> Mapping[str, float | int]:
        """Sampling values of generation_config.json, by vLLM's names."""
        ...

    @property
    def alive(self) -> bool:
        """Whether the engine's loop runs."""
        ...

    def check_room(self) -> None:
        """Says early, and cheaply, whether a request would be refused because too many wait.

        Raises:
            QueueFull: it would. The engine has counted it.
        """
        ...

    def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Deltas of all sequences of a request, interleaved, until each has finished.

        Closing or cancelling the generator aborts the request.

        Raises:
            QueueFull: at the first item: too many requests wait. The engine has counted it.
            RequestRefused: at the first item: it can never run.
            EngineError: the engine cannot serve.
        """
        ...

    def stalled(self, seconds: float) -> bool:
        """Whether work waits and no step has completed for that long."""
        ...

    def metrics_text(self, accept: str) -> tuple[bytes, str]:
        """The metrics and their content type."""
        ...

    async def reset_prefix_cache(self, *, external: bool = False) -> bool:
        """Drops every cached page that nobody uses."""
        ...

    async def page_census(self) -> PageCensus:
        """Every page by what it is for. Answers in a bounded time, whatever the engine does."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Lets running requests finish within the time, then aborts the rest."""
        ...
