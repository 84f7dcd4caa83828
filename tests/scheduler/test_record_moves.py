"""A record of a run whose moves failed in every way says the same in any process."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from scheduler.record import RecordError, decode, digest, encode_entry, encode_header, encode_inputs, replay
from scheduler.types import Inputs, Limits
from tests.scheduler.moving_world import Faults, MovingWorld
from tests.scheduler.test_moves import LAZY, NIXL_D, NIXL_P, OFFLOAD, SIMPLE, config, multi
from tests.scheduler.world import request

LIMITS = Limits(max_num_batched_tokens=12, max_num_seqs=4)
SMALL = {"host_slots": 12}
TRANSFERS = {
    "consumer": multi(NIXL_D, replace(SIMPLE, **SMALL), replace(OFFLOAD, **SMALL), compose=True),
    "producer": multi(replace(LAZY, **SMALL), NIXL_P),
    "arc": replace(OFFLOAD, eviction_policy="arc", offload_prompt_only=False, **SMALL),
}

REPLAY = """
import sys
from scheduler.record import decode, replay
print(replay(decode(open(sys.argv[1], "rb").read())).digest)
"""


class Recording(MovingWorld):
    """A world that writes what its scheduler was given, and what it decided."""

    def __init__(self, made, **fields) -> None:
        super().__init__(made, LIMITS, **fields)
        self.data, self.chained = encode_header(made, LIMITS)
        take = self.recount.take

        def note(inputs: Inputs, plan) -> None:
            given = encode_inputs(inputs)
            self.chained = digest(self.chained, given, plan)
            self.data += encode_entry(given, self.chained)
            take(inputs, plan)

        self.recount.take = note


def record(name: str) -> Recording:
    faults = Faults(load_short=0.3, load_unsafe=0.2, store_fails=0.2, step_fails=0.03, pool_moves=0.03)
    world = Recording(config(TRANSFERS[name], pages=24), seed=11, faults=faults)
    for number in range(14):
        tokens = range(number % 4 * 20, number % 4 * 20 + 6 + number * 2)
        asked = request(f"r{number}", tokens, max_tokens=6)
        if name == "consumer" and number % 3:
            asked = replace(asked, remote=world.remote(f"r{number}", tokens))
        if name == "producer" and number % 2:
            asked = replace(asked, lease=True)
        world.step(arrivals=(asked,), aborts=("r3",) if number == 5 else ())
        world.step()
    world.run()
    return world


@pytest.mark.parametrize("name", sorted(TRANSFERS))
def test_a_record_under_faults_replays_in_another_process_with_other_hashes(name, tmp_path):
    world = record(name)
    assert world.counts["stored"] > 0
    assert name == "arc" or world.counts["leases" if name == "producer" else "unsafe"] > 0
    path = tmp_path / "record"
    path.write_bytes(world.data)
    for seed in ("1", "12345"):
        told = subprocess.run(
            [sys.executable, "-c", REPLAY, str(path)],
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
            timeout=60,
        )  # fmt: skip
        assert told.stdout.strip() == world.chained.hex()


@pytest.mark.parametrize("name", sorted(TRANSFERS))
def test_the_header_holds_the_connectors_as_they_were_configured(name):
    made = config(TRANSFERS[name], pages=24)
    data, _ = encode_header(made, LIMITS)
    header = decode(data).header
    assert header.config == made and header.limits == LIMITS


def test_a_changed_byte_of_a_record_with_moves_is_found():
    data = record("consumer").data
    assert replay(decode(data)).steps > 20
    for place in range(0, len(data), len(data) // 40):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        with pytest.raises(RecordError):
            replay(decode(bytes(changed)))
