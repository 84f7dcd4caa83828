"""The engine: a model that continues prompts, for the server and for notebooks.

from jaxserve import Engine, SamplingParams

engine = Engine("smollm2")
print(engine.generate("The capital of France is", SamplingParams(max_tokens=16))[0].outputs[0].text)
"""

import asyncio
import itertools
import logging
import os
import queue
import random
import secrets
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType
from typing import Any

from tqdm import tqdm

from jaxserve.assemble import Parts, assemble
from jaxserve.census import PageCensus
from jaxserve.collect import Collected, Prompt, as_list, pairs
from jaxserve.config import ConfigError, EngineConfig
from jaxserve.connect import open_door
from jaxserve.drain import AbortAll, Await, Close, Drain
from jaxserve.loop import EngineLoop
from jaxserve.outputs import (
    Delta,
    RequestOutput,
    RequestRefused,
    Transfer,
)
from jaxserve.record import RecordFile
from jaxserve.rerun import facts_of
from jaxserve.sample import MAX_LOGPROBS, pack_slot
from jaxserve.shapes import Shape
from jaxserve.text import ChatTemplate, TemplatePool, Tokenizer
from jaxserve.warn_once import warn_of_roles
from jaxserve.weights.smollm2 import default_cache_dir
from kv.config import NIXL, OFFLOADING, PRODUCER, SIMPLE_CPU
from metrics.exposition import EngineSeries, Exposition, Family, Sample
from metrics.move_series import MoveSeries, OffloadTier, SimpleTier, move_families
from metrics.moves import MoveStats
from metrics.prometheus import DEFAULT_PREFIX, make_registry, render
from metrics.records import Gauges
from scheduler.types import Request, SamplingParams

logger = logging.getLogger("jaxserve")

CENSUS_S = 2.0
"""How long a census waits for the engine: one that is stuck must show its pages too."""


