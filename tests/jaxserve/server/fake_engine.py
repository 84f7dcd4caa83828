"""An engine without a model: it answers with a fixed sentence, one word a token, and does what it is told."""

import asyncio
import itertools
import re
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxserve.census import PageCensus
from jaxserve.outputs import Delta, QueueFull, RequestRefused, TokenLogprobs, Transfer
from jaxserve.text import TemplateError
from kv.moves import RemoteSource
from metrics.moves import NIXL, SIMPLE, MoveStats, PageStates, TierSlots
from metrics.records import Gauges
from metrics.stats import PrefillStats
from scheduler.types import FinishReason, Request

ANSWER = ("Hello", " wörld", ",", " this", " is", " 日", "本", " a", " test", ".")
"""Tokens 300, 301, ...; repeated until the request has enough."""

EOS = 299
SPECIAL = {298: "<|im_start|>", 299: "<|im_end|>"}
SPECIAL_IDS = {spelling: token_id for token_id, spelling in SPECIAL.items()}
SPECIAL_SPELLINGS = re.compile(r"(<\|im_start\|>|<\|im_end\|>)")


REMOTE = RemoteSource(
    engine_id="p",
    epoch="0" * 32,
    host="localhost",
    port=5600,
    request_id="cmpl-1",
    pages=((1,),),
    generations=((1,),),
    num_tokens=2,
    page_size=16,
    cached_tokens=1,
)
TERMS = {"do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [[1, 2]]}


class FakeTokenizer:
    """One token a UTF-8 byte (ids 0 to 255); the answer's words and two special tokens above that.

    As real ones do, it takes a special token's spelling for the token.
    """

    eos_token_ids = (EOS,)
    special_ids = frozenset(SPECIAL)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = []
        for part in SPECIAL_SPELLINGS.split(text):
            ids += [SPECIAL_IDS[part]] if part in SPECIAL_IDS else part.encode()
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        if token_id in SPECIAL:
            return SPECIAL[token_id].encode()
        return ANSWER[token_id - 300].encode() if 300 <= token_id < 300 + len(ANSWER) else b""

    def token(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return b"".join(self.token_bytes(i) for i in ids if i not in skipped).decode("utf-8", "replace")


class FakeChat:
    """`role: content` lines; "turns" as a template argument puts special tokens around each; a message of
    "raise" makes the template fail."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        if any(message["content"] == "raise" for message in messages):
            raise TemplateError("roles must alternate")
        begin, end = (
            ("<|im_start|>", "<|im_end|>") if template_kwargs and "turns" in template_kwargs else ("", "")
        )
        text = "".join(f"{begin}{message['role']}: {message['content']}{end}\n" for message in messages)
        return text + "assistant:" if add_generation_prompt else text


class FakeEngine:
    """Satisfies `EngineSurface`.

    Attributes:
        full: there is no room for requests.
        failure: raised by `stream` before the first delta.
        fails_after: raise `late_failure` after this many steps.
        step_s: seconds per token; 0 yields to the loop only.
        finish: reason of the end.
        message: at the end, where its reason is an error.
        moves: takes kv_transfer_params: a lease for do_remote_decode, and REMOTE for the MAC "good".
        opened: kv_transfer_params that came, with the prompt and its salt.
        gate: each step takes one of it; None: steps do not wait.
        seen: requests that came, in order.
        running: ids of requests in progress.
        aborted: ids of requests whose stream was closed before its end.
    """

    served_model_names = ("fake", "alias/with-slash")
    tokenizer = FakeTokenizer()
    chat: FakeChat | None = FakeChat()
    vocab_size = 512
    max_model_len = 2048

    def __init__(self) -> None:
        self.default_sampling: Mapping[str, float | int] = {}
        self.full = False
        self.failure: Exception | None = None
        self.fails_after: int | None = None
        self.late_failure: Exception = RuntimeError("secret detail /etc/passwd")
        self.step_s = 0.0
        self.finish: FinishReason | None = None
        self.gate: asyncio.Semaphore | None = None
        self.message = "a secret"
        self.moves = False
        self.opened: list[tuple[Mapping[str, Any], tuple[int, ...], str]] = []
        self.alive = True
        self.is_stalled = False
        self.seen: list[Request] = []
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.resets = 0
        self._ids = itertools.count()

    def new_request_id(self, prefix: str) -> str:
        return f"{prefix}-{next(self._ids):08x}"

    def open_transfer(
        self, params: Mapping[str, Any], prompt_token_ids: tuple[int, ...], cache_salt: str
    ) -> Transfer:
        self.opened.append((params, prompt_token_ids, cache_salt))
        if not self.moves:
            raise RequestRefused("this server has no --kv-transfer-config", param="kv_transfer_params")
        if params.get("do_remote_decode") is True:
            return Transfer(lease=True)
        if params.get("mac") == "good":
            return Transfer(remote=REMOTE)
        raise RequestRefused("not sealed by\na peer", param="kv_transfer_params")

    def check_room(self) -> None:
        if self.full:
            raise QueueFull("12 wait")

    def stalled(self, seconds: float) -> bool:
        return self.is_stalled

    def metrics_text(self, accept: str) -> tuple[bytes, str]:
        return f"fake_running {len(self.running)}\n".encode(), "text/plain; version=0.0.4; charset=utf-8"

    async def reset_prefix_cache(self, *, external: bool = False) -> bool:
        self.resets += 10 if external else 1
        return True

    async def page_census(self) -> PageCensus:
        moves = MoveStats.empty((NIXL, SIMPLE))
        assert moves.nixl is not None and moves.simple is not None
        return PageCensus(
            current=self.alive,
            total=48,
            live_requests=len(self.running),
            gauges=Gauges(running=1, waiting_capacity=2, waiting_deferred=3),
            moves=replace(
                moves,
                pages=PageStates(free=40, idle=2, in_use=6, loading=2, storing=1, leased=2, quarantined=1),
                nixl=replace(moves.nixl, leases=2),
                simple=replace(moves.simple, tier=TierSlots(slots=192, used=9, pinned=4, storing=1)),
            ),
        )

    async def drain(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while self.running:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            self.finish = FinishReason.ABORT

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        self.seen.append(request)
        if self.failure is not None:
            raise self.failure
        self.running.add(request.request_id)
        ended = False
        try:
            for step in range(request.sampling.max_tokens or 0):
                await (asyncio.sleep(self.step_s) if self.gate is None else self.gate.acquire())
                if step == self.fails_after:
                    raise self.late_failure
                for index in range(request.sampling.n):
                    yield self._delta(request, index, step)
                if self.finish is not None:
                    break
            ended = True
        finally:
            self.running.discard(request.request_id)
            if not ended:
                self.aborted.append(request.request_id)

    def _delta(self, request: Request, index: int, step: int) -> Delta:
        sampling = request.sampling
        token_id = 300 + step % len(ANSWER)
        prompt_length = len(request.prompt_token_ids)
        first = step == 0 and index == 0
        finish = FinishReason.LENGTH if step + 1 == sampling.max_tokens else self.finish
        scores = None if sampling.logprobs is None else (_scores(token_id, sampling.logprobs),)
        prompt_scores = None
        if first and sampling.prompt_logprobs is not None:
            ids = request.prompt_token_ids[1:]
            prompt_scores = (None, *(_scores(i, sampling.prompt_logprobs) for i in ids))
        hit = prompt_length // 2
        external = prompt_length - hit if request.remote is not None else 0
        return Delta(
            request_id=request.request_id,
            index=index,
            text=ANSWER[step % len(ANSWER)],
            token_ids=(token_id,),
            logprobs=scores,
            finish_reason=finish,
            stop_reason="." if finish is FinishReason.STOP else None,
            message=self.message if finish is FinishReason.ERROR else None,
            prefill=PrefillStats(
                num_prompt_tokens=prompt_length, local_cache_hit=hit, external_kv_transfer=external
            )
            if first
            else None,
            prompt_logprobs=prompt_scores,
            kv_transfer_params=TERMS if request.lease and finish is not None and index == 0 else None,
        )


def _scores(token_id: int, top: int) -> TokenLogprobs:
    """The token has rank 1 and log-probability -0.5; below it come tokens 65 ("A") and up."""
    others = tuple((65 + i, -1.0 - i) for i in range(top - 1))
    return TokenLogprobs(
        token_id=token_id, logprob=-0.5, rank=1, top=((token_id, -0.5), *others) if top else ()
    )
