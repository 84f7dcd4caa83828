"""One end of an authenticated connection, without I/O: bytes in, frames and bytes out.

Either end proves that it holds the key before the other reads a message:

    caller                                    listener
    MAGIC, nonce of the caller         ->
                                       <-     nonce of the listener, tag
    tag                                ->
    frames                            <->     frames

A frame is a length of 4 bytes, a tag of 32 and a payload. A tag is HMAC-SHA256 over who speaks, both nonces,
the number of the frame in its direction, and the payload: a frame that was changed, sent again, left out, put
in another order, turned back to its sender or taken from another connection is refused. The length is checked
before anything is kept. Contents are not secret on the way.
"""

import hmac

from kv.wire import MAX_FRAME_BYTES

MAGIC = b"jaxkv\x00\x00\x01"
NONCE_BYTES = 32
TAG_BYTES = 32
LENGTH_BYTES = 4
_HELLO_BYTES = len(MAGIC) + NONCE_BYTES
_CALLER, _LISTENER = b"caller  ", b"listener"
_PROOF = b"proof"
_FRAME = b"frame"


class FrameError(ValueError):
    """Bytes that are not ours: a stranger speaks, or somebody changed what a peer said."""


class Splitter:
    """Splits a stream of bytes into frames' contents. Holds at most one unfinished frame and one chunk."""

    def __init__(self) -> None:
        self._held = bytearray()

    @property
    def partial(self) -> bool:
        """A frame has begun and not ended."""
        return bool(self._held)

    def feed(self, data: bytes, *, most: int, count: int | None = None) -> list[bytes]:
        """Adds bytes; returns the frames that are whole now.

        Args:
            data: what was read.
            most: bytes of a frame, without its length.
            count: frames to return at most; what follows them waits for the next call. None: all.

        Raises:
            FrameError: a frame says that it is longer than `most`.
        """
        held = self._held
        held += data
        frames: list[bytes] = []
        at = 0
        while (count is None or len(frames) < count) and len(held) - at >= LENGTH_BYTES:
            length = int.from_bytes(held[at : at + LENGTH_BYTES])
            if length > most:
                raise FrameError(f"a frame of {length} bytes; the limit is {most}")
            end = at + LENGTH_BYTES + length
            if len(held) < end:
                break
            frames.append(bytes(held[at + LENGTH_BYTES : end]))
            at = end
        del held[:at]
        return frames


class End:
    """The caller's or the listener's end of one connection.

    After a `FrameError` the end is of no use any more.
    """

    def __init__(self, *, key: bytes, nonce: bytes, caller: bool) -> None:
        """Args: nonce: NONCE_BYTES that were never used before and that nobody can guess."""
        if len(nonce) != NONCE_BYTES:
            raise ValueError(f"a nonce has {NONCE_BYTES} bytes, got {len(nonce)}")
        self._key = key
        self._nonce = nonce
        self._nonces = b""
        self._us, self._them = (_CALLER, _LISTENER) if caller else (_LISTENER, _CALLER)
        self._sent = self._received = 0
        self._splitter = Splitter()
        self._proven = False

    @property
    def ready(self) -> bool:
        """The other end holds the key."""
        return self._proven

    @property
    def partial(self) -> bool:
        """A frame has begun and not ended."""
        return self._splitter.partial

    def opening(self) -> bytes:
        """What to send first."""
        return _length(MAGIC + self._nonce) if self._us == _CALLER else b""

    def feed(self, data: bytes) -> tuple[bytes, list[bytes]]:
        """Takes bytes that were read.

        Returns:
            (bytes to send, payloads that came).

        Raises:
            FrameError: not from a peer that holds our key, or not as it sent them.
        """
        reply = b""
        while not self._proven:
            frames = self._splitter.feed(data, most=_HELLO_BYTES + TAG_BYTES, count=1)
            data = b""
            if not frames:
                return reply, []
            reply += self._greet(frames[0])
        frames = self._splitter.feed(data, most=MAX_FRAME_BYTES)
        return reply, [self._open(frame) for frame in frames]

    def wrap(self, payload: bytes) -> bytes:
        """A payload as the next frame to send.

        Raises:
            FrameError: too long, or the other end has not proven that it holds the key.
        """
        if not self._proven:
            raise FrameError("no frame before the other end has proven that it holds the key")
        if len(payload) > MAX_FRAME_BYTES - TAG_BYTES:
            raise FrameError(f"a payload of {len(payload)} bytes does not fit into a frame")
        tag = self._tag(_FRAME, self._us, self._sent, payload)
        self._sent += 1
        return _length(tag + payload)

    def _greet(self, frame: bytes) -> bytes:
        """One step of the greeting; returns what to send."""
        if self._us == _LISTENER and not self._nonces:
            if len(frame) != _HELLO_BYTES or not frame.startswith(MAGIC):
                raise FrameError("no greeting of ours")
            self._nonces = frame[len(MAGIC) :] + self._nonce
            return _length(self._nonce + self._tag(_PROOF, self._us, 0, b""))
        if self._us == _CALLER:
            if len(frame) != NONCE_BYTES + TAG_BYTES:
                raise FrameError("no greeting of ours")
            self._nonces = self._nonce + frame[:NONCE_BYTES]
            frame = frame[NONCE_BYTES:]
        if not hmac.compare_digest(frame, self._tag(_PROOF, self._them, 0, b"")):
            raise FrameError("the other end does not hold our key")
        self._proven = True
        return _length(self._tag(_PROOF, self._us, 0, b"")) if self._us == _CALLER else b""

    def _open(self, frame: bytes) -> bytes:
        payload = frame[TAG_BYTES:]
        if not hmac.compare_digest(frame[:TAG_BYTES], self._tag(_FRAME, self._them, self._received, payload)):
            raise FrameError("a frame was changed, repeated or left out")
        self._received += 1
        return payload

    def _tag(self, purpose: bytes, speaker: bytes, number: int, payload: bytes) -> bytes:
        # All parts before the payload have fixed lengths, so that no two inputs read the same.
        head = purpose + speaker + self._nonces + number.to_bytes(8)
        return hmac.digest(self._key, head + payload, "sha256")


def _length(content: bytes) -> bytes:
    return len(content).to_bytes(LENGTH_BYTES) + content
