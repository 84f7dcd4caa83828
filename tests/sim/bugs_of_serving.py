"""Servers and routers that read a body wrongly, or say wrongly what was used, the same way every time."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxserve.api import completions, replies
from jaxserve.api.replies import ChunkWriter, Tally
from jaxserve.server.prepare import Preparer
from jaxserve.sim import router
from tests.sim.planting import Mutant, Swap, Wrong


def _drops_last_token(right: Any) -> Any:
    def tokens(self: Any, prompt: Any, add_special_tokens: bool, param: str) -> Any:
        ids = right(self, prompt, add_special_tokens, param)
        return ids[:-1] or ids

    return tokens


def _reads(**wrong: Any) -> Wrong:
    """These fields of a body are read so, whatever they say."""
    return lambda right: lambda *args, **named: replace(right(*args, **named), **wrong)


def _no_min_tokens(right: Any) -> Any:
    def read(*args: Any, **named: Any) -> Any:
        read = right(*args, **named)
        return replace(read, sampling=replace(read.sampling, min_tokens=0))

    return read


def _routes_without_min_tokens(right: Any) -> Any:
    def body(call: Any, params: Mapping[str, object] | None) -> bytes:
        return json.dumps(json.loads(right(call, params)) | {"min_tokens": 0}).encode()

    return body


def _says(**more: int) -> Wrong:
    """`usage` is told so many tokens more than there are."""

    def wrong(right: Any) -> Any:
        def usage(prompt_tokens: int, completion_tokens: int, prefills: Any, **named: Any) -> Any:
            prompt, completion = more.get("prompt", 0), more.get("completion", 0)
            return right(prompt_tokens + prompt, completion_tokens + completion, prefills, **named)

        return usage

    return wrong


def _all_cached_and_one_more(right: Any) -> Any:
    def usage(prompt_tokens: int, *args: Any, **named: Any) -> Any:
        said = right(prompt_tokens, *args, **named)
        said["prompt_tokens_details"]["cached_tokens"] = prompt_tokens + 1
        return said

    return usage


def _counts_the_first_sequence(right: Any) -> Any:
    def add(self: Any, prompt: int, delta: Any, *, counts_output: bool) -> None:
        right(self, prompt, delta, counts_output=counts_output and delta.index == 0)

    return add


def _no_last_chunk(right: Any) -> Any:
    return lambda self: []


def _reader(wrong: Wrong) -> Swap:
    return Swap(where=completions, name="read_generation", wrong=wrong)


def _usage(wrong: Wrong) -> Swap:
    return Swap(where=replies, name="usage", wrong=wrong)


SERVING = (
    Mutant(
        name="the last token of a prompt is dropped",
        laws=("I7", "I11", "I14"),
        swap=Swap(where=Preparer, name="_tokens", wrong=_drops_last_token),
    ),
    Mutant(name="cache_salt is not read", laws=("I7",), swap=_reader(_reads(cache_salt=""))),
    Mutant(name="priority is not read", laws=("I22",), swap=_reader(_reads(priority=0))),
    Mutant(name="min_tokens is not read", laws=("I14",), swap=_reader(_no_min_tokens)),
    Mutant(
        name="the router leaves min_tokens out",
        laws=("R4",),
        swap=Swap(where=router, name="decode_body", wrong=_routes_without_min_tokens),
    ),
    Mutant(name="one completion token too many", laws=("I24",), swap=_usage(_says(completion=1))),
    Mutant(name="one prompt token too few", laws=("I24",), swap=_usage(_says(prompt=-1))),
    Mutant(name="more cached than there are", laws=("I24",), swap=_usage(_all_cached_and_one_more)),
    Mutant(
        name="usage of the first sequence alone",
        laws=("I24",),
        swap=Swap(where=Tally, name="add", wrong=_counts_the_first_sequence),
    ),
    Mutant(
        name="usage of a stream left out",
        laws=("I24",),
        swap=Swap(where=ChunkWriter, name="last", wrong=_no_last_chunk),
    ),
)
