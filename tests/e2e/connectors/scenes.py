"""Requests in every phase of a prefill and a decode server: with P standing still, and with both running."""

import os
import signal
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

from tests.e2e.connectors.chaos import (
    BUDGET,
    Alone,
    Call,
    Duo,
    census,
    census_through,
    clear,
    continued,
    onlooker,
)
from tests.e2e.connectors.fleet import Node, Prompts, ask, prefill, scrape, text_of, until

LONG = 600
"""Tokens of a prompt that takes a server nineteen steps, and most of its pages."""
QUEUED = 200
"""Tokens of a prompt that has no room beside a long one, whatever else is held."""
STREAMED = 64
"""Tokens that a stream takes to its end."""
HALF, HALF_STREAMED = 400, 128
"""Of a prompt and its stream that leave no room for a long one."""
KEEP = {"do_remote_decode": True, "do_remote_prefill": False}
ATTEMPTS = 10

T = TypeVar("T")


def met(begin: Callable[[], T | None]) -> T:
    """What `begin` gives, which is None where a phase was over before anybody saw it: that is tried again."""
    for _ in range(ATTEMPTS):
        if (scene := begin()) is not None:
            return scene
    raise AssertionError(f"a phase was over before it was seen, {ATTEMPTS} times")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A request in each phase, of which nobody has read the answer; the prefill server stands still.

    Attributes:
        prompts: of each, by phase.
        params: that the client of the leased one holds.
        queued, prefilling: on the prefill server. loading, decoding: on the decode server.
    """

    prompts: dict[str, list[int]]
    params: dict[str, Any]
    queued: Call
    prefilling: Call
    loading: Call
    decoding: Call

    @classmethod
    def set(cls, duo: Duo, prompts: Prompts) -> "Scene":
        """Begins all of them. A prompt that is done before its server stands still is tried again."""
        return met(lambda: _set(duo, prompts))

    @property
    def calls(self) -> tuple[Call, ...]:
        """Those under way."""
        return self.queued, self.prefilling, self.loading, self.decoding


def _set(duo: Duo, prompts: Prompts) -> Scene | None:
    p, d = duo.prefill, duo.decode
    clear(p, d)
    lengths = {"leased": 40, "queued": QUEUED, "prefilling": LONG, "loading": 45, "decoding": 33}
    asked = {phase: prompts.take(length) for phase, length in lengths.items()}
    # The servers meet, and the stream's pages are there before nobody answers for them any more.
    ask(d.url, asked["decoding"], max_tokens=1, kv_transfer_params=prefill(p.url, asked["decoding"]))
    params = {phase: prefill(p.url, asked[phase]) for phase in ("leased", "loading")}
    prefilling = Call(p, asked["prefilling"], max_tokens=1, kv_transfer_params=KEEP)
    until(lambda: scrape(p.url)["vllm:num_requests_running"] == 1, "a prompt is being computed")
    queued = Call(p, asked["queued"], max_tokens=1, kv_transfer_params=KEEP)
    until(lambda: scrape(p.url)["vllm:num_requests_waiting"] == 1 or prefilling.answered, "another one waits")
    os.kill(p.pid, signal.SIGSTOP)
    if prefilling.answered or queued.answered:
        os.kill(p.pid, signal.SIGCONT)
        prefilling.disconnect()
        queued.disconnect()
        return None
    loading = Call(d, asked["loading"], kv_transfer_params=params["loading"])
    until(lambda: census(d)["in_moves"]["loading"] > 0, "pages are being loaded")
    decoding = Call(d, asked["decoding"], stream=True, max_tokens=STREAMED)
    decoding.first_chunk()
    return Scene(
        prompts=asked,
        params=params["leased"],
        queued=queued,
        prefilling=prefilling,
        loading=loading,
        decoding=decoding,
    )


def assert_right(duo: Duo, scene: Scene, alone: Alone, without: Collection[str] = ()) -> None:
    """Each of the five has its text, but for those whose client or server has gone."""
    prompts = scene.prompts
    ends = {
        "decoding": lambda: scene.decoding.end().text,
        "loading": lambda: scene.loading.end().text,
        "prefilling": lambda: continued(duo.decode, prompts["prefilling"], scene.prefilling.end()),
        "queued": lambda: continued(duo.decode, prompts["queued"], scene.queued.end()),
        "leased": lambda: text_of(ask(duo.decode.url, prompts["leased"], kv_transfer_params=scene.params)),
    }
    longer = {"decoding": {"max_tokens": STREAMED}}
    texts = {phase: end() for phase, end in ends.items() if phase not in without}
    assert texts == {phase: alone(prompts[phase], **longer.get(phase, {})) for phase in texts}


def computed(node: Node) -> float:
    """Tokens that a server has computed in its life."""
    return scrape(node.url)["vllm:iteration_tokens_total_sum"]


def halfway(node: Node, prompts: Prompts) -> tuple[list[int], Call]:
    """A long prompt of which the server computes the first half at this moment, and its call."""

    def begin() -> tuple[list[int], Call] | None:
        prompt, before = prompts.take(LONG), computed(node)
        call = Call(node, prompt, max_tokens=1, kv_transfer_params=KEEP)
        until(lambda: call.answered or computed(node) - before >= BUDGET, "the prompt is being computed")
        if computed(node) - before < LONG / 2:
            return prompt, call
        call.end()
        clear(node)
        return None

    return met(begin)


def reading(duo: Duo, prompts: Prompts) -> tuple[list[int], dict[str, Any], Call]:
    """A long prompt whose pages D reads from P at this moment, P's parameters for it, and D's call."""
    p, d = duo.prefill, duo.decode
    known = prompts.take(33)  # so that what D does next is to read, and not to make P's acquaintance
    ask(d.url, known, max_tokens=1, kv_transfer_params=prefill(p.url, known))

    def begin() -> tuple[list[int], dict[str, Any], Call] | None:
        clear(p, d)
        census_through(client, d)
        prompt = prompts.take(LONG)
        params = prefill(p.url, prompt)
        call = Call(d, prompt, kv_transfer_params=params)
        seen: list[int] = []

        def looked() -> bool:
            seen.append(census_through(client, d)["in_moves"]["loading"])
            return seen[-1] > 0 or call.answered

        until(looked, "pages are being read", pause_s=0)
        if seen[-1] > 0:
            return prompt, params, call
        call.end()
        return None

    with onlooker() as client:
        return met(begin)


@dataclass(frozen=True, slots=True, kw_only=True)
class Full:
    """A decode server that generates for one request, and has no room for another that waits.

    Attributes:
        decoded, waiting: their prompts.
        params: P's, for the one that waits.
        stream, queued: their calls.
    """

    decoded: list[int]
    waiting: list[int]
    params: dict[str, Any]
    stream: Call
    queued: Call

    @classmethod
    def set(cls, duo: Duo, prompts: Prompts) -> "Full":
        """Begins both. A stream that is over before the other one waits is begun again."""
        p, d = duo.prefill, duo.decode

        def begin() -> Full | None:
            clear(p, d)
            decoded, waiting = prompts.take(HALF), prompts.take(LONG)
            params = prefill(p.url, decoded)
            stream = Call(d, decoded, kv_transfer_params=params, stream=True, max_tokens=HALF_STREAMED)
            stream.first_chunk()
            params = prefill(p.url, waiting)
            queued = Call(d, waiting, kv_transfer_params=params)
            until(lambda: has_waiting(d) or queued.answered, "one waits for room")
            if has_waiting(d):
                return cls(decoded=decoded, waiting=waiting, params=params, stream=stream, queued=queued)
            stream.end()
            queued.end()
            return None

        return met(begin)


def has_waiting(node: Node) -> bool:
    """A request has no pages yet."""
    return scrape(node.url)["vllm:num_requests_waiting"] == 1
