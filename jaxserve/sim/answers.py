"""What a client reads of an answer, as its library would, and whether it is what must come."""

import json
from collections.abc import Sequence
from typing import Any

from jaxserve.server.answers import LAST_EVENT
from jaxserve.sim.broken import Broken
from jaxserve.sim.expect import Expected
from jaxserve.sim.server import Reply


def check_answer(reply: Reply, expected: Sequence[Expected], *, stream: bool) -> None:
    """R4: a whole answer is the right one for this client's prompt.

    Args:
        expected: per sequence.

    Raises:
        Broken: it is not, or an error looks like an answer.
    """
    bodies = _events(reply.body) if stream else [json.loads(reply.body)]
    if any("error" in body for body in bodies) == reply.right:
        raise Broken("R4", f"a client gets {bodies[-1]} as {'an answer' if reply.right else 'an error'}")
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
        raise Broken("R4", f"a client gets {got}, expected {right}")


def _events(body: bytes) -> list[dict[str, Any]]:
    """Raises: Broken: the stream has no end."""
    if not body.endswith(LAST_EVENT):
        raise Broken("R4", "a stream that looks whole has no last event")
    return [
        json.loads(line.removeprefix(b"data: ")) for line in body[: -len(LAST_EVENT)].splitlines() if line
    ]
