"""Traffic from files: nothing lost, prefixes shared as the file says, and bad files named by line."""

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.sim.traffic import (
    BLOCK_TOKENS,
    VOCABULARY,
    HashedPrompt,
    TraceError,
    from_lines,
    from_record,
    from_report,
    read_trace,
)
from scheduler.record import decode, digest, encode_entry, encode_header, encode_inputs
from scheduler.types import Inputs, Limits, SchedulerConfig
from tests.scheduler.world import World, request

LINE = {"timestamp": 27482, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 2353]}


def line(**changes) -> bytes:
    return json.dumps(LINE | changes).encode()


@st.composite
def entries(draw) -> dict:
    length = draw(st.integers(1, 3 * BLOCK_TOKENS))
    count = -(-length // BLOCK_TOKENS)
    ids = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    return {
        "timestamp": draw(st.integers(0, 10**7)),
        "input_length": length,
        "output_length": draw(st.integers(1, 2000)),
        "hash_ids": ids,
    }


@given(st.lists(entries(), min_size=1, max_size=12))
def test_nothing_of_a_trace_is_lost_and_time_begins_at_its_first_request(given):
    trace = from_lines("\n\n".join(json.dumps(entry) for entry in given).encode())
    assert trace.prompt_tokens == sum(entry["input_length"] for entry in given)
    assert trace.output_tokens == sum(entry["output_length"] for entry in given)
    times = [arrival.at_s for arrival in trace.arrivals]
    assert times[0] == 0 and times == sorted(times) and trace.duration_s == times[-1]
    stamps = sorted(entry["timestamp"] for entry in given)
    assert times == pytest.approx([(stamp - stamps[0]) / 1000 for stamp in stamps])


@given(entries(), entries())
def test_prompts_share_as_many_tokens_as_their_first_ids_say(one, two):
    prompts = [
        HashedPrompt(
            num_tokens=entry["input_length"], hash_ids=tuple(entry["hash_ids"]), block_tokens=BLOCK_TOKENS
        )
        for entry in (one, two)
    ]
    first, second = (prompt.token_ids() for prompt in prompts)
    assert [len(first), len(second)] == [one["input_length"], two["input_length"]]
    assert all(VOCABULARY[0] <= token < VOCABULARY[1] for token in (*first, *second))
    equal = [a == b for a, b in zip(one["hash_ids"], two["hash_ids"], strict=False)]
    blocks = len(list(itertools.takewhile(bool, equal)))
    shared = min(blocks * BLOCK_TOKENS, len(first), len(second))
    assert first[:shared] == second[:shared]
    if blocks < len(equal) and min(len(first), len(second)) >= shared + 16:
        assert first[shared : shared + 16] != second[shared : shared + 16]


def test_the_made_tokens_never_change():
    prompt = HashedPrompt(num_tokens=3, hash_ids=(46,), block_tokens=BLOCK_TOKENS)
    assert prompt.token_ids() == (14392, 4128, 5221)


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (b"{", "line 2: .*truncated"),
        (b"[1, 2]", "line 2: Expected `object`"),
        (line(timestamp=None), "line 2: Expected `float`, got `null` - at `..timestamp`"),
        (line(timestamp=-1), "line 2: Expected `float` >= 0"),
        (line(input_length=0), "line 2: Expected `int` >= 1 - at `..input_length`"),
        (line(output_length="9"), "line 2: Expected `int`, got `str` - at `..output_length`"),
        (line(hash_ids=[1]), "line 2: 1100 tokens are 3 blocks of 512, got 1 hash ids"),
        (json.dumps({"timestamp": 1}).encode(), "line 2: Object missing required field"),
        (b'{"a": ' + b"[" * 5000, "line 2: "),
        (line()[:-1] + b', "timestamp": NaN}', "line 2: "),
    ],
)
def test_a_bad_line_is_named_in_one_line(bad, complaint):
    with pytest.raises(TraceError, match=complaint) as caught:
        from_lines(line() + b"\n" + bad)
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_trace_or_an_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(data)
    with pytest.raises(TraceError):
        read_trace(path)


