"""Performs plans: owns weights, pages and slot state, uploads one array per step and downloads one.

Nothing is decided here. An execution that fails is an outcome with an error, never an exception in the loop.
"""

import logging
import threading
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jax.stages
import numpy as np
from jax.sharding import Mesh

from jaxserve.batch import Bucket, choose, pack
from jaxserve.compiling import Built, Progress, abstract, build, build_all, draw_up
from jaxserve.config import ConfigError
from jaxserve.dispatch import Dispatch, Executed, Pending, PromptSpan, SlotSetup
from jaxserve.model.sharding import copied, lay_out, pool_sharding
from jaxserve.sample import Sampled, SlotState, init_slots, pack_slot, unpack_sampled
from jaxserve.shapes import (
    LOGPROBS_SHAPE,
    PROMPT_LOGPROBS_TOKENS,
    Shape,
    buckets_of,
    compile_plan,
    rows_shape,
    slot_shape,
    step_shape,
)
from jaxserve.weights.load import Loaded
from kv import pool
from kv.driver import Region
from kv.types import KvSpec
from scheduler.types import Outcome, Plan, Rows, SamplingParams

logger = logging.getLogger("jaxserve")


class PoolMovedError(ConfigError):
    """A step's program copies the page buffer, into which configured peers or host tiers write."""


NO_ROWS = Rows(
    slots=np.zeros(0, np.int32),
    starts=np.zeros(0, np.int32),
    lens=np.zeros(0, np.int32),
    samples=np.zeros(0, bool),
    num_outputs=np.zeros(0, np.int32),
    tokens=np.zeros(0, np.int32),
    page_tables=(np.zeros((0, 0), np.int32),),
)


