"""Three ways to run a model's layers, compared: what each costs to lower, to compile and to run.

    unrolled   a Python loop traces every layer anew
    called     the loop calls one jitted layer: traced once, and XLA inlines the calls
    scanned    lax.scan over stacked weights

A model of the default model's shape with random weights. Steps are timed by turns, by the processor's time of
the whole process, since wall time says little on a machine that others use. The compilation cache is off.
"""

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve import sample as sampling
from jaxserve.batch import Bucket, pack, unpack
from jaxserve.bench.tables import grid
from jaxserve.forward import Geometry, attend_pages
from jaxserve.model.config import ModelConfig
from jaxserve.model.rope import angles, inverse_frequencies
from jaxserve.model.transformer import random_model
from kv import pool
from kv.types import KvSpec, PageGroup
from scheduler.types import Rows

PAGE_SIZE, MAX_PAGES, SLOTS = 16, 64, 64
CONTEXT = 128
BUCKETS = (Bucket(tokens=2, rows=2), Bucket(tokens=16, rows=16), Bucket(tokens=512, rows=8))


def smollm2(layers: int) -> ModelConfig:
    """The default model's shape, with another number of layers."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_layers=layers,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
        max_position_embeddings=8_192,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Way:
    """One way to run the layers.

    Attributes:
        weights: what its step takes, all layers or stacked ones.
        layers: from weights, `x`, rotation, pages and an `attend` to `x` and pages.
    """

    name: str
    weights: Any
    layers: Callable[..., tuple[jax.Array, jax.Array]]


def ways(graphdef: Any, state: Any) -> list[Way]:
    """The three of them, of one model."""
    model = nnx.merge(graphdef, state)
    split = [nnx.split(layer) for layer in model.layers]
    layer_def = split[0][0]
    listed = [layer_state for _, layer_state in split]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *listed)

    def one(weights: Any, x: jax.Array, turn: Any, pages: jax.Array, index: Any, attend: Any) -> Any:
        return nnx.merge(layer_def, weights)(x, *turn, pages, attend, index)

    def unrolled(weights: Any, x: jax.Array, turn: Any, pages: jax.Array, attend: Any) -> Any:
        for index, layer in enumerate(weights):
            x, pages = one(layer, x, turn, pages, index, attend)
        return x, pages

    def called(weights: Any, x: jax.Array, turn: Any, pages: jax.Array, attend: Any) -> Any:
        layer = jax.jit(lambda w, x, turn, pages, index: one(w, x, turn, pages, index, attend))
        for index, own in enumerate(weights):
            x, pages = layer(own, x, turn, pages, jnp.int32(index))
        return x, pages

    def scanned(weights: Any, x: jax.Array, turn: Any, pages: jax.Array, attend: Any) -> Any:
        def body(carry: Any, given: Any) -> Any:
            return one(given[0], carry[0], turn, carry[1], given[1], attend), None

        count = jax.tree.leaves(weights)[0].shape[0]
        return jax.lax.scan(body, (x, pages), (weights, jnp.arange(count, dtype=jnp.int32)))[0]

    return [
        Way(name="unrolled", weights=listed, layers=unrolled),
        Way(name="called", weights=listed, layers=called),
        Way(name="scanned", weights=stacked, layers=scanned),
    ]


def step_of(way: Way, config: ModelConfig, graphdef: Any, geometry: Geometry) -> Any:
    """The jitted step: as `jaxserve.forward.Programs.step`, but for the layers."""

    def step(rest: Any, layers: Any, pages: Any, slots: Any, packed: Any, *, bucket: Bucket) -> Any:
        batch = unpack(packed, bucket, max_pages=MAX_PAGES, page_size=PAGE_SIZE)
        model = nnx.merge(graphdef, rest)
        turn = angles(inverse_frequencies(config), batch.positions)
        x = model.embedding[...][batch.tokens]
        hidden, pages = way.layers(layers, x, turn, pages, attend_pages(batch, geometry))
        logits = model.logits(hidden[batch.last_tokens])
        sampled, slots = sampling.sample(logits, slots, batch.slots, batch.num_outputs, batch.samples)
        return pages, slots, sampling.pack_sampled(sampled)

    return jax.jit(step, static_argnames="bucket", donate_argnums=(2, 3))


def packed_rows(bucket: Bucket, num_pages: int) -> np.ndarray:
    """A full bucket: decodes after CONTEXT tokens, or one prompt."""
    decodes = bucket.tokens == bucket.rows
    count = bucket.rows if decodes else 1
    lens = np.full(count, 1 if decodes else bucket.tokens, np.int32)
    starts = np.full(count, CONTEXT if decodes else 0, np.int32)
    width = int(-(-(starts + lens).max() // PAGE_SIZE))
    table = 1 + np.arange(count * width, dtype=np.int32).reshape(count, width) % (num_pages - 1)
    rows = Rows(
        slots=np.arange(count, dtype=np.int32),
        starts=starts,
        lens=lens,
        samples=np.ones(count, bool),
        num_outputs=np.zeros(count, np.int32),
        tokens=np.full(int(lens.sum()), 1_000, np.int32),
        page_tables=(table,),
    )
    return pack(rows, bucket, max_pages=MAX_PAGES, dummy_slot=SLOTS)


def weight_copies(text: str, weights: Any) -> tuple[int, int]:
    """Instructions that give an array of a layer's matrix shape by copying or slicing, and their bytes."""
    shapes = {tuple(leaf.shape[-ndim:]) for leaf in jax.tree.leaves(weights) for ndim in (2, 3, 4)}
    wanted = {",".join(map(str, shape)) for shape in shapes if np.prod(shape) > 100_000}
    wanted |= {f"1,{shape}" for shape in wanted}
    found = total = 0
    for kind, shape in re.findall(r"= \w+\[([\d,]+)\]\S* (copy|dynamic-slice|fusion|transpose)\(", text):
        if kind in wanted and shape != "":
            found += 1
            total += 2 * int(np.prod([int(size) for size in kind.split(",")]))
    return found, total


