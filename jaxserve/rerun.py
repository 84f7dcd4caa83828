"""Runs the steps of a record on the model again and compares every token, if the engine was deterministic.

The scheduler's part of a replay needs no model: `scheduler.record.replay`. Here its plans are executed too,
with the recorded tokens as outcomes, so that the first one that comes differently can be named.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from jaxserve.assemble import assemble
from jaxserve.config import EngineConfig
from jaxserve.dispatch import Executed, Pending, PromptSpan, SlotSetup, slot_setup
from scheduler.record import Header, Record, RecordError, Replayed, replay
from scheduler.types import Inputs, Outcome, Plan, Request


class Runner(Protocol):
    """What executes plans; see `jaxserve.device.Device`."""

    def start(self, plan: Plan, setups: Sequence[SlotSetup], spans: Sequence[PromptSpan]) -> Pending: ...

    def wait(self, pending: Pending) -> Executed: ...


@dataclass(slots=True, eq=False)
class _Sequence:
    """Attributes: output: the tokens that were accepted so far."""

    request: Request
    index: int
    output: list[int] = field(default_factory=list)


class Rerun:
    """Takes every step of a replay in turn.

    Attributes:
        tokens: sampled tokens that came again.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._requests: dict[str, Request] = {}
        self._sequences: dict[tuple[str, int], _Sequence] = {}
        self._slots: dict[int, _Sequence] = {}
        self._setups: dict[int, SlotSetup] = {}
        self._pending: dict[int, tuple[Plan, Pending]] = {}
        self.tokens = 0

    def take(self, inputs: Inputs, plan: Plan) -> None:
        """One step.

        Raises:
            RecordError: a token differs, or a step cannot be run again.
        """
        if inputs.outcome is not None:
            self._compare(inputs.outcome)
        self._requests |= {request.request_id: request for request in inputs.arrivals}
        for slot, token in zip(plan.accepted.slots.tolist(), plan.accepted.tokens.tolist(), strict=True):
            self._slots[slot].output.append(token)
        for ended in plan.finished:
            if ended.slot is not None:
                self._leave(ended.slot)
            self._sequences.pop((ended.request_id, ended.index), None)
        for preempted in plan.preempted:
            self._leave(preempted.slot)
        for entry in plan.admitted:
            key = (entry.request_id, entry.index)
            sequence = self._sequences.setdefault(
                key, _Sequence(self._requests[entry.request_id], entry.index)
            )
            self._slots[entry.slot] = sequence
            self._setups[entry.slot] = slot_setup(
                sequence.request, sequence.index, sequence.output, slot=entry.slot
            )
        if len(plan.rows):
            pending = self._runner.start(plan, list(self._setups.values()), ())
            self._setups.clear()
            self._pending[plan.step_id] = (plan, pending)

    def _leave(self, slot: int) -> None:
        del self._slots[slot]
        self._setups.pop(slot, None)

    def _compare(self, outcome: Outcome) -> None:
        plan, pending = self._pending.pop(outcome.step_id)
        ran = self._runner.wait(pending).outcome
        if ran.error is not None:
            raise RecordError(f"step {outcome.step_id} cannot be run again: {ran.error}")
        if outcome.error is not None:  # it gave no tokens then; what it wrote is computed again
            return
        samples = np.nonzero(plan.rows.samples)[0]
        differing = samples[ran.tokens[samples] != outcome.tokens[samples]]
        if len(differing):
            row = int(differing[0])
            raise RecordError(
                f"step {outcome.step_id}: output token {plan.rows.num_outputs[row]} of the sequence in slot "
                f"{plan.rows.slots[row]} was {outcome.tokens[row]} and is {ran.tokens[row]} now"
            )
        self.tokens += len(samples)


def facts_of(config: EngineConfig, dtype: str) -> dict[str, str | int | bool]:
    """What a record says of its engine. Args: dtype: resolved."""
    return {
        "model": config.model,
        "dtype": dtype,
        "attention_backend": config.attention_backend,
        "deterministic": config.deterministic,
        "jax": jax.__version__,
    }


def config_of(header: Header, *, model: str | None, cache_dir: Path | None) -> EngineConfig:
    """An engine that runs what the recorded one ran. Args: model: where it lies now; None: where it lay.

    Raises:
        RecordError: the recorded tokens need not come again.
    """
    facts, scheduler = header.engine, header.config
    if facts.get("deterministic") is not True:
        raise RecordError("the record was made without --deterministic: its tokens need not come again")
    if scheduler.transfer is not None:
        raise RecordError("the recorded engine had connectors: pages that they brought are not in the record")
    return EngineConfig(
        model=model or str(facts["model"]),
        dtype=str(facts["dtype"]),
        attention_backend=str(facts["attention_backend"]),
        deterministic=True,
        page_size=scheduler.page_size,
        num_pages=scheduler.num_pages,
        max_num_seqs=scheduler.max_num_seqs,
        max_model_len=scheduler.max_model_len,
        max_num_batched_tokens=header.limits.max_num_batched_tokens,
        enable_prefix_caching=scheduler.enable_prefix_caching,
        scheduling_policy=scheduler.policy,
        cache_dir=cache_dir,
    )


def rerun(
    record: Record, *, model: str | None, cache_dir: Path, report: Callable[[str], None]
) -> tuple[Replayed, int]:
    """Loads the model and runs the record on it; also returns how many sampled tokens came again.

    Args:
        model: where it lies now; None: where it lay.
        report: told what takes long.

    Raises:
        RecordError: the record is damaged, its tokens need not come again, or one does not.
        ConfigError, WeightsError: the model cannot be had.
    """
    parts = assemble(config_of(record.header, model=model, cache_dir=cache_dir), cache_dir, report)
    if parts.scheduler.cache_key != record.header.config.cache_key:
        raise RecordError(f"{parts.source.path} holds other weights than the recorded engine had")
    running = Rerun(parts.device)
    return replay(record, running.take), running.tokens
