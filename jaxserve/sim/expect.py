"""What a client wants, and what that must bring: tokens, text, and why it ends, without an engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from jaxserve.sim.hash_model import END, VOCAB, HashModel
from jaxserve.text import Tokenizer
from jaxserve.text.vocab import Vocab
from scheduler.types import FinishReason, Request, SamplingParams

_EURO = "âĤ¬"
"""The three bytes of one character, in the alphabet of byte-level vocabularies."""


@cache
def vocabulary() -> Vocab:
    """Letters, digits, and the three bytes of one character as tokens of their own."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ01234567"[: VOCAB - 4]
    pieces = {piece: number for number, piece in enumerate((*letters, *_EURO))}
    backend = Backend(models.BPE(vocab={**pieces, "<end>": END}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Vocab(
        backend=backend,
        bos_token_id=None,
        eos_token_ids=(END,),
        chat_template=None,
        special_tokens={"eos_token": "<end>"},
    )


def text_of(tokens: Sequence[int]) -> str:
    """The text of tokens, whatever becomes of the tokenizers that engines have."""
    return Tokenizer(vocabulary()).decode(tokens)


class TokenizerFailed(Exception):
    """A fault, not a mistake."""


class SimTokenizer(Tokenizer):
    """A tokenizer that can be made to fail. Attributes: failing: the call that raises, counted from the next
    one as 1; 0: none."""

    def __init__(self, failed: Callable[[], None] = lambda: None) -> None:
        """Args: failed: called when it does."""
        super().__init__(vocabulary())
        self.failing = 0
        self._failed = failed

    def token_bytes(self, token_id: int) -> bytes:
        """See `Tokenizer`."""
        if self.failing:
            self.failing -= 1
            if not self.failing:
                self._failed()
                raise TokenizerFailed
        return super().token_bytes(token_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a client wants, as it drew it: no code of a server has read it.

    Attributes:
        salt: of its tenant; empty: it has none.
        stream: it wants the answer bit by bit.
        usage: and at its end what was used; an answer that is not streamed says it in any case.
        usage_often: and in every bit.
    """

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    salt: str = ""
    priority: int = 0
    stream: bool = False
    usage: bool = False
    usage_often: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """One sequence's output. Attributes: stop_reason: as in `Delta`."""

    tokens: tuple[int, ...]
    text: str
    reason: FinishReason
    stop_reason: int | str | None


def expected(
    model: HashModel, wish: Wish | Request, index: int, *, max_model_len: int, tokenizer: Tokenizer
) -> Expected:
    """The output of one sequence of a request served alone."""
    sampling, prompt = wish.sampling, wish.prompt_token_ids
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {END})
    most = max_model_len if sampling.max_tokens is None else len(prompt) + sampling.max_tokens
    tokens, seed = list(prompt), (sampling.seed or 0) + index
    while True:
        tokens.append(model.next_token(tuple(tokens), seed))
        output = tuple(tokens[len(prompt) :])
        if output[-1] in ends and len(output) >= sampling.min_tokens:
            asked = output[-1] if output[-1] in sampling.stop_token_ids else None
            text = tokenizer.decode(output[:-1])
            return Expected(tokens=output, text=text, reason=FinishReason.STOP, stop_reason=asked)
        text = tokenizer.decode(output)
        hits = [(text.index(stop), stop) for stop in sampling.stop if stop in text]
        if hits:
            where, stop = min(hits)
            return Expected(tokens=output, text=text[:where], reason=FinishReason.STOP, stop_reason=stop)
        if len(tokens) >= min(most, max_model_len):
            return Expected(tokens=output, text=text, reason=FinishReason.LENGTH, stop_reason=None)
