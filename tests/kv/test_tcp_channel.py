"""The side channel over real sockets: honest calls are answered, whatever strangers do beside them."""

import contextlib
import fcntl
import os
import resource
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

import kv.tcp_channel
import kv.tcp_connection
from kv.channel import Channel, ChannelError
from kv.frames import MAGIC, End
from kv.tcp_channel import MAX_IN_FLIGHT, MAX_LINKS, MAX_PEERS, MAX_STRANGERS, TcpChannel
from kv.wire import (
    MAX_MESSAGE_BYTES,
    Confirmed,
    Done,
    DoneAnswer,
    Heartbeat,
    HeartbeatAnswer,
    Message,
    Refused,
    encode,
)

KEY = b"side channel key" * 2
ASK = Done(epoch="e" * 32, request_ids=("a",))
YES = DoneAnswer(epoch="f" * 32)
PATIENCE_S = 20.0


class Node:
    """A channel and a wait for what comes through it."""

    def __init__(self, key: bytes = KEY, news: threading.Event | None = None) -> None:
        self._news = news or threading.Event()
        self.channel = TcpChannel("127.0.0.1", 0, key=key, wake=self._news.set, engine_id="test")
        self.port = self.channel.port
        self._asked: list[tuple[int, Message]] = []
        self._answers: dict[int, Message | ChannelError] = {}

    def _wait(self, done: Callable[[], bool]) -> None:
        until_s = time.monotonic() + PATIENCE_S
        while not done():
            assert self._news.wait(until_s - time.monotonic()), "nothing came"
            self._news.clear()
            self._asked += self.channel.asked()
            for number, answer in self.channel.answers():
                assert number not in self._answers, "an answer comes once"
                self._answers[number] = answer

    def call(
        self, port: int, message: Message = ASK, *, host: str = "127.0.0.1", timeout_s: float = 10.0
    ) -> int:
        return self.channel.call(host, port, message, timeout_s=timeout_s)

    def answer_to(self, number: int) -> Message | ChannelError:
        self._wait(lambda: number in self._answers)
        return self._answers.pop(number)

    def next_asked(self) -> tuple[int, Message]:
        self._wait(lambda: bool(self._asked))
        return self._asked.pop(0)


@pytest.fixture
def make_node(caplog: pytest.LogCaptureFixture) -> Generator[Callable[..., Node]]:
    nodes: list[Node] = []

    def make(key: bytes = KEY, news: threading.Event | None = None) -> Node:
        nodes.append(Node(key, news))
        return nodes[-1]

    yield make
    for node in nodes:
        node.channel.close()
    assert not caplog.records, "neither strangers nor the end of a channel are worth a line"


@pytest.fixture
def p(make_node: Callable[..., Node]) -> Node:
    return make_node()


@pytest.fixture
def d(make_node: Callable[..., Node]) -> Node:
    return make_node()


