"""Pages from a peer against a raw NIXL READ: `python benchmarks/nixl_pages.py [--move-pages N] [--tcp]`.

Two processes on this machine, each with a pool of 512 pages of SmolLM2-135M in bfloat16: 368,640 bytes for 16
tokens, or 737,280 for 32. In turn, each round: one READ of the bytes in one descriptor, polled without a
pause; then the same bytes as pages through the driver's thread, from the command to its event, without and
with digests. Then the idle costs. `--tcp` keeps UCX from copying through shared memory, as between machines.
Prints the median of the rounds.
"""

import argparse
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

import numpy as np

from kv.config import CONSUMER, NIXL, PRODUCER, ConnectorConfig
from kv.digest import digest_rows
from kv.driver import Region
from kv.moves import Lease, Load, Loaded, RemoteSource, Unlease
from kv.nixl import NixlDriver, make_agent
from kv.tcp_channel import TcpChannel
from kv.transfer_plan import EngineFacts

NUM_PAGES = 512
KEY = bytes(32)


class Pool:
    """Pages in NumPy, and `kv.driver.PageCopies` over them."""

    def __init__(self, page_size: int, fill: int) -> None:
        self.shape = (30, 2, 3, page_size, 64)
        self.rows = np.random.default_rng(fill).integers(
            0, 256, (NUM_PAGES, int(np.prod(self.shape)) * 2), dtype=np.uint8
        )

    def read(self, pages: Sequence[int], out: np.ndarray) -> None:
        np.take(self.rows, pages, axis=0, out=out)

    def write(self, pages: Sequence[int], rows: np.ndarray) -> None:
        self.rows[list(pages)] = rows

    def pool_moved(self, regions: Sequence[Region]) -> None:
        raise RuntimeError("this pool does not move")

    def driver(
        self, name: str, role: str, digest: bool, wake: Callable[[], None]
    ) -> tuple[NixlDriver, TcpChannel]:
        channels: list[TcpChannel] = []

        def make_channel(on_news: Callable[[], None]) -> TcpChannel:
            channels.append(TcpChannel("127.0.0.1", 0, key=KEY, wake=on_news))
            return channels[0]

        size = self.rows.shape[1]
        made = NixlDriver(
            facts=EngineFacts(
                engine_id=name,
                epoch="0" * 32,
                compat="",
                role=role,
                page_size=self.shape[3],
                page_shape=self.shape,
                item_bytes=2,
            ),
            config=ConnectorConfig(kind=NIXL, role=role, digest=digest),
            regions=[Region(address=self.rows.ctypes.data, page_bytes=size, num_pages=NUM_PAGES)],
            copies=self,
            make_channel=make_channel,
            wake=wake,
        )
        return made, channels[0]


def whole(pool: Pool, num_bytes: int) -> np.ndarray:
    return np.array([[pool.rows.ctypes.data, num_bytes, 0]], np.uint64)


def cpu_share(seconds: float) -> float:
    """CPU of this process in a time in which it has nothing to do, in percent of a core."""
    time.sleep(0.5)
    before, began = os.times(), time.monotonic()
    time.sleep(seconds)
    after = os.times()
    return 100 * (after.user + after.system - before.user - before.system) / (time.monotonic() - began)


def serve(pipe: Connection, page_size: int) -> None:
    """The process that is read from. Does what it is told through the pipe."""
    pool = Pool(page_size, 1)
    raw = make_agent("raw-p")
    raw.register_memory(whole(pool, pool.rows.nbytes), "DRAM")
    driver, channel = pool.driver("P", PRODUCER, True, lambda: None)
    pipe.send((raw.get_agent_metadata(), pool.rows.ctypes.data, channel.port))
    polling = threading.Event()

    def progress() -> None:
        while True:
            polling.wait()
            raw.get_new_notifs()
            time.sleep(50e-6)

    threading.Thread(target=progress, daemon=True).start()
    while (order := pipe.recv()) is not None:
        match order:
            case "raw":
                polling.set()
            case "pages":
                polling.clear()
            case "idle":
                pipe.send(cpu_share(5.0))
            case _:
                driver.start(order)
    driver.close()


