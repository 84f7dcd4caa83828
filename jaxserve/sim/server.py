"""The HTTP server before a simulated engine, without connections: bodies in, statuses and bodies out.

What a body means and what a refusal looks like is the server's own code (`jaxserve.server.prepare`,
`jaxserve.api`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from jaxserve.api.errors import ApiError, internal_error
from jaxserve.api.generation import ModelFacts
from jaxserve.api.refusals import told
from jaxserve.outputs import Transfer
from jaxserve.server.options import ServerOptions
from jaxserve.server.prepare import Prepared, Preparer
from jaxserve.server.status import Status
from jaxserve.sim.engine import SimEngine
from jaxserve.sim.expect import Wish
from jaxserve.sim.hash_model import END, VOCAB
from jaxserve.text import Tokenizer
from scheduler.types import SamplingParams

MODEL = "simulated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What has come over a connection.

    Attributes:
        status: HTTP's.
        body: where somebody reads it.
        over: it is whole; false: a part of a stream has come.
        right: it holds an answer, and no error.
        retry_after_s: as the header of this name says; None: it is not there.
    """

    status: int
    body: bytes = b""
    over: bool = True
    right: bool = False
    retry_after_s: int | None = None


class SimServer:
    """`jaxserve.server.surface.PrepareSurface` and `jaxserve.server.status.Liveness` of one life of an
    engine."""

    def __init__(self, engine: SimEngine, tokenizer: Tokenizer) -> None:
        self.engine = engine
        self._tokenizer = tokenizer
        self._status = Status(self, ServerOptions().stall_s)
        self._count = 0
        facts = ModelFacts(
            names=(MODEL,),
            vocab_size=VOCAB,
            max_model_len=engine.node.scheduler.max_model_len,
            eos_token_ids=(END,),
            defaults={},
        )
        self._preparer = Preparer(self, facts, clock=engine.clock, wall_clock=engine.clock)

    @property
    def alive(self) -> bool:
        """See `Liveness`."""
        return self.engine.alive

    def stalled(self, seconds: float) -> bool:
        """See `Liveness`."""
        return self.engine.stalled(seconds)

    @property
    def tokenizer(self) -> Tokenizer:
        """See `PrepareSurface`."""
        return self._tokenizer

    @property
    def chat(self) -> None:
        """See `PrepareSurface`."""
        return None

    def new_request_id(self, prefix: str) -> str:
        """See `PrepareSurface`."""
        self._count += 1
        return f"{self.engine.host}-{self.engine.epoch[:4]}-{prefix}-{self._count}"

    def open_transfer(
        self, params: Mapping[str, Any], prompt_token_ids: tuple[int, ...], cache_salt: str
    ) -> Transfer:
        """See `PrepareSurface`."""
        return self.engine.door.open(params, prompt_token_ids, cache_salt)

    def read(self, body: bytes) -> Prepared:
        """A request to /v1/completions, in the order of `jaxserve.server.generate`.

        Raises:
            QueueFull, ApiError: it is refused.
        """
        self._status.draining = self.engine.draining is not None
        self._status.check_accepting()
        self.engine.core.inbox.check_room()
        return self._preparer.completion(body)

    def health(self) -> int:
        """The status of an answer to /health."""
        try:
            self._status.check_alive()
        except ApiError as error:
            return error.status
        return 200


def refusal(failure: Exception) -> Reply:
    """The answer to a request that an engine did not take."""
    return error_reply(told(failure) or internal_error())


def error_reply(error: ApiError) -> Reply:
    """The answer that says this."""
    body = msgspec.json.encode(error.body())
    return Reply(status=error.status, body=body, retry_after_s=error.retry_after_s)


def body_of(
    prompt: tuple[int, ...],
    sampling: SamplingParams,
    salt: str,
    priority: int,
    *,
    stream: bool = False,
    usage: bool = False,
    usage_often: bool = False,
) -> bytes:
    """What a client sends to /v1/completions. Args: stream, usage, usage_often: see `Wish`."""
    options = {"include_usage": usage, "continuous_usage_stats": usage_often}
    body: dict[str, object] = {
        "model": MODEL,
        "prompt": list(prompt),
        "n": sampling.n,
        "max_tokens": sampling.max_tokens,
        "min_tokens": sampling.min_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "ignore_eos": sampling.ignore_eos,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "priority": priority,
        "stream": stream,
        **({"cache_salt": salt} if salt else {}),
        **({"stream_options": options} if stream and usage else {}),
    }
    return json.dumps(body).encode()


def wish_of(body: bytes) -> Wish:
    """What was written by `body_of`, and perhaps changed by a router. It is read here and not by the server's
    code, which is judged by it."""
    said: dict[str, Any] = json.loads(body)
    options = said.get("stream_options") or {}
    return Wish(
        prompt_token_ids=tuple(said["prompt"]),
        sampling=SamplingParams(
            n=said["n"],
            max_tokens=said["max_tokens"],
            min_tokens=said.get("min_tokens", 0),
            temperature=said["temperature"],
            seed=said["seed"],
            ignore_eos=said["ignore_eos"],
            stop=tuple(said["stop"]),
            stop_token_ids=tuple(said["stop_token_ids"]),
        ),
        salt=said.get("cache_salt", ""),
        priority=said["priority"],
        stream=said["stream"],
        usage=options.get("include_usage", False),
        usage_often=options.get("continuous_usage_stats", False),
    )