def stranger(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
    # The listener's cut must be seen as it comes.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def closed_after_s(connection: socket.socket) -> float:
    """Seconds until the other end closes; what it says before is dropped."""
    began_s = time.monotonic()
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return time.monotonic() - began_s


def assert_honest_call(d: Node, p: Node) -> float:
    """A call goes there and back; returns its seconds."""
    began_s = time.monotonic()
    call = d.call(p.port)
    number, message = p.next_asked()
    assert message == ASK
    p.channel.answer(number, YES)
    assert d.answer_to(call) == YES
    return time.monotonic() - began_s


def greeted(port: int, key: bytes = KEY) -> tuple[socket.socket, End]:
    """A peer of ours that a test drives by hand."""
    connection = stranger(port)
    end = End(key=key, nonce=os.urandom(32), caller=True)
    connection.sendall(end.opening())
    while not end.ready:
        reply, _ = end.feed(connection.recv(1 << 16))
        connection.sendall(reply)
    return connection, end


def welcomed(listener: socket.socket, count: int = 1) -> tuple[socket.socket, End, list[bytes]]:
    """A listener of ours that a test drives by hand: greets a caller and hears `count` messages."""
    connection, _ = listener.accept()
    end = End(key=KEY, nonce=os.urandom(32), caller=False)
    got: list[bytes] = []
    while len(got) < count:
        reply, more = end.feed(connection.recv(1 << 16))
        connection.sendall(reply)
        got += more
    return connection, end, got


def test_it_is_a_channel(p: Node) -> None:
    channel: Channel = p.channel
    assert (channel.asked(), channel.answers()) == ([], [])


def test_calls_are_answered_in_any_order_on_one_connection(p: Node, d: Node) -> None:
    calls = {
        d.call(p.port, Heartbeat(epoch="e", request_ids=(str(i),))): str(i) for i in range(3 * MAX_IN_FLIGHT)
    }
    held: list[tuple[int, str]] = []
    for _ in calls:
        number, message = p.next_asked()
        assert isinstance(message, Heartbeat)
        held.insert(0, (number, message.request_ids[0]))
        if len(held) == MAX_IN_FLIGHT:
            for number, name in held:
                p.channel.answer(number, HeartbeatAnswer(epoch="f", gone=(name,)))
            held.clear()
    assert not held
    for call, name in calls.items():
        assert d.answer_to(call) == HeartbeatAnswer(epoch="f", gone=(name,))
    assert len(p.channel._guests) == 1


def test_two_engines_call_each_other(p: Node, d: Node) -> None:
    assert_honest_call(d, p)
    assert_honest_call(p, d)
    assert_honest_call(p, p)


def test_the_longest_messages_go_both_ways(p: Node, d: Node) -> None:
    ask = Done(epoch="e", request_ids=("x" * (MAX_MESSAGE_BYTES - 100),))
    call = d.call(p.port, ask)
    number, message = p.next_asked()
    assert message == ask
    answer = Confirmed(epoch="e", digests=((b"y" * (MAX_MESSAGE_BYTES - 100),),))
    p.channel.answer(number, answer)
    assert d.answer_to(call) == answer


def test_messages_that_are_too_long_are_answered_and_not_sent(p: Node, d: Node) -> None:
    long = "x" * MAX_MESSAGE_BYTES
    assert "the limit is" in str(d.answer_to(d.call(p.port, Done(epoch=long, request_ids=()))))
    call = d.call(p.port)
    p.channel.answer(p.next_asked()[0], Refused(code="lease", reason=long))
    answer = d.answer_to(call)
    assert isinstance(answer, Refused) and answer.code == "malformed"


def test_a_key_that_differs_is_said_on_the_callers_side(p: Node, make_node: Callable[..., Node]) -> None:
    other = make_node(key=b"another key of ours!")
    answer = other.answer_to(other.call(p.port))
    assert isinstance(answer, ChannelError) and "does not hold our key" in str(answer)
    assert p.channel.asked() == []


def test_nobody_listens(d: Node, free_port: Callable[[], int]) -> None:
    port = free_port()
    answer = d.answer_to(d.call(port))
    assert isinstance(answer, ChannelError) and f"127.0.0.1:{port}" in str(answer)


@pytest.mark.parametrize("host", ["", "no..host", "x" * 300, "a\0b", "256.256.256.256"])
def test_what_is_no_host_is_an_error_and_no_more(host: str, p: Node, d: Node) -> None:
    assert isinstance(d.answer_to(d.call(1, host=host)), ChannelError)
    assert_honest_call(d, p)


def test_an_answer_that_does_not_come_is_an_error_in_time(p: Node, d: Node) -> None:
    began_s = time.monotonic()
    late = d.call(p.port, timeout_s=0.2)
    number, _ = p.next_asked()
    answer = d.answer_to(late)
    assert isinstance(answer, ChannelError) and "no answer within 0.2 s" in str(answer)
    assert 0.2 <= time.monotonic() - began_s < 3
    p.channel.answer(number, YES)  # Too late: dropped, and nothing breaks.
    assert_honest_call(d, p)


def test_a_listener_that_says_nothing_is_an_error_in_time(d: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        call = d.call(silent.getsockname()[1], timeout_s=0.2)
        assert isinstance(d.answer_to(call), ChannelError)


def test_a_listener_that_says_nonsense_is_an_error_at_once(d: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        call = d.call(server.getsockname()[1])
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            answer = d.answer_to(call)
    assert isinstance(answer, ChannelError) and "limit" in str(answer)


def test_a_peer_that_closes_fails_its_calls_at_once_and_may_come_back(
    p: Node, d: Node, make_node: Callable[..., Node]
) -> None:
    calls = [d.call(p.port, timeout_s=60) for _ in range(3)]
    for _ in calls:
        p.next_asked()
    p.channel.close()
    began_s = time.monotonic()
    assert all(isinstance(d.answer_to(call), ChannelError) for call in calls)
    assert time.monotonic() - began_s < 3
    again = TcpChannel("127.0.0.1", p.port, key=KEY, wake=p._news.set)
    p.channel = again
    assert_honest_call(d, p)


def test_closing_answers_what_is_under_way_and_frees_the_port(p: Node, d: Node) -> None:
    call = d.call(p.port, timeout_s=60)
    p.next_asked()
    d.channel.close()
    d.channel.close()
    assert isinstance(d.answer_to(call), ChannelError)
    assert isinstance(d.answer_to(d.call(p.port)), ChannelError)
    d.channel.answer(1, YES)
    with socket.create_server(("127.0.0.1", d.port)):
        pass


def listening() -> int:
    """Sockets of this process that listen."""
    tables = [Path(f"/proc/self/net/{name}") for name in ("tcp", "tcp6")]
    rows = [row.split() for table in tables if table.exists() for row in table.read_text().splitlines()]
    ours = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # The listing's own descriptor is gone already.
            ours.add(os.readlink(f"/proc/self/fd/{name}"))
    return sum(row[3] == "0A" and f"socket:[{row[9]}]" in ours for row in rows)


def test_one_that_only_calls_listens_on_nothing(p: Node, d: Node) -> None:
    both = listening()
    d.channel.close()
    assert listening() == both - 1
    d.channel = TcpChannel("127.0.0.1", None, key=KEY, wake=d._news.set)
    assert d.channel.port == 0
    assert_honest_call(d, p)
    assert listening() == both - 1


def test_a_port_in_use_is_one_clear_line(p: Node) -> None:
    with pytest.raises(ChannelError, match=f"cannot listen on 127.0.0.1:{p.port}"):
        TcpChannel("127.0.0.1", p.port, key=KEY, wake=lambda: None)


@pytest.mark.parametrize("host", ["localhost", "::1"])
def test_other_ways_to_name_this_machine(host: str, d: Node) -> None:
    if host == "::1" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    channel = TcpChannel(host, 0, key=KEY, wake=d._news.set)
    try:
        call = d.call(channel.port, host=host)
        d._wait(lambda: bool(channel._asked))
        channel.answer(channel.asked()[0][0], YES)
        assert d.answer_to(call) == YES
    finally:
        channel.close()


@pytest.mark.parametrize(
    "says",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        bytes.fromhex("1603010200010001fc0303") + b"\x00" * 200,
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"NIXLCOMM:SEND",
        struct.pack(">I", (1 << 30) - 1),
        struct.pack("<Q", (1 << 30) - 1),
        b"\x00" * 4096,
        struct.pack(">I", 40) + b"jaxkv\x00\x00\x02" + b"\x00" * 32,
        struct.pack(">I", 40) + MAGIC + b"\x00" * 32 + struct.pack(">I", 32) + b"\x00" * 32,
    ],
    ids=["http", "tls", "ssh", "nixl", "gibibyte", "gibibyte-le", "zeros", "version", "forged"],
)
def test_a_stranger_is_closed_within_a_second(says: bytes, p: Node, d: Node) -> None:
    with stranger(p.port) as connection:
        connection.sendall(says)
        assert closed_after_s(connection) < 1
    assert_honest_call(d, p)
    assert p.channel.asked() == []


def test_twenty_scanners_with_random_bytes_change_nothing(p: Node, d: Node) -> None:
    for _ in range(20):
        with stranger(p.port) as connection:
            try:
                connection.sendall(b"\xff" + os.urandom(4095))
            except ConnectionError:
                continue
            assert closed_after_s(connection) < 1
    assert_honest_call(d, p)


def test_three_bytes_and_silence_hold_up_nobody_and_end(
    p: Node, d: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv.tcp_connection, "DEADLINE_S", 0.5)
    silent = [stranger(p.port) for _ in range(4)]
    for connection in silent:
        connection.sendall(b"\x00\x00\x00")
    assert assert_honest_call(d, p) < 0.4
    for connection in silent:
        with connection:
            assert closed_after_s(connection) < 2


def test_a_stranger_that_drips_is_cut_at_the_deadline(
    p: Node, d: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv.tcp_connection, "DEADLINE_S", 0.3)
    began_s = time.monotonic()
    with stranger(p.port) as connection:
        connection.settimeout(0.02)
        for byte in struct.pack(">I", 40) + MAGIC + b"\x00" * 32:
            try:
                connection.sendall(bytes((byte,)))
                if connection.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("it was never cut")
    assert time.monotonic() - began_s < 3
    assert_honest_call(d, p)


def test_a_peer_that_drips_a_frame_is_cut_at_the_deadline(
    p: Node, d: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, end = greeted(p.port)
    monkeypatch.setattr(kv.tcp_connection, "DEADLINE_S", 0.3)
    with connection:
        connection.sendall(end.wrap(b"x" * 100)[:-1])
        assert closed_after_s(connection) < 2
    assert_honest_call(d, p)


def test_a_declared_gibibyte_takes_no_memory(p: Node, d: Node) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    connection, end = greeted(p.port)
    with connection:
        connection.sendall(struct.pack(">I", (1 << 30) - 1) + b"\x00" * 64)
        assert closed_after_s(connection) < 1
    assert end.ready
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    assert_honest_call(d, p)


def test_more_strangers_than_room_push_out_each_other_and_no_peer(p: Node, d: Node) -> None:
    assert_honest_call(d, p)
    crowd = [stranger(p.port) for _ in range(MAX_STRANGERS + 20)]
    with stranger(p.port):
        for connection in crowd[:20]:
            assert closed_after_s(connection) < 3
    assert len(p.channel._guests) <= MAX_STRANGERS + 1
    link = next(iter(d.channel._links.values()))
    assert_honest_call(d, p)
    assert next(iter(d.channel._links.values())) is link, "the peer's connection stayed"
    for connection in crowd:
        connection.close()


def test_more_peers_than_room_push_out_the_one_that_was_silent_longest(p: Node) -> None:
    peers = [greeted(p.port) for _ in range(MAX_PEERS)]
    newest, end = greeted(p.port)
    with newest:
        assert closed_after_s(peers[0][0]) < 3
        newest.sendall(end.wrap(b"\x00" * 8 + b"\xc0"))
        _, payloads = end.feed(newest.recv(1 << 16))
        assert payloads[0][:8] == b"\x00" * 8, "an authentic message that means nothing is refused politely"
    for connection, _ in peers:
        connection.close()


def test_a_peer_that_reads_nothing_is_cut_and_others_are_served(
    p: Node, d: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, end = greeted(p.port)
    monkeypatch.setattr(kv.tcp_connection, "DEADLINE_S", 0.5)
    big = Confirmed(epoch="e", digests=((b"y" * (MAX_MESSAGE_BYTES - 100),),))
    ask = encode(ASK)
    with connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for number in range(40):
            connection.sendall(end.wrap(number.to_bytes(8) + ask))
        for _ in range(40):
            p.channel.answer(p.next_asked()[0], big)
        guest = next(iter(p.channel._guests))
        assert assert_honest_call(d, p) < 3
        until_s = time.monotonic() + PATIENCE_S
        while guest in p.channel._guests:
            assert time.monotonic() < until_s, "the slow peer is still there"
            assert_honest_call(d, p)


def test_a_repeated_frame_cuts_the_connection(p: Node, d: Node) -> None:
    connection, end = greeted(p.port)
    with connection:
        frame = end.wrap(b"\x00" * 8 + encode(ASK))
        connection.sendall(frame + frame)
        assert closed_after_s(connection) < 1
    assert_honest_call(d, p)


def spoil(listener: socket.socket, port: int, *, way: int, at: int, cut: bool) -> None:
    """Carries one connection on, with one bit flipped in one direction, or with nothing from there on."""
    ends = (listener.accept()[0], stranger(port))
    passed = [0, 0]
    with ends[0], ends[1]:
        while True:
            for ready in select.select(ends, [], [], PATIENCE_S)[0]:
                side = ends.index(ready)
                try:
                    chunk = bytearray(ready.recv(1 << 16))
                except ConnectionError:
                    return
                if not chunk:
                    return
                here = at - passed[side]
                passed[side] += len(chunk)
                if side == way and 0 <= here < len(chunk):
                    chunk[here] ^= 1
                    chunk = chunk[:here] if cut else chunk
                if not (side == way and cut and here < 0):
                    ends[1 - side].sendall(chunk)


FAR = 10**6
"""Of a stream that ends before it."""


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("at", [0, 7, 43, 50, 66, 82, 110, 125, FAR])
@pytest.mark.parametrize("way", [0, 1])
def test_a_spoiled_stream_is_an_error_and_never_another_message(
    way: int, at: int, cut: bool, make_node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv.tcp_connection, "DEADLINE_S", 0.1)
    news = threading.Event()
    p, d = make_node(news=news), make_node(news=news)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        spoiler = threading.Thread(
            target=spoil, args=(listener, p.port), kwargs={"way": way, "at": at, "cut": cut}
        )
        spoiler.start()
        call = d.call(listener.getsockname()[1], timeout_s=10 if at == FAR else 0.3)
        answers: dict[int, Message | ChannelError] = {}
        asked = 0
        while call not in answers:
            assert news.wait(PATIENCE_S)
            news.clear()
            for number, message in p.channel.asked():
                assert message == ASK
                asked += 1
                p.channel.answer(number, YES)
            answers.update(d.channel.answers())
        d.channel.close()
        spoiler.join()
    if at == FAR:
        assert answers[call] == YES and asked == 1
    else:
        assert isinstance(answers[call], ChannelError)
        assert asked == (1 if way == 1 and at > 68 else 0), "what was spoiled was not heard"


def test_an_answer_to_nothing_cuts_the_connection(d: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        call = d.call(server.getsockname()[1])
        connection, end, _ = welcomed(server)
        with connection:
            connection.sendall(end.wrap((10**6).to_bytes(8) + encode(YES)))
            answer = d.answer_to(call)
    assert isinstance(answer, ChannelError) and "nothing that was asked" in str(answer)


def test_a_dead_machine_is_left_and_a_new_connection_made(d: Node) -> None:
    """It took the call and never spoke again: the next call must not go the same way."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        call = d.call(server.getsockname()[1], timeout_s=0.3)
        first, _, _ = welcomed(server)
        with first:
            assert isinstance(d.answer_to(call), ChannelError)
            assert closed_after_s(first) < 1
        d.call(server.getsockname()[1], timeout_s=5)
        second, _ = server.accept()
        second.close()


def test_a_call_that_was_not_sent_yet_goes_to_the_next_connection(d: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        calls = [d.call(server.getsockname()[1]) for _ in range(MAX_IN_FLIGHT + 1)]
        first, _, _ = welcomed(server, MAX_IN_FLIGHT)
        first.close()
        for call in calls[:-1]:
            assert isinstance(d.answer_to(call), ChannelError), "it was sent: nobody knows what became of it"
        second, end, (payload,) = welcomed(server)
        with second:
            second.sendall(end.wrap(payload[:8] + encode(YES)))
            assert d.answer_to(calls[-1]) == YES


def test_connections_that_nobody_uses_are_dropped(p: Node, d: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv.tcp_channel, "IDLE_S", 0.2)
    assert_honest_call(d, p)
    until_s = time.monotonic() + PATIENCE_S
    while d.channel._links or p.channel._guests:
        assert time.monotonic() < until_s, "the connection is still there"
        time.sleep(0.01)
    assert_honest_call(d, p)


def test_links_are_bounded_and_unused_ones_make_room(d: Node) -> None:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(MAX_LINKS + 1)]
    calls = [d.call(server.getsockname()[1], timeout_s=3) for server in servers]
    answer = d.answer_to(calls[-1])
    assert isinstance(answer, ChannelError) and "in use" in str(answer)
    for server in servers:
        server.close()
    for call in calls[:-1]:
        assert isinstance(d.answer_to(call), ChannelError)


def test_an_idle_channel_sleeps(p: Node, d: Node) -> None:
    """No polling: the kernel is not asked to switch to the thread while nothing happens."""
    assert_honest_call(d, p)

    def switches() -> list[str]:
        status = [
            Path(f"/proc/self/task/{node.channel._thread.native_id}/status").read_text() for node in (p, d)
        ]
        return [line for text in status for line in text.splitlines() if "ctxt_switches" in line]

    until_s = time.monotonic() + PATIENCE_S
    while True:
        before = switches()
        time.sleep(0.5)
        if switches() == before:
            return
        assert time.monotonic() < until_s, "the thread wakes up again and again"


def test_no_child_inherits_the_sockets(p: Node, d: Node) -> None:
    call = d.call(p.port)
    number, _ = p.next_asked()
    sockets = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                sockets.append((name, fcntl.fcntl(int(name), fcntl.F_GETFD) & fcntl.FD_CLOEXEC))
        except FileNotFoundError:
            continue
    assert len(sockets) >= 4 and all(flag for _, flag in sockets)
    p.channel.answer(number, YES)
    assert d.answer_to(call) == YES
