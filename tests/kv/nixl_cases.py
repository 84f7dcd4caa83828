"""The contract with NIXL: a script for each thing that it was measured to do, for the fake and the real one.

What was measured with processes under UCX on TCP, and is repeated here, has these numbers:

- M6: a source is killed in a read: an error at once, a part of the target is written.
- M7: a source is stopped in a read: it stays under way for ever.
- M8: what gives a read up (releasing it, forgetting the peer, deregistering the target) does not stop it; the
  source's death and the deletion of the reading agent do.
- M9: a source that is overwritten in a read: done, with a mix. M10: also if it was deregistered before.
- M11: a write that is given up goes on with what its source holds by then.

- M12: what strangers send to UCX's port does no harm; M1: nor is it answered, as NIXL's listener would.

The fake has no ports. M2 to M5 are of that listener too, which is never turned on; M13, that children inherit
the sockets, has nothing to do with transfers.
"""

import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.kv.nixl_play import PAGE, Play, Stage, descs, said

TCP, BOTH = ("tcp",), ("tcp", "all")
SMALL, TINY = 4096, 2048
LOST = "NIXL_ERR_REMOTE_DISCONNECT"
STRANGERS = (
    b"NIXLCOMM:SEND",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"\x00" * 4096,
    b"\xff" * 4096,
)
"""What may come from whoever reaches a port."""
Script = Callable[[Stage], list[object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Attributes:
    measured: the number that it repeats; "": none.
    says: what the script returns.
    transports: values of UCX_TLS with which the real agents say so. With all, the reader copies from the
        source's memory itself (CMA): a read is over when it is posted, and nothing can befall it.
    """

    measured: str
    script: Script
    says: list[object]
    transports: tuple[str, ...]


CASES: dict[str, Case] = {}


def case(measured: str, *says: object, transports: tuple[str, ...] = TCP) -> Callable[[Script], Script]:
    """Enters a script under its function's name."""

    def enter(script: Script) -> Script:
        CASES[script.__name__] = Case(
            measured=measured, script=script, says=list(says), transports=transports
        )
        return script

    return enter


# A source that dies, stops or changes in a read.


@case("M6", "PROC", LOST, LOST, [0, 1], LOST, True)
def source_killed_in_a_read(stage: Stage) -> list[object]:
    play = Play(stage, stage.source())
    handle = play.begin()
    before = play.state(handle)
    play.source.kill()
    said_so = [before, play.end(handle), play.state(handle), play.values()]
    said_so.append(play.run())
    play.free()
    return [*said_so, play.quiet()]


@case("M6", LOST, LOST, None, LOST, LOST)
def transfer_after_its_error(stage: Stage) -> list[object]:
    play = Play(stage, stage.source())
    handle, other = play.begin(), play.make()
    play.source.kill()
    play.end(handle)
    again = said(play.agent.transfer, handle)
    told = said(play.agent.get_xfer_telemetry, handle)
    released = said(play.agent.release_xfer_handle, handle)
    return [again, told, released, said(play.agent.transfer, other), play.run()]


@case("M7", ["PROC"], [0, 1], "DONE", [1])
def source_stopped_in_a_read(stage: Stage) -> list[object]:
    play = Play(stage, stage.source())
    handle = play.begin()
    play.source.stop()
    states, values = play.states(handle), play.values()
    play.source.go_on()
    return [states, values, play.end(handle), play.values()]


@case("M7", "PROC", ["PROC"], [0], "DONE", [1])
def source_stopped_before_a_read(stage: Stage) -> list[object]:
    play = Play(stage, stage.source())
    play.source.stop()
    handle = play.make()
    posted = said(play.agent.transfer, handle)
    states, values = play.states(handle), play.values()
    play.source.go_on()
    return [posted, states, values, play.end(handle), play.values()]


@case("M9", "DONE", [1, 2])
def source_overwritten_in_a_read(stage: Stage) -> list[object]:
    play = Play(stage, stage.source())
    handle = play.begin()
    play.source.fill(2)
    return [play.end(handle), play.values()]


@case("M10", "DONE", [1, 2])
def source_deregistered_and_overwritten_in_a_read(stage: Stage) -> list[object]:
    play = Play(stage, stage.source())
    handle = play.begin()
    play.source.deregister()
    play.source.fill(2)
    return [play.end(handle), play.values()]


@case("M10", "DONE", [2], "made", "DONE")
def source_deregistered_before_a_read(stage: Stage) -> list[object]:
    """What a reader has learned of the source's memory holds on."""
    play = Play(stage, stage.source())
    play.source.deregister()
    play.source.fill(2)
    done, values = play.run(), play.values()
    prepared = said(play.prepare)
    return [done, values, prepared, play.run()]


# A read that is given up.


def _given_up(play: Play, *ways: str) -> list[object]:
    handle = play.begin()
    play.source.stop()
    answers: list[object] = []
    if "release" in ways:
        answers.append(said(play.agent.release_xfer_handle, handle))
    if "forget" in ways:
        answers.append(said(play.agent.remove_remote_agent, "source"))
    if "deregister" in ways:
        answers.append(said(play.agent.deregister_memory, play.registered))
    play.free()
    return answers


@case("M8", None, True, 1)
def read_released(stage: Stage) -> list[object]:
    play = Play(stage, stage.source())
    answers = _given_up(play, "release")
    play.source.go_on()
    return [*answers, play.late(), int(play.target.max())]


@case("M8", None, True)
def peer_forgotten_in_a_read(stage: Stage) -> list[object]:
    play = Play(stage, stage.source())
    answers = _given_up(play, "forget")
    play.source.go_on()
    return [*answers, play.late()]


@case("M8", None, True)
def target_deregistered_in_a_read(stage: Stage) -> list[object]:
    play = Play(stage, stage.source())
    answers = _given_up(play, "deregister")
    play.source.go_on()
    return [*answers, play.late()]


@case("M8", None, None, None, True, 2)
def read_released_peer_forgotten_and_target_deregistered(stage: Stage) -> list[object]:
    """What comes late is what the source holds by then."""
    play = Play(stage, stage.source())
    answers = _given_up(play, "release", "forget", "deregister")
    play.source.go_on()
    play.source.fill(2)
    return [*answers, play.late(), int(play.target.max())]


@case("M8", None, True)
def read_released_and_source_killed(stage: Stage) -> list[object]:
    play = Play(stage, stage.source())
    answers = _given_up(play, "release")
    play.source.kill()
    return [*answers, play.quiet()]


@case("M8", None, True)
def read_released_and_agent_deleted(stage: Stage) -> list[object]:
    play = Play(stage, stage.source())
    answers = _given_up(play, "release")
    play.delete()
    play.source.go_on()
    return [*answers, play.quiet()]


@case("M8", True)
def agent_deleted_in_a_read(stage: Stage) -> list[object]:
    play = Play(stage, stage.source())
    _given_up(play)
    play.delete()
    play.source.go_on()
    return [play.quiet()]


@case("M11", [1, 5], ["PROC"], None, True)
def write_given_up(stage: Stage) -> list[object]:
    """So its source may not be reused either."""
    play = Play(stage, stage.source())
    play.target[:] = 5
    handle = play.make(operation="WRITE")
    play.agent.transfer(handle)
    play.until(lambda: 5 in play.source.values())
    landed = play.source.values()
    play.source.stop()
    states = play.states(handle)
    released = said(play.agent.release_xfer_handle, handle)
    play.target[:] = 6
    play.source.go_on()
    play.until(lambda: 6 in play.source.values())
    return [landed, states, released, True]


@case("", True, transports=BOTH)
def post_that_fails_after_a_part(stage: Stage) -> list[object]:
    """It raises, and what it has asked for is written later all the same."""
    play = Play(stage, stage.source(), page_bytes=TINY)
    play.run([0], [0])
    handle = play.make()
    play.source.stop()
    stage.starve(lambda: play.agent.transfer(handle))
    said(play.agent.release_xfer_handle, handle)
    play.free()
    play.source.go_on()
    return [play.late()]


# A peer that is not what it was.


@case("M6", LOST, LOST, [0])
def source_dead_before_the_first_read(stage: Stage) -> list[object]:
    play = Play(stage, stage.source())
    play.source.kill()
    return [play.run(), play.run(), play.values()]


@case("M6", "DONE", LOST, LOST, [0], transports=BOTH)
def source_dead_after_a_read(stage: Stage) -> list[object]:
    play = Play(stage, stage.source())
    done = play.run([0], [0])
    play.free()
    play.source.kill()
    return [done, play.run(), play.run(), play.values()]


@case("", "DONE", LOST, LOST, [0])
def agent_of_the_source_deleted_before_a_read(stage: Stage) -> list[object]:
    play = Play(stage, stage.source())
    done = play.run([0], [0])
    play.free()
    play.source.delete()
    return [done, play.run(), play.run(), play.values()]


@case(
    "",
    ["DONE", LOST, "NIXL_ERR_NOT_ALLOWED", LOST],
    [None, "NIXL_ERR_NOT_FOUND", "source", "DONE", [7]],
    transports=BOTH,
)
def source_restarted_at_its_address(stage: Stage) -> list[object]:
    """Another life under the same name must be met anew, after the old one has been forgotten."""
    play = Play(stage, stage.source())
    before = [play.run([0], [0])]
    play.source.kill()
    play.source = stage.source(value=7)
    before.append(play.run())
    before.append(said(play.agent.add_remote_agent, play.source.metadata))
    before.append(play.run())
    after = [said(play.agent.remove_remote_agent, "source"), said(play.make)]
    after.append(said(play.agent.add_remote_agent, play.source.metadata))
    play.there = play.prepare()
    return [before, [*after, play.run(), play.values()]]


@case("", "NIXL_ERR_NOT_ALLOWED", "DONE", [1], "NIXL_ERR_NOT_FOUND")
def two_sources_of_one_name(stage: Stage) -> list[object]:
    """The first one stays the one that is meant."""
    play = Play(stage, stage.source())
    second = stage.source(value=7)
    refused = said(play.agent.add_remote_agent, second.metadata)
    done, values = play.run(), play.values()
    play.source = second
    return [refused, done, values, said(play.prepare)]


@case("", None, None, "NIXL_ERR_NOT_FOUND", "DONE", "source", "NIXL_ERR_NOT_FOUND", "DONE")
def peer_forgotten_between_reads(stage: Stage) -> list[object]:
    play = Play(stage, stage.source())
    done, made = play.make(), play.make()
    play.end(done, said(play.agent.transfer, done))
    forgotten = [said(play.agent.remove_remote_agent, name) for name in ("source", "nobody")]
    posted = said(play.agent.transfer, made)
    state = play.state(done)
    met = said(play.agent.add_remote_agent, play.source.metadata)
    still = said(play.agent.transfer, made)
    play.there = play.prepare()
    return [*forgotten, posted, state, met, still, play.run()]


# What is read.


@case("", "NIXL_ERR_INVALID_PARAM", "DONE", [0, 1], "DONE", [1], transports=BOTH)
def none_one_and_many_descriptors(stage: Stage) -> list[object]:
    play = Play(stage, stage.source(), page_bytes=SMALL)
    none = said(play.make, [], [])
    one, values = play.run([3], [5]), play.values()
    return [none, one, values, play.run(), play.values()]


@case("", "DONE", [True, True], "DONE", True, transports=BOTH)
def pages_named_twice(stage: Stage) -> list[object]:
    """Targets that overlap hold one of what they were to hold, and nobody says so."""
    play = Play(stage, stage.source(), page_bytes=PAGE)
    same_source = play.run([0, 1], [4, 4])
    filled = [bool((play.target[page] == 1).all()) for page in (0, 1)]
    return [same_source, filled, play.run([2, 2], [6, 9]), bool((play.target[2] == 1).all())]


@case("", "DONE", "DONE", "PROC", "NIXL_ERR_REPOST_ACTIVE", "PROC", None, None)
def transfer_posted_again_and_released_twice(stage: Stage) -> list[object]:
    play = Play(stage, stage.source())
    handle = play.make()
    done = [play.end(handle, said(play.agent.transfer, handle)) for _ in range(2)]
    play.source.stop()
    posted, again = said(play.agent.transfer, handle), said(play.agent.transfer, handle)
    state = play.state(handle)
    released = [said(play.agent.release_xfer_handle, handle) for _ in range(2)]
    return [*done, posted, again, state, *released]


@case("M9", "DONE", "DONE", False, transports=("all",))
def page_that_could_not_be_read(stage: Stage) -> list[object]:
    """Of a transfer's reads only the last one's end is looked at."""
    play = Play(stage, stage.source())
    warm = play.run([0], [0])
    play.free()
    play.source.lose(4)
    return [warm, play.run([0, 1], [4, 9]), bool(play.target[0].any())]


@case(
    "",
    ["NIXL_ERR_NOT_FOUND"] * 2,
    ["NIXL_ERR_INVALID_PARAM"] * 5,
    ["NIXL_ERR_MISMATCH", "NIXL_ERR_MISMATCH", "NIXL_ERR_INVALID_PARAM", "source"],
    "DONE",
    [None, "NIXL_ERR_NOT_FOUND"],
)
def what_is_refused(stage: Stage) -> list[object]:
    play = Play(stage, stage.source())
    agent, ours, theirs = play.agent, descs(play.target.ctypes.data), descs(play.source.address)
    lists = [
        said(agent.prep_xfer_dlist, name, agent.get_xfer_descs(rows, "DRAM"))
        for name, rows in (("source", ours), ("nobody", theirs))
    ]
    double = agent.prep_xfer_dlist(
        "NIXL_INIT_AGENT", agent.get_xfer_descs(np.array([[ours[0][0], 2 * PAGE, 0]], np.uint64), "DRAM")
    )
    one, two = np.array([0], np.int32), np.array([0, 1], np.int32)
    makes = [
        said(play.make, [0], [1, 2]),
        said(play.make, [len(ours)], [0]),
        said(play.make, [0], [-1]),
        said(agent.make_prepped_xfer, "READ", double, one, play.there, one),
        said(agent.make_prepped_xfer, "READ", play.here, two, play.here, two),
    ]
    meets = [said(agent.add_remote_agent, blob) for blob in (b"junk", b"", agent.get_agent_metadata())]
    meets.append(said(agent.add_remote_agent, play.source.metadata))
    read = play.run()
    ends = [said(agent.deregister_memory, play.registered) for _ in range(2)]
    return [lists, makes, meets, read, ends]


@case(
    "",
    "NIXL_ERR_NOT_POSTED",
    ["DONE", "DONE"],
    [True, False],
    [2 * PAGE, 2, True, True],
    [None, None, None, "NIXL_ERR_INVALID_PARAM"],
    transports=BOTH,
)
def what_the_driver_does(stage: Stage) -> list[object]:
    play = Play(stage, stage.source())
    agent, handle = play.agent, play.make([0, 2], [5, 3])
    early = play.state(handle)
    states = [play.end(handle, said(agent.transfer, handle)), play.state(handle)]
    pages = [bool(play.target[[0, 2]].all()), bool(play.target[[1, *range(3, len(play.target))]].any())]
    told = agent.get_xfer_telemetry(handle)
    measured = [told.totalBytes, told.descCount, told.postDuration >= 0, told.xferDuration > 0]
    ends = [said(agent.release_xfer_handle, handle)]
    ends += [said(agent.release_dlist_handle, prepared) for prepared in (play.here, play.there)]
    return [early, states, pages, measured, [*ends, said(play.make)]]


@case("M1, M12", "", "DONE", [1])
def strangers_at_the_port(stage: Stage) -> list[object]:
    play = Play(stage, stage.source())
    heard = b""
    for port in play.source.ports():
        for junk in STRANGERS:
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(junk)
                for _ in range(20):
                    play.source.serve()
                stranger.setblocking(False)
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    heard += stranger.recv(4096)
    return [heard.decode(errors="replace"), play.run(), play.values()]