class Reader:
    """The process that reads: a raw agent, and one driver with digests and one without."""

    def __init__(self, pipe: Connection, page_size: int, num_pages: int) -> None:
        self.pipe, self.count = pipe, num_pages
        self.pool = Pool(page_size, 2)
        self.num_bytes = num_pages * self.pool.rows.shape[1]
        metadata, address, self.port = pipe.recv()
        self.raw = make_agent("raw-d")
        self.raw.register_memory(whole(self.pool, self.pool.rows.nbytes), "DRAM")
        self.raw.add_remote_agent(metadata)
        there = np.array([[address, self.num_bytes, 0]], np.uint64)
        here = self.raw.get_xfer_descs(whole(self.pool, self.num_bytes), "DRAM")
        self.here = self.raw.prep_xfer_dlist("NIXL_INIT_AGENT", here)
        self.there = self.raw.prep_xfer_dlist("raw-p", self.raw.get_xfer_descs(there, "DRAM"))
        self.woken = threading.Event()
        self.drivers = [
            self.pool.driver("D", CONSUMER, digest, self.woken.set)[0] for digest in (False, True)
        ]
        self.moves = 0

    def raw_s(self) -> float:
        """One READ of the bytes in one call."""
        self.pipe.send("raw")
        time.sleep(0.01)
        one = np.zeros(1, np.int32)
        began = time.perf_counter()
        handle = self.raw.make_prepped_xfer("READ", self.here, one, self.there, one)
        state = self.raw.transfer(handle)
        while state == "PROC":
            state = self.raw.check_xfer_state(handle)
        seconds = time.perf_counter() - began
        self.raw.release_xfer_handle(handle)
        self.pipe.send("pages")
        return seconds

    def pages_s(self, *, digest: bool, scattered: bool) -> tuple[float, float]:
        """The bytes as pages. Returns seconds from command to event, and of NIXL's transfer alone."""
        self.moves += 1
        pages = np.arange(1, NUM_PAGES)
        if scattered:
            pages = np.random.default_rng(self.moves).permutation(pages)
        lists = (tuple(pages[: self.count].tolist()),)
        generations = ((1,) * self.count,)
        name, tokens = f"r{self.moves}", self.count * self.pool.shape[3]
        lease = Lease(
            move_id=0, connector=0, request_id=name, pages=lists, generations=generations, num_tokens=tokens
        )
        self.pipe.send([lease])
        time.sleep(0.3)  # P's digests are ready before a client brings the lease here
        source = RemoteSource(
            engine_id="P",
            epoch="0" * 32,
            host="127.0.0.1",
            port=self.port,
            request_id=name,
            pages=lists,
            generations=generations,
            num_tokens=tokens,
            page_size=self.pool.shape[3],
        )
        load = Load(
            move_id=self.moves,
            connector=0,
            request_id=name,
            first_page=0,
            pages=lists,
            num_tokens=tokens,
            source=source,
        )
        began = time.perf_counter()
        self.drivers[digest].start([load])
        while not (events := self.drivers[digest].poll()):
            self.woken.wait()
            self.woken.clear()
        seconds = time.perf_counter() - began
        (loaded,) = events
        if not isinstance(loaded, Loaded) or loaded.num_pages != self.count:
            raise RuntimeError(f"pages are missing: {loaded}")
        self.pipe.send([Unlease(connector=0, request_id=name)])
        return seconds, loaded.seconds


def report(reader: Reader, rounds: int) -> None:
    """Prints GB/s and ratios."""
    names = ["raw READ", "pages", "pages, scattered", "pages with digests", "NIXL's part of pages"]
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        plain, inner = reader.pages_s(digest=False, scattered=False)
        taken = [
            reader.raw_s(),
            plain,
            reader.pages_s(digest=False, scattered=True)[0],
            reader.pages_s(digest=True, scattered=False)[0],
            inner,
        ]
        if turn:  # the first connects and touches the pages
            for name, seconds in zip(names, taken, strict=True):
                times[name].append(seconds)
    for name in names:
        seconds = statistics.median(times[name])
        ratios = sorted(raw / ours for raw, ours in zip(times["raw READ"], times[name], strict=True))
        print(
            f"{name:24} {reader.num_bytes / seconds / 1e9:6.2f} GB/s {1e3 * seconds:8.2f} ms"
            f"   {statistics.median(ratios):.2f} of raw ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
    rows = reader.pool.rows[: reader.count]
    began = time.perf_counter()
    digest_rows(rows)
    print(f"digests of one side      {rows.nbytes / (time.perf_counter() - began) / 1e9:6.2f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--move-pages", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tcp", action="store_true")
    args = parser.parse_args()
    if args.tcp:
        os.environ["UCX_TLS"] = "tcp"
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, args.page_size))
    process.start()
    reader = Reader(ours, args.page_size, args.move_pages)
    transport = "TCP" if args.tcp else "any transport"
    print(f"{args.move_pages} pages of {reader.pool.rows.shape[1]} bytes, {transport}")
    report(reader, args.rounds)
    print(f"idle reader: {cpu_share(5.0):.1f}% of a core")
    ours.send("idle")
    print(f"idle P, no lease: {ours.recv():.1f}%")
    ours.send(
        [Lease(move_id=0, connector=0, request_id="x", pages=((1,),), generations=((1,),), num_tokens=1)]
    )
    ours.send("idle")
    print(f"idle P, a lease outstanding: {ours.recv():.1f}%")
    for driver in reader.drivers:
        driver.close()
    ours.send(None)
    process.join()


if __name__ == "__main__":
    main()