def test_traffic_can_be_cut_and_made_faster():
    trace = from_lines(b"\n".join(line(timestamp=stamp) for stamp in (0, 2000, 4000)))
    assert [arrival.at_s for arrival in trace.faster(4).arrivals] == [0, 0.5, 1]
    assert len(trace.first(2).arrivals) == 2 and len(trace.first(0).arrivals) == 1
    with pytest.raises(ValueError, match="cannot be multiplied"):
        trace.faster(0)


class Recording(World):
    """A world whose scheduler's inputs are recorded; a step takes a quarter of a second."""

    def __init__(self) -> None:
        config = SchedulerConfig(page_size=4, num_pages=14, max_num_seqs=3, max_model_len=40, windows=(None,))
        limits = Limits(max_num_batched_tokens=12, max_num_seqs=3)
        super().__init__(config, limits)
        self.data, self.chained = encode_header(config, limits)
        self.now_s = 100.0

    def step(self, **inputs):
        self.now_s += 0.25
        inputs |= {"now_s": self.now_s}
        given = encode_inputs(Inputs(outcome=self.pending, **inputs))
        plan = super().step(**inputs)
        self.chained = digest(self.chained, given, plan)
        self.data += encode_entry(given, self.chained)
        return plan


def test_a_record_gives_back_its_requests():
    """Preempted ones count once; those that were aborted with tokens have those; those without are out."""
    world = Recording()
    bases = {"a": 0, "b": 20, "c": 40}
    asked = {
        name: request(name, range(base, base + 9), max_tokens=16, ignore_eos=True)
        for name, base in bases.items()
    }
    world.step(arrivals=tuple(asked.values()))
    for _ in range(8):
        world.step()
    world.step(arrivals=(request("d", range(60, 69), max_tokens=2),))
    world.step(aborts=("d",))
    world.step(aborts=("c",))
    made = len(world.output("c"))
    world.run()
    assert world.counts["preempted"] > 0 and 0 < made < 16
    trace = from_record(decode(world.data))
    assert trace.left_out == 1
    assert [arrival.at_s for arrival in trace.arrivals] == [0, 0, 0]
    prompts = [arrival.prompt.token_ids() for arrival in trace.arrivals]
    assert prompts == [asked[name].prompt_token_ids for name in "abc"]
    assert [arrival.output_tokens for arrival in trace.arrivals] == [16, 16, made]


def test_a_record_of_a_prefill_server_is_refused():
    world = Recording()
    leased = replace(request("a", range(9), max_tokens=1), lease=True)
    world.step(arrivals=(leased,))
    with pytest.raises(TraceError, match="decode server"):
        from_record(decode(world.data))


def report(**changes) -> dict:
    sent = {"start": 5.0, "end": 6.0, "arrivals": [5.5, 6.0], "prompt_tokens": 40, "output_tokens": 2}
    failed = sent | {"error": "HTTP 503"}
    rounds = [[sent, failed], [sent | {"start": 9.0, "end": 9.5}]]
    return {"date": "today", "endpoints": [{"label": "A", "requests": rounds} | changes]}


def test_a_report_of_a_benchmark_gives_lengths_and_times():
    trace = from_report(json.dumps(report()).encode())
    assert trace.left_out == 1 and [arrival.at_s for arrival in trace.arrivals] == [0, 1.0]
    first, second = (arrival.prompt.token_ids() for arrival in trace.arrivals)
    assert len(first) == len(second) == 40 and first[:8] != second[:8]


def test_a_report_without_requests_says_how_to_get_them():
    with pytest.raises(TraceError, match="--save-detailed"):
        from_report(json.dumps(report(requests=None)).encode())


def test_files_are_told_apart_by_their_content(tmp_path):
    world = Recording()
    world.step(arrivals=(request("a", range(9), max_tokens=2),))
    world.run()
    found = []
    for name, data in (
        ("lines", line()),
        ("report", json.dumps(report(), indent=2).encode()),
        ("record", world.data),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        found.append(read_trace(path).source)
    assert found == ["trace of hashed prompts", "report of a benchmark", "record of a server"]
    with pytest.raises(TraceError, match="nowhere: No such file"):
        read_trace(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    with pytest.raises(TraceError, match="empty"):
        read_trace(empty)
