"""Messages of the side channel as bytes."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.wire import (
    MAX_FRAME_BYTES,
    MAX_MESSAGE_BYTES,
    Confirm,
    Confirmed,
    Done,
    DoneAnswer,
    Heartbeat,
    HeartbeatAnswer,
    Hello,
    Message,
    Refused,
    Welcome,
    WireError,
    decode,
    encode,
)

MESSAGES: tuple[Message, ...] = (
    Hello(protocol=1, compat="c0ffee", engine_id="d", epoch="e" * 32),
    Welcome(
        protocol=1,
        engine_id="p",
        epoch="f" * 32,
        agent_name="agent",
        agent_metadata=b"\x00\xff" * 200,
        regions=((2**47, 65536, 1000, 0),),
        memory="DRAM",
        page_size=16,
        page_shape=(2, 2, 1, 16, 8),
        item_bytes=2,
        digest="none",
        lease_s=30.0,
    ),
    Heartbeat(epoch="e", request_ids=("a", "b")),
    HeartbeatAnswer(epoch="e", gone=("b",)),
    Confirm(
        epoch="e", request_id="a", pages=((1, 2), (0, 2)), generations=((3, 2**32), (0, 5)), digests=True
    ),
    Confirmed(epoch="e", digests=((b"\x00" * 16, b"\xff" * 16), ())),
    Done(epoch="e", request_ids=()),
    DoneAnswer(epoch="e"),
    Refused(code="lease", reason="it is over"),
)
messages = st.sampled_from(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_went(message: Message) -> None:
    assert decode(encode(message)) == message


@given(messages, st.data())
def test_a_cut_message_is_refused(message: Message, data: st.DataObject) -> None:
    whole = encode(message)
    with pytest.raises(WireError):
        decode(whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(messages, st.binary(min_size=1, max_size=20))
def test_a_message_with_something_behind_it_is_refused(message: Message, more: bytes) -> None:
    with pytest.raises(WireError):
        decode(encode(message) + more)


@given(
    st.one_of(
        st.binary(max_size=300), st.binary(max_size=60).map(lambda tail: b"\xdd\xff\xff\xff\xff" + tail)
    )
)
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    try:
        assert type(decode(data)) in {type(message) for message in MESSAGES}
    except WireError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        {"type": "Hello"},
        {"type": "Unknown"},
        {"type": "Done", "epoch": 3, "request_ids": []},
        {"type": "Done", "epoch": "e", "request_ids": [1]},
        {"type": "Confirmed", "epoch": "e", "digests": ["text"]},
    ],
)
def test_a_message_of_a_wrong_shape_is_refused(value: object) -> None:
    with pytest.raises(WireError):
        decode(msgspec.msgpack.encode(value))


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(WireError):
        decode(b"\x82\xa4type\xa4Done\xa5extra" + b"\x91" * 100_000)


def test_a_message_is_never_longer_than_its_frame_can_hold() -> None:
    overhead = len(encode(Refused(code="busy", reason=""))) + 4
    assert len(encode(Refused(code="busy", reason="x" * (MAX_MESSAGE_BYTES - overhead)))) <= MAX_MESSAGE_BYTES
    with pytest.raises(WireError, match="the limit is"):
        encode(Refused(code="busy", reason="x" * MAX_MESSAGE_BYTES))
    with pytest.raises(WireError, match="the limit is"):
        decode(b"\xc0" * (MAX_MESSAGE_BYTES + 1))
    assert MAX_MESSAGE_BYTES < MAX_FRAME_BYTES
