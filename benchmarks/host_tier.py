"""Host tier against a plain memory copy: `python benchmarks/host_tier.py [--pages N] [--page-size T]`.

The pool is a real one, of the pages of SmolLM2-135M in bfloat16 (368,640 bytes for 16 tokens). In turn, each
round: NumPy copies the bytes in one piece, then the host tier's driver stores and loads them (from the
command to its event, with the thread's wake-up), once with neighbouring pages and slots and once with
scattered ones. Prints GB/s and the ratio to the plain copy: the median of the rounds, their range, and the
best time of each against the other, which a busy machine disturbs least.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from kv import pool as pools
from kv.copies import PointerCopies
from kv.digest import digest_rows
from kv.host import HostDriver
from kv.moves import Command, HostSource, Load, Loaded, Store, Stored
from kv.types import KvSpec, PageGroup

GROUP = PageGroup(name="all", layers=tuple(range(30)), kv_heads=3, head_dim=64)


class Tier:
    """A driver over a pool in host memory, and a way to wait for it."""

    def __init__(self, copies: PointerCopies, num_slots: int, page_bytes: int, *, digest: bool) -> None:
        self._woken = threading.Event()
        self.driver = HostDriver(
            num_slots,
            page_bytes,
            copies,
            wake=self._woken.set,
            clock=time.monotonic,
            digest=digest_rows if digest else None,
        )

    def seconds(self, command: Command) -> float:
        """How long a command takes, from `start` to its event."""
        began = time.perf_counter()
        self.driver.start([command])
        while True:
            self._woken.wait()
            self._woken.clear()
            for event in self.driver.poll():
                if isinstance(event, Loaded | Stored) and event.error is not None:
                    raise RuntimeError(event.error)
                return time.perf_counter() - began


def store(pages: Sequence[int], slots: Sequence[int]) -> Store:
    """Pool pages to host slots."""
    return Store(move_id=1, connector=0, pages=tuple(pages), slots=tuple(slots))


def load(pages: Sequence[int], slots: Sequence[int]) -> Load:
    """Host slots to pool pages."""
    return Load(
        move_id=2,
        connector=0,
        request_id="benchmark",
        first_page=0,
        pages=(tuple(pages),),
        num_tokens=len(pages),
        source=HostSource(slots=(tuple(slots),)),
    )


def seconds_of(work: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16, help="tokens per page")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--digest", action="store_true", help="digests at store and load")
    args = parser.parse_args()

    random = np.random.default_rng(0)
    spec = KvSpec(groups=(GROUP,), page_size=args.page_size, dtype="bfloat16")
    pool = jax.block_until_ready(pools.create(spec, 2 * args.pages + 1))
    copies = PointerCopies(pools.regions(pool, spec.page_bytes))
    source = random.integers(0, 256, (args.pages, spec.page_bytes), np.uint8)
    copies.write(range(1, args.pages + 1), source)
    target = np.ones_like(source)
    tier = Tier(copies, args.pages, spec.page_bytes, digest=args.digest)
    pages, slots = list(range(1, args.pages + 1)), list(range(1, args.pages + 1))
    back = [page + args.pages for page in pages]
    mixed = [random.permutation(numbers).tolist() for numbers in (pages, slots, back)]
    first_touch = tier.seconds(store(pages, slots))
    cases = {
        "store": store(pages, slots),
        "load": load(back, slots),
        "store, scattered": store(mixed[0], mixed[1]),
        "load, scattered": load(mixed[2], mixed[1]),
    }
    plain: list[float] = []
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(args.rounds):
        for name, command in cases.items():
            plain.append(seconds_of(lambda: np.copyto(target, source)))
            taken[name].append(tier.seconds(command))
    copies.read(mixed[2], target)
    if not np.array_equal(target, source[np.asarray(mixed[0]) - 1]):
        raise RuntimeError("the pages that came back are not the ones that were stored")
    tier.driver.close()

    size = source.nbytes
    print(f"{args.pages} pages of {spec.page_bytes} bytes, {size / 1e6:.1f} MB, {args.rounds} rounds")
    print(f"{'plain copy':<18} {size / statistics.median(plain) / 1e9:6.2f} GB/s")
    print(f"{'first touch':<18} {size / first_touch / 1e9:6.2f} GB/s  the first store into fresh memory")
    for place, (name, seconds) in enumerate(taken.items()):
        best = min(plain) / min(seconds)
        ratios = [base / own for base, own in zip(plain[place :: len(cases)], seconds, strict=True)]
        print(
            f"{name:<18} {size / statistics.median(seconds) / 1e9:6.2f} GB/s  "
            f"{statistics.median(ratios):.2f} of a plain copy ({min(ratios):.2f} to {max(ratios):.2f}), "
            f"best {best:.2f}"
        )


if __name__ == "__main__":
    main()
