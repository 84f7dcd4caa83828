"""Deltas to JSON: merging, usage, log-probabilities."""

import json
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.api.choices import Envelope
from jaxserve.api.generation import Generation
from jaxserve.api.logprobs import TextOffsets, chat_logprobs, completion_logprobs, prompt_logprobs
from jaxserve.api.replies import ChunkWriter, full_reply, merge, usage
from jaxserve.outputs import Delta, TokenLogprobs
from metrics.stats import PrefillStats
from scheduler.types import FinishReason, SamplingParams

PIECES = {
    1: b"a",
    2: "é".encode()[:1],
    3: "é".encode()[1:],
    4: b"<end>",
    5: "日本".encode(),
    6: b"",
    7: b"\xff",
}


class Vocabulary:
    special_ids = frozenset({4})

    def token_bytes(self, token_id: int) -> bytes:
        return PIECES[token_id]


VOCABULARY = Vocabulary()


def offsets(*token_ids: int, skip: bool = True) -> list[int]:
    positions = TextOffsets(VOCABULARY, skip_special_tokens=skip)
    return [positions.next(token_id) for token_id in token_ids]


def test_offsets_count_whole_characters() -> None:
    assert offsets(1, 2, 3, 1) == [0, 1, 1, 2]
    assert offsets(5, 6, 1) == [0, 2, 2]
    assert offsets(2, 1, 1) == [0, 0, 2]


def test_offsets_leave_out_special_tokens_as_the_text_does() -> None:
    assert offsets(1, 4, 1) == [0, 1, 1]
    assert offsets(1, 4, 1, skip=False) == [0, 1, 6]


def entry(token_id: int, logprob: float = -1.0, top: tuple[tuple[int, float], ...] = ()) -> TokenLogprobs:
    return TokenLogprobs(token_id=token_id, logprob=logprob, rank=3, top=top)


def test_tokens_that_are_no_text_are_named_by_their_bytes() -> None:
    entries = [(2, entry(2, top=((3, -0.1), (7, -0.2)))), (3, entry(3))]
    positions = TextOffsets(VOCABULARY, skip_special_tokens=True)
    written = completion_logprobs(entries, VOCABULARY, positions, top=1, as_ids=False)
    assert written == {
        "tokens": ["bytes:\\xc3", "bytes:\\xa9"],
        "token_logprobs": [-1.0, -1.0],
        "top_logprobs": [{"bytes:\\xc3": -1.0, "bytes:\\xa9": -0.1}, {"bytes:\\xa9": -1.0}],
        "text_offset": [0, 0],
    }
    assert chat_logprobs([entry(2)], VOCABULARY, as_ids=False)["content"] == [
        {"token": "bytes:\\xc3", "logprob": -1.0, "bytes": [0xC3], "top_logprobs": []}
    ]


def test_what_json_cannot_hold_becomes_the_lowest() -> None:
    values = [entry(1, float("-inf")), entry(1, float("nan")), entry(1, -1e6, top=((5, float("-inf")),))]
    written = chat_logprobs(values, VOCABULARY, as_ids=True)
    assert "NaN" not in json.dumps(written) and "Infinity" not in json.dumps(written)
    assert [token["logprob"] for token in written["content"]] == [-9999.0] * 3  # type: ignore[index]


def test_prompt_logprobs_name_each_token_once() -> None:
    scored = entry(5, -0.5, top=((1, -0.1), (2, -0.2), (5, -0.5)))
    (first, second) = prompt_logprobs([None, scored], VOCABULARY, top=3)
    assert first is None and second is not None
    assert list(second) == ["5", "1", "2"]
    assert second["5"] == {"logprob": -0.5, "rank": 3, "decoded_token": "日本"}
    assert second["2"] == {"logprob": -0.2, "rank": 2, "decoded_token": "bytes:\\xc3"}


def delta(**fields: object) -> Delta:
    return Delta(**{"request_id": "r", "index": 0, **fields})  # type: ignore[arg-type]


STATS = st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50)).map(
    lambda parts: PrefillStats(
        num_prompt_tokens=sum(parts), local_cache_hit=parts[0], external_kv_transfer=parts[1]
    )
)


@settings(deadline=None, max_examples=100)
@given(st.lists(STATS, max_size=5), st.integers(0, 100))
def test_usage_adds_up(prefills: list[PrefillStats], completion_tokens: int) -> None:
    prompt_tokens = sum(stats.num_prompt_tokens for stats in prefills)
    written = usage(prompt_tokens, completion_tokens, prefills)
    details = written["prompt_tokens_details"]
    assert isinstance(details, dict)
    assert written["total_tokens"] == prompt_tokens + completion_tokens
    assert details["cached_tokens"] == details["local_cache_hit"] + details["external_kv_transfer"]
    assert details["cached_tokens"] + details["local_compute"] == prompt_tokens


