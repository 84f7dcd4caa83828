"""Compiles the shapes of a plan ahead of time, and measures what each one costs.

Shapes are lowered in order, since Python's lock lets only one be traced at a time, and compiled in threads,
since XLA leaves that lock. Compiling needs shapes and places alone: no weights and no pages.
"""

import contextlib
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.stages
import numpy as np
from jax.sharding import Mesh, Sharding

from jaxserve.batch import packed_size
from jaxserve.forward import Geometry, Programs
from jaxserve.model.config import ModelConfig
from jaxserve.model.sharding import copied, pool_sharding
from jaxserve.model.transformer import ModelGraph, ModelState
from jaxserve.sample import SlotState, init_slots, pack_slot
from jaxserve.shapes import PROMPT_LOGPROBS_TOKENS, Shape
from kv import pool
from kv.types import ITEM_BYTES, KvSpec
from scheduler.types import SamplingParams

CACHE_HIT = "/jax/compilation_cache/cache_hits"

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
"""Given things as they are done and how many there are; passes them on."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blueprint:
    """What the programs are compiled from: shapes, dtypes and places of their arguments.

    Attributes:
        programs: of the model.
        weights: `jax.ShapeDtypeStruct` leaves.
        pages: of the page buffer.
        slots: of every slot's state, leaves as of `weights`.
        vocab_size: of the model.
        hidden_size: width of the hidden states, which have the weights' dtype.
        max_pages: columns of the page table.
        sharding: of what every device of a mesh has whole.
        over_mesh: there is a mesh: what is uploaded is bound to it.
    """

    programs: Programs
    weights: ModelState
    pages: jax.ShapeDtypeStruct
    slots: SlotState
    vocab_size: int
    hidden_size: int
    max_pages: int
    sharding: Sharding
    over_mesh: bool

    @property
    def pool_bytes(self) -> int:
        """Of the page buffer on one device."""
        return device_bytes(self.pages)

    @property
    def donated_bytes(self) -> int:
        """Of what a step updates in place on one device: pages and slot state."""
        return self.pool_bytes + device_bytes(self.slots)

    @property
    def weight_bytes(self) -> int:
        """Of the weights on one device."""
        return device_bytes(self.weights)

    def lower(self, shape: Shape) -> jax.stages.Lowered:
        """Traces one program."""
        programs = self.programs
        bucket = shape.bucket
        if bucket is not None:
            packed = self._uploaded((packed_size(bucket, self.max_pages),), jnp.int32)
            return programs.step.lower(self.weights, self.pages, self.slots, packed, bucket=bucket)
        zero = np.int32(0)
        match shape.kind:
            case "slot":
                neutral = pack_slot(
                    SamplingParams(temperature=0.0), seed=0, stop_token_ids=(), vocab_size=self.vocab_size
                )
                history = np.zeros(shape.tokens, np.int32)
                return programs.set_slot.lower(self.slots, zero, neutral, history, zero, zero)
            case "rows":
                return programs.span.lower(self._hidden(shape.tokens), zero, count=shape.rows)
            case _:
                targets = np.zeros(PROMPT_LOGPROBS_TOKENS, np.int32)
                return programs.prompt_logprobs.lower(self.weights, self._hidden(shape.rows), targets)

    def _hidden(self, tokens: int) -> jax.ShapeDtypeStruct:
        dtype = jax.tree.leaves(self.weights)[0].dtype
        return jax.ShapeDtypeStruct((tokens, self.hidden_size), dtype, sharding=self.sharding)

    def _uploaded(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding if self.over_mesh else None)


def draw_up(
    graphdef: ModelGraph,
    weights: ModelState,
    config: ModelConfig,
    spec: KvSpec,
    *,
    num_pages: int,
    max_num_seqs: int,
    max_model_len: int,
    backend: str,
    deterministic: bool = False,
    mesh: Mesh | None = None,
) -> Blueprint:
    """The blueprint of one engine's programs.

    Args:
        graphdef: the model's structure.
        weights: abstract, with shardings.
        config: the model's numbers.
        spec: of a page.
        num_pages: of the page buffer.
        backend: of paged attention.
        deterministic: attention computes a token alike whatever comes with it.
        mesh: over which pages are split by KV heads; None: the first local device.

    Raises:
        ValueError: the mesh does not fit the model.
    """
    rest = copied(mesh)
    max_pages = -(-max_model_len // spec.page_size)
    geometry = Geometry(
        config=config,
        page_size=spec.page_size,
        max_pages=max_pages,
        kv_dtype=spec.dtype,
        backend="pallas" if backend == "pallas" else "xla",
        deterministic=deterministic,
        mesh=mesh,
    )
    slots = jax.eval_shape(functools.partial(init_slots, max_num_seqs, config.vocab_size))
    return Blueprint(
        programs=Programs(graphdef, geometry),
        weights=weights,
        pages=jax.ShapeDtypeStruct(
            (num_pages, *spec.page_shape),
            pool.BITS[ITEM_BYTES[spec.dtype]],
            sharding=rest if mesh is None else pool_sharding(mesh, config.num_kv_heads),
        ),
        slots=jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rest), slots),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        max_pages=max_pages,
        sharding=rest,
        over_mesh=mesh is not None,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Built:
    """A program of the plan, compiled. Bytes are XLA's own account, of one device.

    Attributes:
        compiled: the program.
        lower_s: seconds to trace and lower it.
        compile_s: seconds to compile it, or to read it from the persistent cache.
        cached: it came from the persistent cache.
        argument_bytes: weights, pages and slots among them.
        output_bytes: those that are updated in place among them.
        alias_bytes: outputs that lie where an argument lay.
        temp_bytes: needed while it runs.
        in_place: nothing else than the arguments holds pages: see `stays_in_place`.
    """

    shape: Shape
    compiled: jax.stages.Compiled
    lower_s: float
    compile_s: float
    cached: bool
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    in_place: bool


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and places of arrays, in place of the arrays."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def device_bytes(tree: Any) -> int:
    """Bytes of abstract arrays on one device."""
    return sum(math.prod(_shard_shape(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def build(blueprint: Blueprint, shape: Shape) -> Built:
    """Lowers and compiles one shape, now and in this thread."""
    began = time.perf_counter()
    lowered = blueprint.lower(shape)
    return _compile(blueprint, shape, lowered, time.perf_counter() - began)


def build_all(
    blueprint: Blueprint, shapes: Sequence[Shape], progress: Progress = lambda done, _: done
) -> dict[Shape, Built]:
    """Every shape of a plan, in its order."""
    jobs: dict[Future[Built], Shape] = {}
    with compiling_threads(min(len(shapes), os.cpu_count() or 1)) as threads:

        def lower_and_wait() -> Iterable[Shape]:
            told: set[Future[Built]] = set()
            for shape in shapes:
                began = time.perf_counter()
                lowered = blueprint.lower(shape)
                seconds = time.perf_counter() - began
                jobs[threads.submit(_compile, blueprint, shape, lowered, seconds)] = shape
                ready = {job for job in jobs if job not in told and job.done()}
                told |= ready
                yield from (jobs[job] for job in ready)
            yield from (jobs[job] for job in as_completed(set(jobs) - told))

        for shape in progress(lower_and_wait(), len(shapes)):
            del shape
    return {shape: job.result() for job, shape in jobs.items()}


def stays_in_place(blueprint: Blueprint, compiled: jax.stages.Compiled) -> bool:
    """Whether a step's program updates pages and slots where they lie and makes nothing pool-shaped beside
    them: a copy that is written back erases what a peer wrote meanwhile, at the same address."""
    memory = _memory(compiled)
    if memory.alias_size_in_bytes != blueprint.donated_bytes:
        return False
    if memory.temp_size_in_bytes < blueprint.pool_bytes:
        return True
    # A small pool: temporaries may be larger for other reasons, so the program itself is looked at.
    wanted = f"[{','.join(map(str, _shard_shape(blueprint.pages)))}]"
    return not any(wanted in line and " copy(" in line for line in (compiled.as_text() or "").splitlines())


def _shard_shape(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    return leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)


def _compile(blueprint: Blueprint, shape: Shape, lowered: jax.stages.Lowered, lower_s: float) -> Built:
    _listen()
    began, before = time.perf_counter(), _hits_so_far()
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    memory = _memory(compiled)
    return Built(
        shape=shape,
        compiled=compiled,
        lower_s=lower_s,
        compile_s=seconds,
        cached=_hits_so_far() > before,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        in_place=shape.bucket is None or stays_in_place(blueprint, compiled),
    )


def _memory(compiled: jax.stages.Compiled) -> Any:
    memory = compiled.memory_analysis()
    if memory is None:
        raise RuntimeError("this platform's compiler gives no account of memory")
    return memory


_hits = threading.local()
"""Attribute: count: of the persistent cache's hits that JAX has told of in this thread."""


@functools.cache
def _listen() -> None:
    """Counts hits from now on, once per process: JAX's listeners must not get fewer while others compile."""

    def heard(event: str, **_: str | int) -> None:
        if event == CACHE_HIT:
            _hits.count = _hits_so_far() + 1

    jax.monitoring.register_event_listener(heard)


def _hits_so_far() -> int:
    return getattr(_hits, "count", 0)


@contextlib.contextmanager
def compiling_threads(count: int) -> Generator[ThreadPoolExecutor, None, None]:
    """Threads with room for XLA's recursion, which overflows the usual stack on large programs."""
    before = threading.stack_size(64 << 20)
    try:
        with ThreadPoolExecutor(count, thread_name_prefix="jaxserve-compile") as threads:
            yield threads
    finally:
        threading.stack_size(before)


def enable_compilation_cache(folder: Path) -> None:
    """Keeps compiled programs between starts. The folder is the user's alone: programs in it are trusted."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
