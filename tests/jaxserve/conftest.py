"""One engine with the default model in float32, for all tests of a session that need one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxserve import Engine
from jaxserve.sim.recount import Recount
from scheduler.record import decode, decode_inputs
from scheduler.state import initial_state
from scheduler.step import step

ENGINE_SEQS = 36


def recount(record: Path) -> Recount:
    """Runs a record's steps again and counts each request's prompt tokens from the plans."""
    read = decode(record.read_bytes())
    state, counted = initial_state(read.header.config), Recount()
    for data, _ in read.entries:
        inputs = decode_inputs(data)
        state, plan = step(state, inputs, read.header.limits)
        counted.take(inputs, plan)
    return counted


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """36 sequences at once, prompt chunks of up to 128 tokens, pages of 16 tokens; compiles on first use.

    At the end, the accounting of every request that any test made is recounted.
    """
    record = tmp_path_factory.mktemp("engine") / "record"
    with Engine(
        "smollm2",
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=ENGINE_SEQS,
        max_num_batched_tokens=128,
        kv_cache_memory_bytes=400 << 20,
        record=record,
        progress=False,
    ) as running:
        yield running
        total = running.stats.prompts
    counted = recount(record)
    assert sum(stats.num_prompt_tokens for stats in counted.prefilled.values()) == total.total
    assert sum(stats.local_cache_hit for stats in counted.prefilled.values()) == total.local_cache_hit
