"""What a client wants is read by nobody's code but its own, so a server that reads it wrongly is found."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.router.calls import decode_body, prefill_body, read_call
from jaxserve.server.answers import LAST_EVENT, event
from jaxserve.sim.answers import check_answer
from jaxserve.sim.broken import Broken
from jaxserve.sim.expect import Expected, Wish
from jaxserve.sim.hash_model import END
from jaxserve.sim.server import Reply, body_of, wish_of
from scheduler.types import FinishReason, SamplingParams
from tests.sim.bugs_of_serving import SERVING
from tests.sim.planting import Mutant

SEEDS, EVENTS = 12, 500


@pytest.mark.parametrize("mutant", [pytest.param(mutant, id=mutant.name) for mutant in SERVING])
def test_a_server_that_reads_or_counts_wrongly_is_found(mutant: Mutant):
    found = mutant.first(SEEDS, EVENTS)
    assert found is not None, f"no law is broken in {SEEDS} worlds"
    assert found.law in mutant.laws, found


@st.composite
def wishes(draw: Callable[..., Any]) -> Wish:
    """As clients draw them."""
    most = draw(st.integers(1, 9))
    stream = draw(st.booleans())
    usage = stream and draw(st.booleans())
    return Wish(
        prompt_token_ids=tuple(draw(st.lists(st.integers(0, END), min_size=1, max_size=9))),
        sampling=SamplingParams(
            n=draw(st.integers(1, 3)),
            max_tokens=most,
            min_tokens=draw(st.integers(0, most)),
            temperature=0.0,
            seed=draw(st.integers(0, 2**31 - 1)),
            ignore_eos=draw(st.booleans()),
            stop=tuple(draw(st.lists(st.sampled_from(("ab", "Z", "€")), unique=True))),
            stop_token_ids=tuple(draw(st.lists(st.integers(0, END), max_size=2))),
        ),
        salt=draw(st.sampled_from(("", "tenant"))),
        priority=draw(st.integers(0, 2)),
        stream=stream,
        usage=usage,
        usage_often=usage and draw(st.booleans()),
    )


def body(wish: Wish) -> bytes:
    return body_of(
        wish.prompt_token_ids,
        wish.sampling,
        wish.salt,
        wish.priority,
        stream=wish.stream,
        usage=wish.usage,
        usage_often=wish.usage_often,
    )


@given(wishes())
def test_a_body_says_what_its_client_wants_and_a_router_changes_only_what_it_must(wish: Wish):
    call = read_call(body(wish))
    assert wish_of(call.raw) == wish
    assert wish_of(decode_body(call, {"remote_port": 1})) == wish
    one_token = replace(wish.sampling, n=1, max_tokens=1, min_tokens=0)
    alone = replace(wish, sampling=one_token, stream=False, usage=False, usage_often=False)
    assert wish_of(prefill_body(call)) == alone


WISH = Wish(prompt_token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=2))
RIGHT = (Expected(tokens=(4, 5), text="ef", reason=FinishReason.LENGTH, stop_reason=None),)


def usage(completion: int = 2, *, prompt: int = 3, hit: int = 1, external: int = 0, cached: int = 1) -> Any:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": cached,
            "local_compute": 3 - hit - external,
            "local_cache_hit": hit,
            "external_kv_transfer": external,
        },
    }


def choice(text: str, reason: str | None) -> dict[str, object]:
    return {"index": 0, "text": text, "finish_reason": reason, "stop_reason": None}


def whole(**more: object) -> bytes:
    return json.dumps({"choices": [choice("ef", "length")], **more}).encode()


def stream(*usages: Any, last: tuple[Any, ...] = ()) -> bytes:
    """Two chunks of text with these usages, and a last one without any text."""
    chunks = [
        {"choices": [choice(text, reason)], "usage": said}
        for text, reason, said in zip("ef", (None, "length"), usages, strict=True)
    ]
    chunks += [{"choices": [], "usage": said} for said in last]
    return b"".join((*map(event, chunks), LAST_EVENT))


def check(body: bytes, wish: Wish = WISH) -> None:
    check_answer(Reply(status=200, body=body, right=True), wish, RIGHT, law="R4")


AT_END = replace(WISH, stream=True, usage=True)
OFTEN = replace(AT_END, usage_often=True)


def test_right_answers_break_no_law():
    check(whole(usage=usage()))
    check(whole(usage=usage(hit=0, external=3, cached=2)))  # as the peer said
    check(stream(None, None), replace(WISH, stream=True))
    check(stream(None, None, last=(usage(),)), AT_END)
    check(stream(usage(1), usage(), last=(usage(),)), OFTEN)


@pytest.mark.parametrize(
    ("said", "wish"),
    [
        (whole(), WISH),
        (whole(usage=usage(3)), WISH),
        (whole(usage=usage(prompt=2)), WISH),
        (whole(usage=usage() | {"total_tokens": 6}), WISH),
        (whole(usage=usage(cached=2)), WISH),
        (whole(usage=usage(hit=0, external=3, cached=4)), WISH),
        (whole(usage=usage(hit=0, external=4, cached=3)), WISH),
        (stream(None, usage()), replace(WISH, stream=True)),
        (stream(None, None), AT_END),
        (stream(None, usage()), AT_END),
        (stream(None, None, last=(usage(1),)), AT_END),
        (stream(usage(1), usage(), last=(usage(),)), AT_END),
        (stream(None, None, last=(usage(),)), OFTEN),
        (stream(usage(), usage(1), last=(usage(),)), OFTEN),
    ],
)
def test_a_wrong_usage_breaks_a_law(said: bytes, wish: Wish):
    with pytest.raises(Broken) as broken:
        check(said, wish)
    assert broken.value.law == "I24"


def test_a_wrong_text_breaks_the_law_that_is_asked_for():
    wrong = json.dumps({"choices": [choice("eg", "length")], "usage": usage()}).encode()
    with pytest.raises(Broken) as broken:
        check(wrong)
    assert broken.value.law == "R4"
