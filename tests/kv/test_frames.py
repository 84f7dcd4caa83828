"""Both ends of a connection, without sockets: any cut, any fault, any stranger."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.frames import MAGIC, NONCE_BYTES, TAG_BYTES, End, FrameError, Splitter
from kv.wire import MAX_FRAME_BYTES

KEY = b"k" * 32
payloads = st.lists(st.binary(max_size=200), max_size=6)


def ends(caller_key: bytes = KEY, listener_key: bytes = KEY, salt: int = 0) -> tuple[End, End]:
    return (
        End(key=caller_key, nonce=bytes([salt, 1]) * 16, caller=True),
        End(key=listener_key, nonce=bytes([salt, 2]) * 16, caller=False),
    )


def greeted(salt: int = 0) -> tuple[End, End]:
    caller, listener = ends(salt=salt)
    proof, _ = listener.feed(caller.opening())
    proof, _ = caller.feed(proof)
    assert listener.feed(proof) == (b"", [])
    assert caller.ready and listener.ready
    return caller, listener


def in_chunks(end: End, data: bytes, cuts: list[int]) -> tuple[bytes, list[bytes]]:
    replies, got = b"", []
    at = 0
    for cut in [*sorted(cuts), len(data)]:
        reply, more = end.feed(data[at : max(at, cut)])
        replies, got, at = replies + reply, got + more, max(at, cut)
    return replies, got


@given(payloads, payloads, st.lists(st.integers(0, 900), max_size=9))
def test_what_is_sent_comes_however_the_stream_is_cut(
    there: list[bytes], back: list[bytes], cuts: list[int]
) -> None:
    caller, listener = ends()
    hello, _ = in_chunks(listener, caller.opening(), cuts)
    proof, _ = in_chunks(caller, hello, cuts)
    stream = proof + b"".join(map(caller.wrap, there))
    assert in_chunks(listener, stream, cuts) == (b"", there)
    assert in_chunks(caller, b"".join(map(listener.wrap, back)), cuts) == (b"", back)
    assert not caller.partial and not listener.partial


@given(st.lists(st.binary(min_size=1, max_size=100), min_size=1, max_size=4), st.data())
def test_a_flipped_bit_is_never_taken_for_what_was_sent(sent: list[bytes], data: st.DataObject) -> None:
    caller, listener = greeted()
    stream = bytearray(b"".join(map(caller.wrap, sent)))
    at = data.draw(st.integers(0, len(stream) * 8 - 1))
    stream[at // 8] ^= 1 << at % 8
    got: list[bytes] = []
    try:
        for position in range(len(stream)):
            got += listener.feed(bytes(stream[position : position + 1]))[1]
        assert listener.partial, "a longer length waits for what never comes, until its deadline"
    except FrameError:
        pass
    assert got == sent[: len(got)] and len(got) < len(sent)


@pytest.mark.parametrize("step", ["hello", "answer", "proof"])
@given(data=st.data())
def test_a_flipped_bit_in_the_greeting_makes_no_connection(step: str, data: st.DataObject) -> None:
    def flip(content: bytes, name: str) -> bytes:
        if name != step:
            return content
        at = data.draw(st.integers(0, len(content) * 8 - 1))
        changed = bytearray(content)
        changed[at // 8] ^= 1 << at % 8
        return bytes(changed)

    caller, listener = ends()
    try:
        answer, _ = listener.feed(flip(caller.opening(), "hello"))
        proof, _ = caller.feed(flip(answer, "answer"))
        listener.feed(flip(proof, "proof"))
    except FrameError:
        pass
    assert not (caller.ready and listener.ready)


def test_repeated_frames_left_out_frames_and_another_order_are_refused() -> None:
    for change in (lambda a, b: a + a, lambda a, b: b, lambda a, b: b + a):
        caller, listener = greeted()
        stream = change(caller.wrap(b"first"), caller.wrap(b"second"))
        with pytest.raises(FrameError, match="changed, repeated or left out"):
            listener.feed(stream)


def test_a_frame_turned_back_to_its_sender_is_refused() -> None:
    caller, _ = greeted()
    with pytest.raises(FrameError, match="changed"):
        caller.feed(caller.wrap(b"to the listener"))


def test_a_frame_of_another_connection_is_refused() -> None:
    first, _ = greeted(salt=0)
    _, listener = greeted(salt=1)
    with pytest.raises(FrameError, match="changed"):
        listener.feed(first.wrap(b"heard elsewhere"))


def test_a_whole_recorded_conversation_is_refused_the_second_time() -> None:
    caller, listener = ends()
    opening = caller.opening()
    answer, _ = listener.feed(opening)
    proof, _ = caller.feed(answer)
    assert listener.feed(proof + caller.wrap(b"pay"))[1] == [b"pay"]
    again = End(key=KEY, nonce=b"\x07" * 32, caller=False)
    again.feed(opening)
    with pytest.raises(FrameError, match="does not hold our key"):
        again.feed(proof)


def test_a_listener_that_is_handed_its_own_proof_is_not_fooled() -> None:
    """Reflection: the stranger has the listener's tag and sends it back as the caller's."""
    _, listener = ends()
    answer, _ = listener.feed((40).to_bytes(4) + MAGIC + b"\x01" * NONCE_BYTES)
    tag = answer[4 + NONCE_BYTES :]
    with pytest.raises(FrameError, match="does not hold our key"):
        listener.feed(len(tag).to_bytes(4) + tag)


@pytest.mark.parametrize("keys", [(KEY, b"x" * 32), (b"", KEY)])
def test_ends_with_two_keys_do_not_meet(keys: tuple[bytes, bytes]) -> None:
    caller, listener = ends(*keys)
    answer, _ = listener.feed(caller.opening())
    with pytest.raises(FrameError, match="does not hold our key"):
        caller.feed(answer)
    assert not caller.ready and not listener.ready


def test_nothing_is_said_to_one_who_has_not_proven_himself() -> None:
    caller, listener = ends()
    for end in (caller, listener):
        with pytest.raises(FrameError, match="before the other end"):
            end.wrap(b"secret")


@pytest.mark.parametrize(
    "stranger",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        bytes.fromhex("16030102000100"),
        b"SSH-2.0-OpenSSH_9.9\r\n",
        (2**30).to_bytes(4),
        b"\xff" * 4,
        b"\x00\x00\x00\x00" * 9,
        (40).to_bytes(4) + b"jaxkv\x00\x00\x02" + b"\x00" * 32,
        (39).to_bytes(4) + MAGIC + b"\x00" * 31,
    ],
)
def test_strangers_are_refused_at_once(stranger: bytes) -> None:
    _, listener = ends()
    with pytest.raises(FrameError):
        listener.feed(stranger)
    caller, _ = ends()
    with pytest.raises(FrameError):
        caller.feed(stranger)


@given(st.lists(st.binary(max_size=80), max_size=8), st.booleans(), st.booleans())
def test_no_bytes_of_a_stranger_are_a_payload(chunks: list[bytes], is_caller: bool, magic: bool) -> None:
    end = End(key=KEY, nonce=b"\x05" * 32, caller=is_caller)
    try:
        if magic:
            end.feed((40).to_bytes(4) + MAGIC + b"\x01" * NONCE_BYTES)
        for chunk in chunks:
            assert end.feed(chunk)[1] == []
    except FrameError:
        pass
    assert not end.ready


def test_before_the_proof_a_frame_is_short_and_afterwards_bounded() -> None:
    _, listener = ends()
    with pytest.raises(FrameError, match="a frame of 73 bytes"):
        listener.feed((40 + TAG_BYTES + 1).to_bytes(4))
    caller, listener = greeted()
    longest = b"x" * (MAX_FRAME_BYTES - TAG_BYTES)
    assert listener.feed(caller.wrap(longest)) == (b"", [longest])
    with pytest.raises(FrameError, match="does not fit"):
        caller.wrap(longest + b"x")
    with pytest.raises(FrameError, match="the limit is"):
        listener.feed((MAX_FRAME_BYTES + 1).to_bytes(4))


@given(st.lists(st.binary(max_size=50), max_size=8), st.lists(st.integers(0, 400), max_size=8))
def test_the_splitter_gives_back_what_was_joined(frames: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(len(frame).to_bytes(4) + frame for frame in frames)
    splitter, got, at = Splitter(), [], 0
    for cut in [*sorted(cuts), len(stream)]:
        got += splitter.feed(stream[at : max(at, cut)], most=50)
        at = max(at, cut)
    assert got == frames and not splitter.partial


def test_the_splitter_keeps_what_is_not_asked_for_yet() -> None:
    splitter = Splitter()
    assert splitter.feed(b"\x00\x00\x00\x01a\x00\x00\x00\x02bc", most=1, count=1) == [b"a"]
    assert splitter.partial and splitter.feed(b"", most=2) == [b"bc"]
    assert not splitter.partial


def test_a_nonce_has_its_length() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        End(key=KEY, nonce=b"short", caller=True)