@settings(deadline=None, max_examples=100)
@given(STATS, st.integers(0, 50))
def test_a_peers_number_stands_for_cached_tokens_where_its_pages_came(stats: PrefillStats, peer: int) -> None:
    """A load that brought nothing was no transfer; the three sources are ours in any case."""
    ours = usage(stats.num_prompt_tokens, 1, [stats])["prompt_tokens_details"]
    told = usage(stats.num_prompt_tokens, 1, [stats], peer_cached_tokens=peer)["prompt_tokens_details"]
    assert isinstance(ours, dict) and isinstance(told, dict)
    assert told == (ours | {"cached_tokens": peer} if stats.external_kv_transfer else ours)


def steps(draw_tokens: list[list[int]]) -> list[Delta]:
    """A sequence's deltas: the first with prefill, the last with the reason of its end."""
    stats = PrefillStats(num_prompt_tokens=3, local_cache_hit=1, external_kv_transfer=0)
    made = [
        delta(
            text="".join(chr(97 + token) for token in tokens),
            token_ids=tuple(tokens),
            logprobs=tuple(entry(token) for token in tokens),
            prefill=stats if number == 0 else None,
        )
        for number, tokens in enumerate(draw_tokens)
    ]
    end = replace(
        made[-1], finish_reason=FinishReason.STOP, stop_reason=7, kv_transfer_params={"remote_port": 1}
    )
    return [*made[:-1], end]


TOKENS = st.lists(st.lists(st.sampled_from([1, 5]), max_size=3), min_size=1, max_size=8)


@settings(deadline=None, max_examples=100)
@given(TOKENS, st.data())
def test_merging_is_associative_and_loses_nothing(tokens: list[list[int]], data: st.DataObject) -> None:
    deltas = steps(tokens)
    cut = data.draw(st.integers(0, len(deltas)))
    parts = [part for part in (deltas[:cut], deltas[cut:]) if part]
    whole = merge(deltas)
    assert merge([merge(part) for part in parts]) == whole
    assert whole.token_ids == tuple(token for step in tokens for token in step)
    assert (whole.finish_reason, whole.stop_reason) == (FinishReason.STOP, 7)
    assert whole.prefill is not None
    assert whole.kv_transfer_params == {"remote_port": 1}


@settings(deadline=None, max_examples=100)
@given(TOKENS, st.booleans(), st.booleans(), st.data())
def test_a_stream_says_what_the_whole_answer_says(
    tokens: list[list[int]], chat: bool, return_ids: bool, data: st.DataObject
) -> None:
    """However the deltas are merged on their way."""
    sampling = SamplingParams(logprobs=0)
    generation = Generation(model="m", sampling=sampling, return_token_ids=return_ids, include_usage=True)
    envelope = Envelope(
        reply_id="x", chat=chat, created=1, generation=generation, prompts=((None, (1, 1, 1)),)
    )
    deltas = steps(tokens)
    whole = full_reply(envelope, [(0, merge(deltas))], VOCABULARY)
    cut = data.draw(st.integers(1, len(deltas)))
    writer = ChunkWriter(envelope, VOCABULARY)
    sent = [merge(deltas[:cut]), *deltas[cut:]]
    chunks = [chunk for part in sent for chunk in writer.chunks(0, part)] + writer.last()
    (expected,) = whole["choices"]  # type: ignore[misc]
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]  # type: ignore[index]
    if chat:
        assert choices[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content", "") for c in choices) == expected["message"]["content"]
        scored = [token for c in choices if c["logprobs"] for token in c["logprobs"]["content"]]
        assert scored == expected["logprobs"]["content"]
    else:
        assert "".join(choice["text"] for choice in choices) == expected["text"]
        scored = [token for choice in choices for token in choice["logprobs"]["tokens"]]
        assert scored == expected["logprobs"]["tokens"]
        assert [o for c in choices for o in c["logprobs"]["text_offset"]] == expected["logprobs"][
            "text_offset"
        ]
    assert [choice["finish_reason"] for choice in choices].count("stop") == 1
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", 7)
    assert chunks[-1]["usage"] == whole["usage"]
    assert [chunk.get("kv_transfer_params") for chunk in chunks] == [
        *[None] * (len(chunks) - 2),
        whole["kv_transfer_params"],
        None,
    ]
    if return_ids:
        assert [i for choice in choices for i in choice.get("token_ids", ())] == expected["token_ids"]
