"""The page buffer split by KV heads over four devices: the same tokens as on one, every shard exported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SHARDS = 4


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What a process with four devices saw: see sharded_pool.py. The number is fixed before JAX starts."""
    # Only the CPU: a GPU's devices are not four.
    environment = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=4")
    done = subprocess.run(
        [sys.executable, "-m", "tests.jaxserve.sharded_pool"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_four_devices_give_the_tokens_of_one(seen: dict[str, Any]) -> None:
    alone, sharded = seen["tokens"]
    assert len(alone) == 8 and all(len(tokens) == 14 for tokens in alone.values())
    assert sharded == alone
    assert all(seen["world"].values()), "chunks beside decodes, pages used again, prefixes found"


def test_the_log_probabilities_of_prompts_are_those_of_one(seen: dict[str, Any]) -> None:
    alone, sharded = seen["prompt logprobs"]
    assert len(alone) == 3 and sharded == pytest.approx(alone, abs=1e-5)


def test_every_shard_is_a_region_that_stays_where_it_is(seen: dict[str, Any]) -> None:
    (regions,) = seen["regions"]
    assert len({address for address, _ in regions}) == SHARDS
    assert [page_bytes for _, page_bytes in regions] == [2 * 2 * 4 * 16 * 4] * SHARDS, "one head of four"
    assert seen["moves"] == [0, 0] and seen["compiled later"] == 0


def test_a_shard_holds_its_heads_of_the_pool_on_one_device(seen: dict[str, Any]) -> None:
    """To 1e-5: sums over heads are made in another order."""
    assert seen["farthest"] < 1e-5


def test_no_page_crosses_between_devices_and_every_shard_is_donated(seen: dict[str, Any]) -> None:
    program = seen["program"]
    assert program["aliased pool bytes"] == program["bytes of a shard"]
    assert program["collectives"] > 0 and program["collectives of pages"] == 0


def test_a_row_is_the_shards_parts_and_goes_out_and_in_by_address_or_program(seen: dict[str, Any]) -> None:
    assert set(seen["rows"].values()) == {True}, seen["rows"]
    assert seen["out and in"] == seen["tokens"][0]


def test_what_is_written_through_a_shards_address_is_what_the_next_step_reads(seen: dict[str, Any]) -> None:
    for alone, sharded in seen["poisoned"]:
        assert sharded == alone != seen["tokens"][0]


def test_regions_come_in_the_order_of_the_heads_whatever_the_devices_numbers(seen: dict[str, Any]) -> None:
    assert seen["first heads of shards"] == [0, 1, 2, 3], "on a mesh of the devices in reverse"


def test_a_pool_made_anew_is_sharded_and_told_of_once(seen: dict[str, Any]) -> None:
    assert set(seen["lost"].values()) == {True}, seen["lost"]


def test_a_mesh_that_does_not_fit_is_refused(seen: dict[str, Any]) -> None:
    uneven, two_axes, copied = seen["refused"]
    assert uneven == "3 devices do not divide 4 KV heads"
    assert "one axis, 'tensor'" in two_axes and "holds the whole pool" in copied
