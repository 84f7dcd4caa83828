"""Performs plans: owns weights, pages and slot state, uploads one array per step and downloads one.

Nothing is decided here. An execution that fails is an outcome with an error, never an exception in the loop.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.stages
import numpy as np
from jax.sharding import Mesh

from jaxserve.batch import Bucket, choose, decode_buckets, mixed_buckets, pack, packed_size
from jaxserve.forward import Geometry, Programs
from jaxserve.model.sharding import copied, lay_out, pool_sharding
from jaxserve.sample import Sampled, SlotState, init_slots, pack_slot, unpack_sampled
from jaxserve.weights.load import Loaded
from kv import pool
from kv.driver import Region
from kv.types import KvSpec
from scheduler.types import Outcome, Plan, SamplingParams

PROMPT_LOGPROBS_TOKENS = 64
"""Positions per call of the prompt-logprobs program: bounds its logits to 64 rows of the vocabulary."""


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pending:
    """A step under way, or one that could not be started."""

    step_id: int
    rows: int
    sampled: jax.Array | None
    spans: tuple[tuple[PromptSpan, tuple[jax.Array, ...]], ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Executed:
    """A step that is done.

    Attributes:
        sampled: one entry per row of the plan; None where the step failed.
        spans: per prompt span, its log-probabilities, one entry per target.
    """

    outcome: Outcome
    sampled: Sampled | None
    spans: tuple[tuple[PromptSpan, Sampled], ...] = ()


class Device:
    """One model on this process's devices: one of them, or a mesh over which pages are split by KV heads.

    Attributes:
        pool_moves: steps after which the page buffer had another address.
        lock: held while the page buffer is donated and put back.
    """

    def __init__(
        self,
        loaded: Loaded,
        spec: KvSpec,
        *,
        num_pages: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        backend: str,
        mesh: Mesh | None = None,
    ) -> None:
        """Args: mesh: devices of this process along one axis, "tensor"; None: the first local device.

        Raises:
            ValueError: the mesh is another, or does not divide the KV heads.
        """
        self._weights = loaded.state if mesh is None else lay_out(loaded.state, mesh)
        self._mesh, self._rest = mesh, copied(mesh)
        self._spec, self._num_pages = spec, num_pages
        self._vocab, self._num_slots = loaded.config.vocab_size, max_num_seqs
        self._max_pages = -(-max_model_len // spec.page_size)
        self._geometry = Geometry(
            config=loaded.config,
            page_size=spec.page_size,
            max_pages=self._max_pages,
            kv_dtype=spec.dtype,
            backend="pallas" if backend == "pallas" else "xla",
            mesh=mesh,
        )
        self._programs = Programs(loaded.graphdef, self._geometry)
        self.buckets = decode_buckets(max_num_seqs) + mixed_buckets(max_num_batched_tokens, max_num_seqs)
        self._pages, self._slots = self._allocate()
        self.pool_moves = 0
        self._known_address: tuple[int, ...] | None = self._address()
        self.lock = threading.Lock()
        self._compiled: dict[Bucket, jax.stages.Compiled] = {}

    def compile(
        self, progress: Callable[[Iterable[Bucket], int], Iterable[Bucket]] = lambda done, _: done
    ) -> None:
        """Compiles every bucket, so that no request waits for a compilation: lowered in order, compiled in
        threads, since XLA leaves Python's lock.

        Args:
            progress: given the buckets as they are done, and how many there are; passes them on.
        """
        with compiling_threads(min(len(self.buckets), os.cpu_count() or 1)) as pool_of_threads:
            jobs = {}
            for bucket in self.buckets:
                packed = jax.ShapeDtypeStruct(
                    (packed_size(bucket, self._max_pages),),
                    jnp.int32,
                    sharding=None if self._mesh is None else self._rest,
                )
                lowered = self._programs.step.lower(
                    self._weights, self._pages, self._slots, packed, bucket=bucket
                )
                jobs[pool_of_threads.submit(lowered.compile)] = bucket
            for bucket in progress((jobs[job] for job in as_completed(jobs)), len(jobs)):
                del bucket
            self._compiled = {bucket: job.result() for job, bucket in jobs.items()}
        neutral = SlotSetup(
            slot=self._num_slots,
            sampling=SamplingParams(temperature=0.0),
            seed=0,
            stop_token_ids=(),
            tokens=np.zeros(1, np.int32),
            num_prompt=0,
        )
        self.set_slot(neutral)
        width, dtype = self._geometry.config.hidden_size, jax.tree.leaves(self._weights)[0].dtype
        nothing = PromptSpan(slot=self._num_slots, first_token=0, start=0, targets=np.zeros(1, np.int32))
        for tokens in sorted({bucket.tokens for bucket in self.buckets}):
            hidden = jax.device_put(jnp.zeros((tokens, width), dtype), self._rest)
            jax.block_until_ready(self._span_chunks(hidden, nothing))

    def set_slot(self, setup: SlotSetup) -> None:
        """Writes a sequence's sampling parameters, and its history where penalties need one."""
        sampling = setup.sampling
        params = pack_slot(
            sampling, seed=setup.seed, stop_token_ids=setup.stop_token_ids, vocab_size=self._vocab
        )
        tokens, count = np.zeros(1, np.int32), 0
        if has_penalties(sampling):
            count = len(setup.tokens)
            tokens = np.zeros(max(16, 1 << (count - 1).bit_length()), np.int32)
            tokens[:count] = setup.tokens
        self._slots = self._programs.set_slot(
            self._slots,
            np.int32(setup.slot),
            params,
            tokens,
            np.int32(min(setup.num_prompt, count)),
            np.int32(count),
        )

    def start(self, plan: Plan, setups: Sequence[SlotSetup], spans: Sequence[PromptSpan]) -> Pending:
        """Dispatches a plan's rows; does not wait."""
        rows = plan.rows
        try:
            for setup in setups:
                self.set_slot(setup)
            bucket = choose(self.buckets, rows)
            packed = pack(rows, bucket, max_pages=self._max_pages, dummy_slot=self._num_slots)
            sampled, chunks = self._launch(bucket, packed, spans)
        except Exception as error:
            return Pending(step_id=plan.step_id, rows=len(rows), sampled=None, error=describe(error))
        return Pending(step_id=plan.step_id, rows=len(rows), sampled=sampled, spans=tuple(chunks))

    def wait(self, pending: Pending) -> Executed:
        """Blocks until a step is done. After a failure, pages and slot state are made anew."""
        try:
            if pending.sampled is None:
                raise RuntimeError(pending.error or "the step did not start")
            sampled = rows_of(unpack_sampled(np.asarray(pending.sampled)), pending.rows)
            spans = tuple((span, join(span, chunks)) for span, chunks in pending.spans)
        except Exception as error:
            self._recover()
            outcome = Outcome(step_id=pending.step_id, tokens=np.zeros(0, np.int32), error=describe(error))
            return Executed(outcome=outcome, sampled=None)
        outcome = Outcome(step_id=pending.step_id, tokens=np.asarray(sampled.tokens))
        return Executed(outcome=outcome, sampled=sampled, spans=spans)

    @property
    def pages(self) -> jax.Array:
        """The page buffer as the last dispatched step leaves it; donated to the next."""
        return self._pages

    def put_pages(self, pages: jax.Array) -> None:
        """Another program has updated the page buffer between steps. For the loop's thread."""
        self._pages = pages

    def regions(self) -> tuple[Region, ...]:
        """Where the page buffer lies, per shard."""
        return pool.regions(self._pages, self._spec.page_bytes)

    def pool_changed(self) -> bool:
        """Whether any shard of the buffer lies elsewhere, or was made anew, since the last call."""
        address = self._address()
        changed, self._known_address = address != self._known_address, address
        return changed

    def _launch(
        self, bucket: Bucket, packed: np.ndarray, spans: Sequence[PromptSpan]
    ) -> tuple[jax.Array, list[tuple[PromptSpan, tuple[jax.Array, ...]]]]:
        programs = self._programs
        uploaded = jnp.asarray(packed) if self._mesh is None else jax.device_put(packed, self._rest)
        compiled = self._compiled.get(bucket)
        with self.lock:
            pages, address = self._pages, self._address()
            self._pages, self._slots, sampled, hidden = (
                programs.step(self._weights, pages, self._slots, uploaded, bucket=bucket)
                if compiled is None
                else compiled(self._weights, pages, self._slots, uploaded)
            )
        chunks = [(span, tuple(self._span_chunks(hidden, span))) for span in spans]
        if self._address() != address:
            self.pool_moves += 1
        return sampled, chunks

    def _span_chunks(self, hidden: jax.Array, span: PromptSpan) -> list[jax.Array]:
        chunks = []
        for place in range(0, len(span.targets), PROMPT_LOGPROBS_TOKENS):
            targets = np.zeros(PROMPT_LOGPROBS_TOKENS, np.int32)
            part = span.targets[place : place + PROMPT_LOGPROBS_TOKENS]
            targets[: len(part)] = part
            start = np.int32(span.first_token + place)
            rows = self._programs.span(hidden, start, count=PROMPT_LOGPROBS_TOKENS)
            chunks.append(self._programs.prompt_logprobs(self._weights, rows, targets))
        return chunks

    def _recover(self) -> None:
        """A failed program may have consumed what was donated to it: all of it is lost."""
        self._pages, self._slots = self._allocate()
        self._known_address = None  # the new buffer may lie where the old one was: it is new all the same

    def _allocate(self) -> tuple[jax.Array, SlotState]:
        """Pages and slot state, bound to the device: unbound arrays would compile each program twice."""
        slots = jax.device_put(init_slots(self._num_slots, self._vocab), self._rest)
        if self._mesh is None:
            return jax.device_put(pool.create(self._spec, self._num_pages), self._rest), slots
        sharding = pool_sharding(self._mesh, self._geometry.config.num_kv_heads)
        return pool.create(self._spec, self._num_pages, sharding), slots

    def _address(self) -> tuple[int, ...]:
        """Of every shard of the page buffer."""
        return (pool.pointer(self._pages),) if self._mesh is None else pool.pointers(self._pages)


@contextlib.contextmanager
def compiling_threads(count: int) -> Generator[ThreadPoolExecutor, None, None]:
    """Threads with room for XLA's recursion, which overflows the usual stack on large programs."""
    before = threading.stack_size(64 << 20)
    try:
        with ThreadPoolExecutor(count, thread_name_prefix="jaxserve-compile") as threads:
            yield threads
    finally:
        threading.stack_size(before)


def has_penalties(sampling: SamplingParams) -> bool:
    """The sequence's history matters to its logits."""
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )


def rows_of(sampled: Sampled, rows: int) -> Sampled:
    """The real rows of a padded batch."""
    return Sampled(*(column[:rows] for column in sampled))


def join(span: PromptSpan, chunks: Sequence[jax.Array]) -> Sampled:
    """A span's downloaded chunks as one, without the padding of the last."""
    packed = np.concatenate([np.asarray(chunk) for chunk in chunks])
    return rows_of(unpack_sampled(packed), len(span.targets))


def describe(error: Exception) -> str:
    """An exception as one line for the log and the client: its kind, not its text."""
    return f"the device step failed ({type(error).__name__})"


def enable_compilation_cache(folder: Path) -> None:
    """Keeps compiled programs between starts. The folder is the user's alone: programs in it are trusted."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
