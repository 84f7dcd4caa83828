"""Every byte of a record counts."""

import pytest

from scheduler.record import (
    RecordError,
    decode,
    decode_inputs,
    digest,
    encode_entry,
    encode_header,
    encode_inputs,
    replay,
)
from scheduler.types import FinishReason, Inputs, Limits, SchedulerConfig, Stop
from tests.scheduler.world import World, request


class Recording(World):
    """A world that writes what its scheduler was given."""

    def __init__(self) -> None:
        config = SchedulerConfig(page_size=4, num_pages=14, max_num_seqs=3, max_model_len=40, windows=(None,))
        limits = Limits(max_num_batched_tokens=12, max_num_seqs=3)
        super().__init__(config, limits)
        self.data, self.chained = encode_header(config, limits)

    def step(self, **inputs):
        given = encode_inputs(Inputs(outcome=self.pending, **inputs))
        plan = super().step(**inputs)
        self.chained = digest(self.chained, given, plan)
        self.data += encode_entry(given, self.chained)
        return plan


@pytest.fixture(scope="module")
def record() -> bytes:
    """A record with preemptions, aborts, a host's stop and a reset."""
    world = Recording()
    prompts = {name: range(base, base + 9) for name, base in zip("abc", (0, 20, 40), strict=True)}
    world.step(arrivals=tuple(request(n, p, max_tokens=16, ignore_eos=True) for n, p in prompts.items()))
    for _ in range(12):
        world.step()
    world.step(aborts=("c",), reset_prefix_cache=True)
    world.step(stops=(Stop(request_id="b", index=0, reason=FinishReason.STOP, stop_reason="END"),))
    world.run()
    assert world.counts["preempted"] > 0
    return world.data


def test_a_record_replays(record):
    seen = replay(decode(record))
    assert seen.preempted > 0 and seen.aborted == 1 and seen.cut_bytes == 0 and seen.steps > 10


def test_any_changed_byte_is_found(record):
    """All places, one bit each (which one changes from place to place)."""
    for place in range(len(record)):
        changed = bytearray(record)
        changed[place] ^= 1 << place % 8
        with pytest.raises(RecordError):
            replay(decode(bytes(changed)))


def test_a_cut_record_says_how_much_is_missing(record):
    whole = replay(decode(record))
    seen = replay(decode(record[:-5]))
    assert seen.steps == whole.steps - 1 and seen.cut_bytes > 0
    with pytest.raises(RecordError, match="empty"):
        decode(record[:6])


def test_inputs_survive_the_way_through_bytes(record):
    for data, _ in decode(record).entries:
        assert encode_inputs(decode_inputs(data)) == data