class Device:
    """One model on this process's devices: one of them, or a mesh over which pages are split by KV heads.

    Attributes:
        buckets: shapes of steps.
        plan: every shape that its programs are called with.
        blueprint: what they are compiled from.
        pool_moves: steps after which the page buffer had another address.
        compile_misses: calls of a program that was not compiled ahead, and had to be then.
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
        deterministic: bool = False,
        mesh: Mesh | None = None,
        pool_must_stay: bool = False,
    ) -> None:
        """Args:
            deterministic: every step has one shape, in which a token's bits do not depend on its company.
            mesh: devices of this process along one axis, "tensor"; None: the first local device.
            pool_must_stay: somebody else may write into the page buffer, so that no step may copy it.

        Raises:
            ValueError: the mesh is another, or does not divide the KV heads.
        """
        self._weights = loaded.state if mesh is None else lay_out(loaded.state, mesh)
        self._mesh, self._rest = mesh, copied(mesh)
        self._spec, self._num_pages = spec, num_pages
        self._vocab, self._num_slots = loaded.config.vocab_size, max_num_seqs
        self._kv_heads, self._max_model_len = loaded.config.num_kv_heads, max_model_len
        self.buckets = buckets_of(max_num_seqs, max_num_batched_tokens, deterministic=deterministic)
        self.plan = compile_plan(self.buckets, max_model_len)
        self.blueprint = draw_up(
            loaded.graphdef,
            abstract(self._weights),
            loaded.config,
            spec,
            num_pages=num_pages,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            backend=backend,
            deterministic=deterministic,
            mesh=mesh,
        )
        self._max_pages = self.blueprint.max_pages
        self._pages, self._slots = self._allocate()
        self._built: dict[Shape, Built] = {}
        self._pool_must_stay = pool_must_stay
        self.pool_moves = 0
        self.compile_misses = 0
        self._known_address: tuple[int, ...] | None = self._address()
        self.lock = threading.Lock()

    def compile(self, progress: Progress = lambda done, _: done) -> tuple[Built, ...]:
        """Compiles the whole plan, so that no request waits for a compilation, and runs each step once on
        padding alone, to see that the page buffer stays where it is.

        Args:
            progress: given the shapes as they are done, and how many there are; passes them on.

        Returns:
            What each shape cost.

        Raises:
            PoolMovedError: a step copies the page buffer and `pool_must_stay`.
        """
        self._built = build_all(self.blueprint, self.plan, progress)
        copying = [built.shape for built in self._built.values() if not built.in_place]
        copying += [step_shape(bucket) for bucket in self.buckets if self._try_out(bucket)]
        for shape in dict.fromkeys(copying):
            said = f"the step of {shape.tokens} tokens in {shape.rows} rows copies the whole page buffer"
            if self._pool_must_stay:
                raise PoolMovedError(
                    f"--kv-transfer-config: {said}; what a peer writes meanwhile would be lost"
                )
            logger.warning("%s", said)
        return tuple(self._built.values())

    def _try_out(self, bucket: Bucket) -> bool:
        """Runs a step of no rows; whether the page buffer lies elsewhere after it."""
        packed = pack(NO_ROWS, bucket, max_pages=self._max_pages, dummy_slot=self._num_slots)
        moves = self.pool_moves
        sampled, _ = self._launch(bucket, packed, ())
        sampled.block_until_ready()
        return self.pool_moves != moves

    def _program(self, shape: Shape) -> jax.stages.Compiled:
        """The program of a shape; one that was not compiled ahead is a miss, and compiled now."""
        built = self._built.get(shape)
        if built is None:
            self.compile_misses += 1
            built = self._built[shape] = build(self.blueprint, shape)
        return built.compiled

    def set_slot(self, setup: SlotSetup) -> None:
        """Writes a sequence's sampling parameters, and its history where penalties need one."""
        sampling = setup.sampling
        params = pack_slot(
            sampling, seed=setup.seed, stop_token_ids=setup.stop_token_ids, vocab_size=self._vocab
        )
        tokens, count = np.zeros(1, np.int32), 0
        shape = slot_shape(1, self._max_model_len)
        if has_penalties(sampling):
            count = len(setup.tokens)
            shape = slot_shape(count, self._max_model_len)
            tokens = np.zeros(shape.tokens, np.int32)
            tokens[:count] = setup.tokens
        self._slots = self._program(shape)(
            self._slots,
            np.int32(setup.slot),
            params,
            tokens,
            np.int32(min(setup.num_prompt, count)),
            np.int32(count),
        )

    def start(self, plan: Plan, setups: Sequence[SlotSetup], spans: Sequence[PromptSpan]) -> Pending:
        """Dispatches a plan's rows; does not wait."""
        rows, misses = plan.rows, self.compile_misses
        sampled, chunks, error, tokens = None, (), None, 0
        try:
            for setup in setups:
                self.set_slot(setup)
            bucket = choose(self.buckets, rows)
            packed = pack(rows, bucket, max_pages=self._max_pages, dummy_slot=self._num_slots)
            sampled, chunks = self._launch(bucket, packed, spans)
            tokens = bucket.tokens
        except Exception as failure:
            logger.exception("a step could not be started")
            error = describe(failure)
        dispatch = Dispatch(
            tokens=tokens,
            padding_tokens=tokens and tokens - len(rows.tokens),
            compile_misses=self.compile_misses - misses,
        )
        return Pending(
            step_id=plan.step_id,
            rows=len(rows),
            sampled=sampled,
            spans=tuple(chunks),
            dispatch=dispatch,
            error=error,
        )

    def wait(self, pending: Pending) -> Executed:
        """Blocks until a step is done. After a failure, pages and slot state are made anew."""
        try:
            if pending.sampled is None:
                raise RuntimeError(pending.error or "the step did not start")
            sampled = rows_of(unpack_sampled(np.asarray(pending.sampled)), pending.rows)
            spans = tuple((span, join(span, chunks)) for span, chunks in pending.spans)
        except Exception as error:
            if pending.sampled is not None:  # else it was told of when it did not start
                logger.exception("a step has failed")
            self._recover()
            outcome = Outcome(step_id=pending.step_id, tokens=np.zeros(0, np.int32), error=describe(error))
            return Executed(outcome=outcome, sampled=None, dispatch=pending.dispatch)
        outcome = Outcome(step_id=pending.step_id, tokens=np.asarray(sampled.tokens))
        return Executed(outcome=outcome, sampled=sampled, spans=spans, dispatch=pending.dispatch)

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
        uploaded = jnp.asarray(packed) if self._mesh is None else jax.device_put(packed, self._rest)
        step = self._program(step_shape(bucket))
        with self.lock:
            pages, address = self._pages, self._address()
            self._pages, self._slots, sampled, hidden = step(self._weights, pages, self._slots, uploaded)
        chunks = [(span, tuple(self._span_chunks(hidden, span))) for span in spans]
        if self._address() != address:
            self.pool_moves += 1
        return sampled, chunks

    def _span_chunks(self, hidden: jax.Array, span: PromptSpan) -> list[jax.Array]:
        chunks = []
        take, score = self._program(rows_shape(len(hidden))), self._program(LOGPROBS_SHAPE)
        for place in range(0, len(span.targets), PROMPT_LOGPROBS_TOKENS):
            targets = np.zeros(PROMPT_LOGPROBS_TOKENS, np.int32)
            part = span.targets[place : place + PROMPT_LOGPROBS_TOKENS]
            targets[: len(part)] = part
            start = np.int32(span.first_token + place)
            chunks.append(score(self._weights, take(hidden, start), targets))
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
        sharding = pool_sharding(self._mesh, self._kv_heads)
        return pool.create(self._spec, self._num_pages, sharding), slots

    def _address(self) -> tuple[int, ...]:
        """Of every shard of the page buffer."""
        return (pool.pointer(self._pages),) if self._mesh is None else pool.pointers(self._pages)


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