def measure(layers: int, dtype: str, turns: int) -> str:
    """The whole comparison as a table."""
    config = smollm2(layers)
    graphdef, state = random_model(config, seed=1, dtype=dtype)
    group = PageGroup(name="full", layers=tuple(range(layers)), kv_heads=3, head_dim=64)
    spec = KvSpec(groups=(group,), page_size=PAGE_SIZE, dtype=dtype)
    num_pages = 1_200
    geometry = Geometry(
        config=config, page_size=PAGE_SIZE, max_pages=MAX_PAGES, kv_dtype=dtype, backend="xla"
    )
    compared = ways(graphdef, state)
    titles = ["way", "bucket", "lower, s", "compile, s", "CPU s", "dots", "weight copies", "temporaries, MB",
              "step, CPU ms", "to unrolled"]  # fmt: skip
    table = [titles]
    for bucket in BUCKETS:
        runs: list[Callable[[], Any]] = []
        head: list[list[str]] = []
        for way in compared:
            pages = jax.device_put(pool.create(spec, num_pages), jax.local_devices()[0])
            slots = jax.device_put(sampling.init_slots(SLOTS, config.vocab_size), jax.local_devices()[0])
            packed = packed_rows(bucket, num_pages)
            jax.clear_caches()
            began, cpu = time.perf_counter(), time.process_time()
            step = step_of(way, config, graphdef, geometry)
            lowered = step.lower(state, way.weights, pages, slots, packed, bucket=bucket)
            low = time.perf_counter()
            compiled = lowered.compile()
            end = time.perf_counter()
            cpu = time.process_time() - cpu
            text = compiled.as_text()
            copies, size = weight_copies(text, way.weights)
            temp = compiled.memory_analysis().temp_size_in_bytes
            head.append([
                way.name, f"{bucket.tokens} x {bucket.rows}", f"{low - began:.2f}", f"{end - low:.2f}",
                f"{cpu:.1f}", str(len(re.findall(r" dot\(|__onednn|custom_call_target=.*matmul", text))),
                f"{copies} ({size / 1e6:.1f} MB)", f"{temp / 1e6:.1f}",
            ])  # fmt: skip
            held = [pages, slots]

            def run(compiled: Any = compiled, held: list[Any] = held, way: Way = way, packed: Any = packed):
                held[0], held[1], sampled = compiled(state, way.weights, held[0], held[1], packed)
                return np.asarray(sampled)

            runs.append(run)
        firsts = [run()[:, 0] for run in runs]
        same = all((first == firsts[0]).all() for first in firsts)
        taken: list[list[float]] = [[] for _ in runs]
        for turn in range(turns + 1):
            for place, run in enumerate(runs):
                cpu = time.process_time()
                run()
                if turn:
                    taken[place].append(time.process_time() - cpu)
        for row, own in zip(head, taken, strict=True):
            ratio = statistics.median(mine / first for mine, first in zip(own, taken[0], strict=True))
            table.append([*row, f"{statistics.median(own) * 1e3:.1f}", f"{ratio:.2f}"])
        if not same:
            print(f"{bucket}: the first tokens differ between the ways", file=sys.stderr)
    return grid(table)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--turns", type=int, default=20, help="steps of each that are timed")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    print(measure(args.layers, args.dtype, args.turns))


if __name__ == "__main__":
    main()
