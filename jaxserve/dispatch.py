"""What a device is told of a step beside its plan, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxserve.sample import Sampled
from scheduler.types import Outcome, Request, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SlotSetup:
    """A sequence that got a slot.

    Attributes:
        sampling: its parameters, seed resolved.
        stop_token_ids: ids that min_tokens keeps back.
        tokens: int32, prompt and output so far.
        num_prompt: how many of them are prompt.
    """

    slot: int
    sampling: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...]
    tokens: np.ndarray
    num_prompt: int


def slot_setup(request: Request, index: int, output: Sequence[int], *, slot: int) -> SlotSetup:
    """What the device is told of a sequence that gets a slot.

    Args:
        index: of the sequence in its request: each draws with a seed of its own.
        output: its tokens so far.
    """
    sampling = request.sampling
    return SlotSetup(
        slot=slot,
        sampling=sampling,
        seed=_wrap(int(sampling.seed or 0) + index),
        stop_token_ids=(*sampling.stop_token_ids, *request.eos_token_ids),
        tokens=np.asarray((*request.prompt_token_ids, *output), np.int32),
        num_prompt=len(request.prompt_token_ids),
    )


def _wrap(seed: int) -> int:
    """A seed plus an index, kept in 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptSpan:
    """A row whose prompt positions' log-probabilities are wanted in this step.

    Attributes:
        first_token: index in the batch of the row's first token.
        start: prompt position of that token.
        targets: int32, the prompt tokens that follow the row's tokens.
    """

    slot: int
    first_token: int
    start: int
    targets: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """What starting a step took.

    Attributes:
        tokens: that the device was given, padding among them; 0: nothing was started.
        padding_tokens: of these, those of no row.
        compile_misses: programs that were compiled for it because they were not compiled ahead.
    """

    tokens: int = 0
    padding_tokens: int = 0
    compile_misses: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pending:
    """A step under way, or one that could not be started."""

    step_id: int
    rows: int
    sampled: jax.Array | None
    spans: tuple[tuple[PromptSpan, tuple[jax.Array, ...]], ...] = ()
    dispatch: Dispatch = Dispatch()
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Executed:
    """A step that is done.

    Attributes:
        sampled: one entry per row of the plan; None where the step failed.
        spans: per prompt span, its log-probabilities, one entry per target.
        dispatch: what starting it took.
    """

    outcome: Outcome
    sampled: Sampled | None
    spans: tuple[tuple[PromptSpan, Sampled], ...] = ()
    dispatch: Dispatch = Dispatch()