class Engine:
    """A model behind its loop. Usable from any thread; close it, or use it as a context."""

    def __init__(
        self,
        model: str | EngineConfig = "smollm2",
        *,
        metrics_prefix: str = DEFAULT_PREFIX,
        progress: bool | None = None,
        **options: Any,
    ) -> None:
        """Loads a model and starts serving it in this process.

        Args:
            model: what `EngineConfig.model` takes, or a whole configuration.
            metrics_prefix: before every metric's name.
            progress: show progress in the terminal; None: where there is one.
            options: fields of EngineConfig.

        Raises:
            ConfigError: an option makes no sense.
            WeightsError: the model cannot be had or read.
        """
        config = model if isinstance(model, EngineConfig) else EngineConfig(model=model, **options)
        self._progress = _somebody_looks() if progress is None else progress
        if config.record is not None:
            try:
                config.record.open("wb").close()
            except OSError as error:
                raise ConfigError(f"--record {config.record}: {error.strerror}") from error
        cache_dir = config.cache_dir or default_cache_dir(os.environ)
        self._parts: Parts = assemble(config, cache_dir, self._report)
        self.config = config
        scheduler = self._parts.scheduler
        logger.info(
            "loaded %s: %s, %d KV pages of %d tokens, sequences of up to %d tokens",
            *(config.names[0], self._parts.dtype, scheduler.num_pages, scheduler.page_size),
            scheduler.max_model_len,
        )
        if config.kv_transfer is not None:
            warn_of_roles(config.kv_transfer)
        self._door, movers = open_door(config, scheduler, self._parts.spec, self._parts.device, cache_dir)
        if not config.enforce_eager:
            self._compile()
        self._pool = TemplatePool()
        self._chat = self._chat_template()
        self._record = (
            None
            if config.record is None
            else RecordFile(
                config.record,
                self._parts.scheduler,
                self._parts.limits,
                facts_of(config, self._parts.dtype),
            )
        )
        self._seeds = random.Random(config.seed)
        self._numbers = itertools.count()
        self._life = secrets.token_hex(4)
        self._loop = EngineLoop(
            self._parts.scheduler,
            self._parts.limits,
            self._parts.device,
            self._parts.tokenizer,
            max_num_queued_reqs=config.max_num_queued_reqs,
            movers=movers,
            recorder=None if self._record is None else self._record.write,
            log_stats=config.log_stats,
        )
        self._registry = make_registry(self._exposition, prefix=metrics_prefix)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What the engine is.

    @property
    def served_model_names(self) -> tuple[str, ...]:
        """Names that clients may use; the first is the main one."""
        return self.config.names

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._parts.tokenizer

    @property
    def chat(self) -> ChatTemplate | None:
        """The model's chat template; None: it has none."""
        return self._chat

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._parts.loaded.config.vocab_size

    @property
    def max_model_len(self) -> int:
        """Bound on prompt + output tokens."""
        return self._parts.scheduler.max_model_len

    @property
    def default_sampling(self) -> Mapping[str, float | int]:
        """Sampling values of generation_config.json, by vLLM's names."""
        return self._parts.default_sampling

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The model's own end tokens."""
        return self._parts.tokenizer.eos_token_ids

    # How it is.

    @property
    def alive(self) -> bool:
        """Whether the engine's loop runs."""
        return self._loop.alive

    def stalled(self, seconds: float) -> bool:
        """Whether work waits and no step has completed for that long."""
        return self._loop.stalled(seconds)

    def metrics_text(self, accept: str = "") -> tuple[bytes, str]:
        """A scrape of the metrics and its content type."""
        return render(self._registry, accept)

    @property
    def stats(self):
        """Everything counted so far, a frozen `metrics.engine.EngineStats`."""
        return self._loop.stats

    async def page_census(self) -> PageCensus:
        """Every page by what it is for, after a step that is decided now. Of an engine that does not answer
        in CENSUS_S, after its last step."""
        loop, looked = self._loop, Future[tuple[Gauges, MoveStats]]()
        if loop.alive:
            loop.inbox.look(lambda: looked.set_result((loop.stats.gauges, loop.move_stats)))
            await asyncio.wait({asyncio.wrap_future(looked)}, timeout=CENSUS_S)
        current = looked.done()
        gauges, moves = looked.result() if current else (loop.stats.gauges, loop.move_stats)
        return PageCensus(
            current=current,
            total=self._parts.scheduler.num_pages - 1,
            live_requests=loop.inbox.num_live,
            gauges=gauges,
            moves=moves,
        )

    # Requests.

    def new_request_id(self, prefix: str) -> str:
        """An id that was never used before, in this engine's life or another's."""
        return f"{prefix}-{self._life}-{next(self._numbers)}"

    def open_transfer(
        self, params: Mapping[str, Any], prompt_token_ids: tuple[int, ...], cache_salt: str
    ) -> Transfer:
        """What a request's `kv_transfer_params` ask for, checked against our role and our peers' key.

        Raises:
            RequestRefused: this engine cannot give it, or the parameters are no peer's.
        """
        return self._door.open(params, prompt_token_ids, cache_salt)

    def check_room(self) -> None:
        """Refuses, before any work is done on it, a request that `submit` would refuse for want of room.

        Raises:
            QueueFull: too many requests wait.
        """
        self._loop.inbox.check_room()

    def submit(self, request: Request, sink: Callable[[Delta], None]) -> None:
        """Takes a request in; its deltas go to `sink` on the engine's thread.

        Raises:
            RequestRefused: it can never run.
            QueueFull, EngineError: it cannot run now.
        """
        if max(request.sampling.logprobs or 0, request.sampling.prompt_logprobs or 0) > MAX_LOGPROBS:
            raise RequestRefused(f"at most {MAX_LOGPROBS} logprobs", param="logprobs")
        try:  # what the device would refuse must not get as far as a step that others share
            stops = (*request.sampling.stop_token_ids, *request.eos_token_ids)
            pack_slot(request.sampling, seed=0, stop_token_ids=stops, vocab_size=self.vocab_size)
        except ValueError as error:
            raise RequestRefused(str(error), param="sampling") from error
        if request.sampling.seed is None:
            seed = self.config.seed if self.config.deterministic else self._seeds.getrandbits(63)
            request = replace(request, sampling=replace(request.sampling, seed=seed))
        self._loop.submit(request, sink)

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is."""
        self._loop.inbox.abort(request_id)

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Deltas of all sequences of a request, interleaved, until each has finished.

        Closing or cancelling the generator aborts the request.

        Raises:
            RequestRefused, QueueFull, EngineError: at the first item.
        """
        running = asyncio.get_running_loop()
        deltas: asyncio.Queue[Delta] = asyncio.Queue()

        def sink(delta: Delta) -> None:
            running.call_soon_threadsafe(deltas.put_nowait, delta)

        self.submit(request, sink)
        left = request.sampling.n
        try:
            while left:
                delta = await deltas.get()
                left -= delta.finish_reason is not None
                yield delta
        finally:
            if left:
                self.abort(request.request_id)

    async def reset_prefix_cache(self, *, external: bool = False) -> bool:
        """Forgets every cached prefix, with `external` host tiers' too; sequences keep their pages."""
        running = asyncio.get_running_loop()
        done = asyncio.Event()

        def tell() -> None:
            running.call_soon_threadsafe(done.set)

        self._loop.inbox.reset_prefix_cache(tell, external=external)
        await done.wait()
        return True

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Continues prompts and waits for all of them.

        Args:
            prompts: one text, one list of token ids, or a list of such.
            sampling: one for all prompts, or one each; None: the defaults.
            progress: a progress bar; None: for more than one prompt, where there is a terminal or notebook.

        Returns:
            One output per prompt, in order.

        Raises:
            RequestRefused: a prompt can never run.
            EngineError: the engine has stopped, or a request failed.
        """
        many = as_list(prompts)
        requests = [
            self.request(prompt, params) for prompt, params in pairs(many, sampling, self._default_params())
        ]
        collected = {request.request_id: Collected(request) for request in requests}
        arrived: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        show = len(requests) > 1 and (self._progress if progress is None else progress)
        waiting, room = iter(requests), self.config.max_num_queued_reqs
        live = 0
        try:
            with tqdm(total=len(requests), disable=not show, unit="prompt") as bar:
                for request in itertools.islice(waiting, room):
                    self.submit(request, arrived.put)
                    live += 1
                while live:
                    delta = arrived.get()
                    if not collected[delta.request_id].add(delta):
                        continue
                    live -= 1
                    bar.update()
                    following = next(waiting, None)
                    if following is not None:
                        self.submit(following, arrived.put)
                        live += 1
        except BaseException:
            for request in requests:
                self.abort(request.request_id)
            raise
        return [
            entry.output(prompt if isinstance(prompt, str) else None)
            for entry, prompt in zip(collected.values(), many, strict=True)
        ]

    async def generate_stream(
        self, prompt: Prompt, sampling: SamplingParams | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Continues one prompt, delta by delta."""
        async for delta in self.stream(self.request(prompt, sampling or self._default_params())):
            yield delta

    def request(self, prompt: Prompt, sampling: SamplingParams) -> Request:
        """A prompt as a request.

        Raises:
            RequestRefused: a token id that the model does not have.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        if any(not 0 <= token < self.vocab_size for token in ids):
            raise RequestRefused(f"token ids must be from 0 to {self.vocab_size - 1}", param="prompt")
        return Request(
            request_id=self.new_request_id("gen"),
            prompt_token_ids=tuple(ids),
            sampling=sampling,
            eos_token_ids=self.eos_token_ids,
        )

    async def drain(self, timeout_s: float) -> None:
        """Lets running requests finish within the time, then aborts the rest. No new ones are taken. Pages
        that are leased stay until a peer has read them, the lease has ended, or the time is over."""
        loop, inbox, drain = self._loop, self._loop.inbox, Drain(until=time.monotonic() + timeout_s)
        inbox.shut()
        while True:
            live = inbox.num_live
            match drain.look(time.monotonic(), live=live, leases=loop.num_leases):
                case Await(seconds=seconds, requests=True):
                    await asyncio.to_thread(inbox.wait_until_idle, seconds)
                case Await(seconds=seconds):
                    await asyncio.sleep(seconds)
                case AbortAll():
                    logger.warning("aborting %d requests that did not finish in %g s", live, timeout_s)
                    inbox.abort_all()
                case Close():
                    return

    def close(self) -> None:
        """Aborts what lives, and ends the loop and its helpers' processes."""
        self._loop.close()
        self._pool.close()
        if self._record is not None:
            self._record.close()

    def _default_params(self) -> SamplingParams:
        return SamplingParams(**{"max_tokens": 16, **self.default_sampling})  # type: ignore[arg-type]

    def _report(self, line: str) -> None:
        logger.info("%s", line)

    def _compile(self) -> None:
        """Compiles ahead, with a progress bar where somebody looks and a line per shape in a log."""
        logger.info("compiling %d shapes", len(self._parts.device.plan))

        def show(done: Iterable[Shape], total: int) -> Iterable[Shape]:
            bar = tqdm(done, total=total, desc="compiling", unit="shape", disable=not self._progress)
            for count, shape in enumerate(bar, 1):
                if not self._progress:
                    logger.info("compiled %d of %d shapes", count, total)
                yield shape

        self._parts.device.compile(show)

    def _chat_template(self) -> ChatTemplate | None:
        source = self._parts.chat_template
        if source is None:
            return None
        return ChatTemplate(source, special_tokens=self.tokenizer.special_tokens, pool=self._pool)

    def _exposition(self) -> Exposition:
        scheduler = self._parts.scheduler
        held = (scheduler.num_pages - 1) * scheduler.page_size
        cache = {
            "block_size": scheduler.page_size,
            "num_gpu_blocks": scheduler.num_pages - 1,
            "kv_cache_size_tokens": held,
            "kv_cache_max_concurrency": f"{held / scheduler.max_model_len:.2f}",
            "cache_dtype": self._parts.dtype,
            "enable_prefix_caching": scheduler.enable_prefix_caching,
            "kv_cache_memory_bytes": self.config.kv_cache_memory_bytes,
            "num_gpu_blocks_override": self.config.num_pages,
            "sliding_window": scheduler.windows[0],
        }
        moves = Family(
            name="kv_pool_moves",
            kind="counter",
            help="Steps after which the page buffer had another address; 0 unless donation failed.",
            samples=(Sample(value=self._parts.device.pool_moves),),
        )
        extra = (moves, *move_families(self._moves()))
        series = EngineSeries(stats=self._loop.stats, cache_config=cache, extra=extra)
        return Exposition(model_name=self.config.names[0], engines=(series,))

    def _moves(self) -> MoveSeries:
        transfer, spec = self._parts.scheduler.transfer, self._parts.spec
        leaves = () if transfer is None else transfer.leaves
        return MoveSeries(
            stats=self._loop.move_stats,
            fetches=any(leaf.kind == NIXL and leaf.role != PRODUCER for leaf in leaves),
            offload_tiers=tuple(
                OffloadTier(
                    num_chunks=leaf.host_slots // leaf.pages_per_chunk,
                    pages_per_chunk=leaf.pages_per_chunk,
                    num_bytes=leaf.host_slots * spec.page_bytes,
                    num_tokens=leaf.host_slots * spec.page_size,
                )
                for leaf in leaves
                if leaf.kind == OFFLOADING
            ),
            simple_tiers=tuple(
                SimpleTier(lazy_offload=leaf.lazy_offload, slots=leaf.host_slots)
                for leaf in leaves
                if leaf.kind == SIMPLE_CPU
            ),
        )


def _somebody_looks() -> bool:
    """A terminal, or a notebook's kernel, whose cells show what is written to stderr."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules
