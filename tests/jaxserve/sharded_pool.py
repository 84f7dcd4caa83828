"""Serves the same requests on one device and on four, and prints what was seen as JSON.

`python -m tests.jaxserve.sharded_pool`, where XLA_FLAGS makes four devices of one processor.
"""

import ctypes
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.device import Device, join
from jaxserve.dispatch import Pending, PromptSpan, SlotSetup
from jaxserve.model.config import ModelConfig
from jaxserve.model.sharding import AXIS, pool_sharding
from jaxserve.model.transformer import random_model
from jaxserve.shapes import step_shape
from jaxserve.weights.load import Loaded
from kv import pool
from kv.copies import PointerCopies, ProgramCopies
from kv.driver import Region
from kv.types import DUMMY_PAGE, KvSpec, PageGroup
from scheduler.state import check, initial_state
from scheduler.step import step
from scheduler.types import Inputs, Limits, Request, SamplingParams, SchedulerConfig

SHARDS, NUM_PAGES, PAGE, SEQS, BUDGET, MAX_LEN = 4, 21, 4, 3, 11, 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128,
    hidden_size=48,
    intermediate_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    max_position_embeddings=MAX_LEN,
)
SPEC = KvSpec(
    groups=(PageGroup(name="all", layers=(0, 1), kv_heads=4, head_dim=16),),
    page_size=PAGE,
    dtype="float32",
)
COLLECTIVES = ("all-gather", "all-to-all", "collective-permute", "all-reduce")

Between = Callable[[int, Device], None]
"""Called with the number of a step that is done."""


def make(mesh: Mesh | None) -> Device:
    graphdef, weights = random_model(CONFIG, seed=1, dtype="float32")
    return Device(
        Loaded(config=CONFIG, graphdef=graphdef, state=weights, weights_digest="tiny"),
        SPEC,
        num_pages=NUM_PAGES,
        max_num_seqs=SEQS,
        max_num_batched_tokens=BUDGET,
        max_model_len=MAX_LEN,
        backend="xla",
        mesh=mesh,
    )


@dataclass(eq=False)
class Served:
    """What became of the requests.

    Attributes:
        tokens: by request.
        regions: different ones seen after steps, in order.
        changed: steps after which the device said that the pool lies elsewhere.
        mixed: steps with a prompt chunk and a decode in one batch.
    """

    tokens: dict[str, list[int]] = field(default_factory=dict)
    regions: list[tuple[Region, ...]] = field(default_factory=list)
    steps: int = 0
    changed: int = 0
    mixed: int = 0
    preempted: int = 0
    hits: int = 0


def serve(device: Device, between: Between = lambda number, device: None) -> Served:
    """Runs prompts that share a beginning through the scheduler and the device, twice."""
    rng = np.random.default_rng(2)
    shared = rng.integers(1, CONFIG.vocab_size, 18).tolist()
    prompts = [tuple(shared + rng.integers(1, CONFIG.vocab_size, tail).tolist()) for tail in (1, 9, 13, 5)]
    limits = Limits(max_num_batched_tokens=BUDGET, max_num_seqs=SEQS)
    state = initial_state(
        SchedulerConfig(
            windows=(None,), page_size=PAGE, num_pages=NUM_PAGES, max_num_seqs=SEQS, max_model_len=MAX_LEN
        )
    )
    served, owners = Served(), dict[int, str]()
    for turn in range(2):
        requests = {
            f"{turn}-{index}": Request(request_id=f"{turn}-{index}", prompt_token_ids=prompt, sampling=GREEDY)
            for index, prompt in enumerate(prompts)
        }
        inputs = Inputs(arrivals=tuple(requests.values()))
        while True:
            state, plan = step(state, inputs, limits)
            check(state)
            for slot, token in zip(plan.accepted.slots, plan.accepted.tokens, strict=True):
                served.tokens.setdefault(owners[int(slot)], []).append(int(token))
            owners.update({entry.slot: entry.request_id for entry in plan.admitted})
            served.preempted += len(plan.preempted)
            served.hits += sum(entry.hit_tokens for entry in plan.admitted)
            if not len(plan.rows):
                break
            setups = [
                SlotSetup(
                    slot=entry.slot, sampling=GREEDY, seed=0, stop_token_ids=(),
                    tokens=np.asarray(requests[entry.request_id].prompt_token_ids, np.int32), num_prompt=1,
                )
                for entry in plan.admitted
            ]  # fmt: skip
            executed = device.wait(device.start(plan, setups, []))
            if executed.outcome.error is not None:
                raise RuntimeError(executed.outcome.error)
            served.steps += 1
            served.changed += device.pool_changed()
            served.mixed += bool((plan.rows.lens > 1).any() and (plan.rows.lens == 1).any())
            if (regions := device.regions()) not in served.regions:
                served.regions.append(regions)
            between(served.steps, device)
            inputs = Inputs(outcome=executed.outcome)
    return served


