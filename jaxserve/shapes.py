"""The compile plan: every shape that the device programs may be called with. Pure; see `compiling.py`.

A step's shape is its bucket. Beside the step there are three small programs, and their shapes are few too: a
slot is written with a history of one of a few lengths, and the log-probabilities of prompts are computed a
fixed number of positions at a time from the hidden states of a bucket.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxserve.batch import Bucket, decode_buckets, mixed_buckets

PROMPT_LOGPROBS_TOKENS = 64
"""Positions per call of the prompt-logprobs program: bounds its logits to 64 rows of the vocabulary."""

HISTORIES = (1, 256)
"""The shortest histories that a slot is written with: nearly all sequences have no penalties and send one."""

HISTORY_FACTOR = 8
"""From each further length to the next. The padding costs little: a scatter that drops what is outside."""

Kind = Literal["decode", "mixed", "slot", "rows", "logprobs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One program of the plan.

    Attributes:
        kind: "decode" and "mixed": a step; "slot": writes a sequence's slot; "rows": takes rows out of a
            step's hidden states; "logprobs": log-probabilities of prompt tokens.
        tokens: T of a step, and of the hidden states that "rows" reads; length of a slot's history; positions
            of "logprobs".
        rows: S of a step; rows that "rows" gives; 1 for a slot.
    """

    kind: Kind
    tokens: int
    rows: int

    @property
    def bucket(self) -> Bucket | None:
        """A step's bucket; None: it is no step."""
        return Bucket(tokens=self.tokens, rows=self.rows) if self.kind in ("decode", "mixed") else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Waste:
    """Padding of a bucket: the fraction of its tokens that are none, 0 to 1.

    Attributes:
        worst: of the smallest batch that runs in it, since it does not fit the next smaller bucket.
        mean: over all numbers of tokens from that batch's to the bucket's.
    """

    worst: float
    mean: float


def step_shape(bucket: Bucket) -> Shape:
    """The step's shape in a bucket."""
    kind = "decode" if bucket.tokens == bucket.rows else "mixed"
    return Shape(kind=kind, tokens=bucket.tokens, rows=bucket.rows)


def slot_shape(tokens: int, max_model_len: int) -> Shape:
    """The shape that writes a slot with a history of so many tokens, at most `max_model_len`."""
    length = next(length for length in histories(max_model_len) if length >= tokens)
    return Shape(kind="slot", tokens=length, rows=1)


def rows_shape(tokens: int) -> Shape:
    """The shape that takes positions out of the hidden states of a bucket with so many tokens."""
    return Shape(kind="rows", tokens=tokens, rows=PROMPT_LOGPROBS_TOKENS)


LOGPROBS_SHAPE = Shape(kind="logprobs", tokens=PROMPT_LOGPROBS_TOKENS, rows=PROMPT_LOGPROBS_TOKENS)


def histories(max_model_len: int) -> list[int]:
    """Lengths of histories, ascending; the last holds the longest sequence."""
    lengths = [length for length in HISTORIES if length < max_model_len]
    while lengths and lengths[-1] >= HISTORIES[-1] and lengths[-1] * HISTORY_FACTOR < max_model_len:
        lengths.append(lengths[-1] * HISTORY_FACTOR)
    return [*lengths, max_model_len]


def buckets_of(
    max_num_seqs: int, max_num_batched_tokens: int, *, deterministic: bool = False
) -> list[Bucket]:
    """Shapes of steps.

    Args:
        deterministic: only one, the largest. A product of matrices sums in an order that depends on its
            shape alone: a token that is always computed in one shape has the same bits in any company.
    """
    if deterministic:
        return mixed_buckets(max_num_batched_tokens, max_num_seqs)[-1:]
    return decode_buckets(max_num_seqs) + mixed_buckets(max_num_batched_tokens, max_num_seqs)


def compile_plan(buckets: Sequence[Bucket], max_model_len: int) -> tuple[Shape, ...]:
    """Every shape, each once: steps in the order of the buckets, then what is beside them."""
    return (
        *(step_shape(bucket) for bucket in buckets),
        *(Shape(kind="slot", tokens=length, rows=1) for length in histories(max_model_len)),
        *(rows_shape(tokens) for tokens in sorted({bucket.tokens for bucket in buckets})),
        LOGPROBS_SHAPE,
    )


def waste_of(bucket: Bucket, buckets: Sequence[Bucket]) -> Waste:
    """What a bucket may waste of its tokens on batches that fit no smaller one.

    Args:
        buckets: all of them, as `batch.choose` takes them.
    """
    decodes = bucket.tokens == bucket.rows
    smaller = [
        other
        for other in buckets
        if (other.tokens == other.rows) == decodes
        and (other.tokens, other.rows) < (bucket.tokens, bucket.rows)
    ]
    fewest = bucket.tokens
    for rows in range(1, bucket.rows + 1):
        held = max((other.tokens for other in smaller if other.rows >= rows), default=0)
        # Decodes have a token per row; any other batch has a row of at least two.
        own = rows if decodes else rows + 1
        if held < bucket.tokens and (not decodes or own > held):
            fewest = min(fewest, max(held + 1, own))
    return Waste(worst=1 - fewest / bucket.tokens, mean=1 - (fewest + bucket.tokens) / 2 / bucket.tokens)
