"""What a client reads of an answer, as its library would, and whether it is what must come."""

import json
from collections.abc import Sequence
from typing import Any

from jaxserve.server.answers import LAST_EVENT
from jaxserve.sim.broken import Broken
from jaxserve.sim.expect import Expected, Wish
from jaxserve.sim.server import Reply


def check_answer(reply: Reply, wish: Wish, expected: Sequence[Expected], *, law: str) -> None:
    """A whole answer with status 200 is the right one for this wish.

    Args:
        expected: per sequence.
        law: that is broken if it is not: R4 of a client's, I24 of a server's.

    Raises:
        Broken: it is not, or an error looks like an answer; I24: it has used something else than it says.
    """
    bodies = _events(reply.body, law) if wish.stream else [json.loads(reply.body)]
    if any("error" in body for body in bodies) == reply.right:
        raise Broken(law, f"somebody gets {bodies[-1]} as {'an answer' if reply.right else 'an error'}")
    if not reply.right:
        return
    texts, reasons, stops = [""] * len(expected), [""] * len(expected), [None] * len(expected)
    for choice in (choice for body in bodies for choice in body["choices"]):
        index = choice["index"]
        texts[index] += choice["text"]
        if choice["finish_reason"] is not None:
            reasons[index], stops[index] = choice["finish_reason"], choice.get("stop_reason")
    got = list(zip(texts, reasons, stops, strict=True))
    right = [(one.text, one.reason.value, one.stop_reason) for one in expected]
    if got != right:
        raise Broken(law, f"somebody gets {got}, expected {right}")
    _check_usage(bodies, wish, sum(len(one.tokens) for one in expected))


def _check_usage(bodies: Sequence[dict[str, Any]], wish: Wish, tokens: int) -> None:
    """I24: what was used is said where it was asked for, and nowhere else; and it is so. `tokens`: of all
    sequences, with those that end them."""
    *before, last = [body.get("usage") for body in bodies]
    if wish.stream and not wish.usage:
        before, last = [*before, last], None
    if (last is None) == (wish.usage or not wish.stream):
        raise Broken("I24", f"{wish.stream=}, {wish.usage=}, and the last usage is {last}")
    if wish.usage and bodies[-1]["choices"]:
        raise Broken("I24", "usage stands in a chunk of text")
    if any((usage is None) == wish.usage_often for usage in before):
        raise Broken("I24", f"{wish.usage_often=}, and usages are {before}")
    counts = [_count(usage, wish, whole=False) for usage in before if usage is not None]
    if last is not None:
        counts.append(_count(last, wish, whole=True))
        if counts[-1] != tokens or counts != sorted(counts):
            raise Broken("I24", f"completion_tokens are {counts}, expected {tokens}")


def _count(usage: dict[str, Any], wish: Wish, *, whole: bool) -> int:
    """Tokens generated so far. `whole`: the answer is, so that sources of the prompt must be known."""
    details, prompt = usage["prompt_tokens_details"], len(wish.prompt_token_ids)
    hit, external = details["local_cache_hit"], details["external_kv_transfer"]
    parts, cached = (details["local_compute"], hit, external), details["cached_tokens"]
    # A peer that has sent pages says itself how many of its tokens it had found.
    right = cached == hit + external or (external > 0 and 0 <= cached <= prompt)
    if min(parts) < 0 or sum(parts) not in ((prompt,) if whole else (0, prompt)) or not right:
        raise Broken("I24", f"the sources of {prompt} tokens are {details}")
    if (usage["prompt_tokens"], usage["total_tokens"]) != (prompt, prompt + usage["completion_tokens"]):
        raise Broken("I24", f"usage for {prompt} tokens is {usage}")
    return usage["completion_tokens"]


def _events(body: bytes, law: str) -> list[dict[str, Any]]:
    """Raises: Broken: the stream has no end."""
    if not body.endswith(LAST_EVENT):
        raise Broken(law, "a stream that looks whole has no last event")
    return [
        json.loads(line.removeprefix(b"data: ")) for line in body[: -len(LAST_EVENT)].splitlines() if line
    ]