def memory_of(region: Region) -> np.ndarray:
    """A shard where it lies, JAX knowing nothing: float32 `[pages, layers, 2, its heads, page_size, D]`."""
    held = (ctypes.c_float * (region.num_bytes // 4)).from_address(region.address)
    layers, two, _, size, head_dim = SPEC.page_shape
    return np.ctypeslib.as_array(held).reshape(region.num_pages, layers, two, -1, size, head_dim)


def copies_of(device: Device) -> tuple[PointerCopies, ProgramCopies]:
    programs = ProgramCopies(lambda: device.pages, device.put_pages, lock=device.lock, ranks=SHARDS)
    return PointerCopies(device.regions()), programs


def out_and_in(number: int, device: Device) -> None:
    """All pages are copied out, wiped in every shard, and copied in: one by address, the other by program."""
    pages, rows = list(range(NUM_PAGES)), np.zeros((NUM_PAGES, SPEC.page_bytes), np.uint8)
    reader, writer = copies_of(device)[:: 1 if number % 2 else -1]
    reader.read(pages, rows)
    for region in device.regions():
        ctypes.memset(region.address, 0xFF, region.num_bytes)
    writer.write(pages, rows)
    jax.block_until_ready(device.pages)


def poison(shard: int) -> Between:
    """After the tenth step, other KV for a shard's heads in every page: through the shard's own address, or
    through the one address of a pool that is not sharded."""
    layers, two, heads, size, head_dim = SPEC.page_shape
    shape = (NUM_PAGES, layers, two, heads // SHARDS, size, head_dim)
    other = np.random.default_rng(shard).standard_normal(shape, np.float32)

    def between(number: int, device: Device) -> None:
        if number == 10:
            regions = device.regions()
            sharded = len(regions) > 1
            held = memory_of(regions[shard if sharded else 0])
            (held if sharded else held[:, :, :, shard : shard + 1])[:] = other

    return between


def farthest(device: Device, one: Device) -> float:
    """Between what a shard's memory and its heads of the pool on one device hold, at most over all shards.
    The dummy page holds whatever was written into it last."""
    whole = device_memory(one)[0]
    parts = device_memory(device)
    heads = whole.shape[3] // len(parts)
    return max(
        float(np.abs(part - whole[:, :, :, heads * shard : heads * (shard + 1)])[DUMMY_PAGE + 1 :].max())
        for shard, part in enumerate(parts)
    )


def device_memory(device: Device) -> list[np.ndarray]:
    jax.block_until_ready(device.pages)
    return [memory_of(region) for region in device.regions()]


def rows_of_both(device: Device) -> dict[str, bool]:
    """A page's row is the parts of the shards one after another, to both kinds of copies.

    All is read from memory: an array that was ever shown to NumPy keeps what NumPy saw.
    """
    pages, targets = [3, 4, 9, 1], [17, 2, 18, 19]
    others = np.setdiff1d(np.arange(1, NUM_PAGES), targets)
    rows = [np.zeros((4, SPEC.page_bytes), np.uint8) for _ in range(2)]
    by_address, by_program = copies_of(device)
    sharding, regions, before = device.pages.sharding, device.regions(), all_rows(device)
    by_address.read(pages, rows[0])
    by_program.read(pages, rows[1])
    by_address.write(targets, rows[0])
    after = all_rows(device)
    by_program.write(targets, rows[1][::-1])
    last = all_rows(device)
    return {
        "read": all(np.array_equal(row, before[pages]) for row in rows) and bool(rows[0].any()),
        "written by address": np.array_equal(after[targets], before[pages]),
        "written by a program": np.array_equal(last[targets], before[pages[::-1]]),
        "other pages stay": all(np.array_equal(now[others], before[others]) for now in (after, last)),
        "still sharded": device.pages.sharding == sharding,
        "in place": device.regions() == regions,
    }


def all_rows(device: Device) -> np.ndarray:
    """What lies in all pages, the shards' parts one after another."""
    return np.concatenate(
        [part.reshape(NUM_PAGES, -1).view(np.uint8) for part in device_memory(device)], axis=1
    )


def first_heads(mesh: Mesh) -> list[int]:
    """What the regions hold, in order, of a pool where every number is its KV head."""
    shape = pool.create(SPEC, 2).shape
    heads = np.broadcast_to(np.arange(shape[3], dtype=np.float32)[:, None, None], shape)
    pages = jax.device_put(heads.view(np.uint32), pool_sharding(mesh, shape[3]))
    regions = pool.regions(pages, SPEC.page_bytes)
    return [int(memory_of(region).flat[0]) for region in regions]


def program(device: Device) -> dict[str, int]:
    """Of the largest bucket's step, on one of the devices."""
    compiled: Any = device._built[step_shape(device.buckets[-1])].compiled
    lines = compiled.as_text().splitlines()
    sent = [line for line in lines if any(f" {name}(" in line for name in COLLECTIVES)]
    aliased = compiled.memory_analysis().alias_size_in_bytes
    return {
        "aliased pool bytes": aliased - sum(leaf.nbytes for leaf in jax.tree.leaves(device._slots)),
        "bytes of a shard": device.pages.nbytes // SHARDS,
        "collectives": len(sent),
        "collectives of pages": sum("u32[" in line for line in sent),
    }


def prompt_logprobs(device: Device) -> list[float]:
    """Of three tokens behind hidden states that are the same on every call."""
    hidden = np.random.default_rng(5).standard_normal((8, CONFIG.hidden_size), np.float32)
    span = PromptSpan(slot=0, first_token=2, start=2, targets=np.array([5, 90, 114], np.int32))
    chunks = device._span_chunks(jax.device_put(hidden, device._rest), span)
    return join(span, chunks).logprobs.tolist()


def lost(device: Device) -> dict[str, bool]:
    """A step has failed: the pool is made anew."""
    sharding = device.pages.sharding
    device.wait(Pending(step_id=1, rows=0, sampled=None, error="gone"))
    changed = [device.pool_changed(), device.pool_changed()]
    regions = len(device.regions()) == SHARDS and device.pages.sharding == sharding
    return {"told once": changed == [True, False], "sharded": regions, "empty": not all_rows(device).any()}


def refused(make_it: Callable[[], object]) -> str:
    try:
        make_it()
    except (ValueError, pool.ExportError) as error:
        return str(error)
    return ""


def main() -> None:
    devices = np.array(jax.devices())
    mesh = Mesh(devices, (AXIS,))
    one, four = make(None), make(mesh)
    four.compile()
    alone, sharded = serve(one), serve(four)
    seen: dict[str, Any] = {
        "tokens": [alone.tokens, sharded.tokens],
        "world": {"mixed": alone.mixed, "preempted": alone.preempted, "hits": alone.hits},
        "regions": [[(region.address, region.page_bytes) for region in every] for every in sharded.regions],
        "moves": [sharded.changed, four.pool_moves],
        "compiled later": four.compile_misses,
        "farthest": farthest(four, one),
        "program": program(four),
        "first heads of shards": first_heads(Mesh(devices[::-1], (AXIS,))),
        "rows": rows_of_both(four),
        "out and in": serve(four, out_and_in).tokens,
        "poisoned": [[serve(one, poison(n)).tokens, serve(four, poison(n)).tokens] for n in range(SHARDS)],
        "prompt logprobs": [prompt_logprobs(one), prompt_logprobs(four)],
        "lost": lost(four) | {"works": serve(four).tokens == alone.tokens},
    }
    copied = NamedSharding(mesh, PartitionSpec())
    seen["refused"] = [
        refused(lambda: make(Mesh(devices[:3], (AXIS,)))),
        refused(lambda: make(Mesh(devices.reshape(2, 2), ("data", AXIS)))),
        refused(lambda: pool.regions(pool.create(SPEC, 4, copied), SPEC.page_bytes)),
    ]
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
