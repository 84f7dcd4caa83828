"""A world drawn from a seed: how many engines, of which shape, with which connectors, clients and faults."""

from dataclasses import replace
from random import Random

from jaxserve.sim.clockwork import Clockwork
from jaxserve.sim.engine import Node
from jaxserve.sim.faults import draw_drill, draw_rates
from jaxserve.sim.habits import Habits
from jaxserve.sim.hash_model import END, HEAD_DIM, HEADS, ITEM, LAYERS, HashModel
from jaxserve.sim.setup import Setup
from kv.config import BOTH, CONSUMER, MULTI, NIXL, OFFLOADING, PRODUCER, SIMPLE_CPU, ConnectorConfig
from scheduler.types import Limits, SchedulerConfig

KINDS = (*("plain",) * 2, *("crowded",) * 2, *("mesh",) * 3, *("thrashing",) * 3)
"""Of worlds: in crowded ones and in meshes requests wait with fetched pages, in thrashing ones they are
preempted. Some engines of a mesh, and of most thrashing worlds, lend and borrow at the same time."""

PACE = {"plain": 1.0, "crowded": 10.0, "mesh": 10.0, "thrashing": 4.0}
"""Where steps are slow, transfers end while others decode."""
SHARES = (0.2, 0.4, 0.7)
"""Of all faults, those that a plain world has."""
MILD = (0.08, 0.15, 0.22)
"""Those that others have: under more, requests do not come as far as they are meant to there."""


DRILLS = 0.6
"""Of all worlds of a kind, those that have few faults, but often: so that each fault meets each state."""

STRANGER = b"s" * 32
"""The key of a decode engine that was set up with another than its peers: it refuses their parameters."""


def draw(clockwork: Clockwork) -> Setup:
    """Draws a world."""
    chance = clockwork.chance
    windows = chance.choice(((None,), (None,), (None, 8), (6,)))
    model = HashModel(windows=windows, ranks=chance.choice((1, 1, 1, 2, 4)))
    plain = model.ranks == 1 and len(windows) == 1
    page_size = chance.choice((2, 4, 4, 8))
    larger = plain and chance.random() < 0.25
    timing = {
        "lease_s": chance.choice((1.0, 5.0, 30.0)),
        "transfer_timeout_s": chance.choice((1.0, 5.0, 30.0)),
        "failure_policy": chance.choice(("recompute", "recompute", "fail")),
        "digest": chance.random() < 0.85,
    }
    kind = chance.choice(KINDS)
    max_model_len = 48 if kind == "thrashing" else chance.choice((48, 64, 96))
    tiny = kind == "thrashing" or chance.random() < {"plain": 0.4}.get(kind, 0.1)
    one_name = chance.random() < 0.3
    digest_host = chance.random() < 0.8
    prefill = tuple(f"p{number}" for number in range(chance.choice((1, 1, 2))))
    decode = tuple(f"d{number}" for number in range(chance.choice((1, 1, 2))))
    if kind == "mesh" or (kind == "thrashing" and chance.random() < 0.6):
        both = ("m0", "m1")[: chance.choice((1, 1, 2))]
        prefill, decode = ("p0", *both), (*both, "d0")
    alone = ("a0",) if chance.random() < 0.2 else ()
    full: list[str] = []
    nodes = []
    for name in dict.fromkeys((*prefill, *decode, *alone)):
        ways = (PRODUCER if name in prefill else None, CONSUMER if name in decode else None)
        role = next((way for way in ways if way is not None and None in ways), BOTH)
        size = 2 * page_size if larger and name in decode else page_size
        fits = -(-max_model_len // size) * len(windows) + 2
        num_pages = (
            fits + chance.randint(0, 1 if kind == "thrashing" else 3)
            if tiny
            else fits + chance.randint(0, max(0, 63 - fits))
        )
        transfer, crowded = _transfer(chance, role, name in alone, num_pages, timing, digest_host, kind)
        full += [name] if crowded else []
        nodes.append(
            Node(
                name=name,
                engine_id=f"engine-{'same' if one_name and name in prefill else name}",
                scheduler=SchedulerConfig(
                    windows=windows,
                    page_size=size,
                    num_pages=num_pages,
                    max_num_seqs=_seqs(chance, kind, role),
                    max_model_len=max_model_len,
                    cache_key="model-a",
                    enable_prefix_caching=chance.random() < 0.85,
                    policy=chance.choice(("fcfs", "priority")),
                    transfer=transfer,
                ),
                limits=Limits(max_num_batched_tokens=0, max_num_seqs=0),
                ranks=model.ranks,
                page_shape=(LAYERS, 2, HEADS, size, HEAD_DIM),
                item_bytes=ITEM,
                max_num_queued_reqs=chance.choice((4, 16, 64) if kind == "plain" else (16, 64)),
            )
        )
        seqs = nodes[-1].scheduler.max_num_seqs
        budget = chance.choice((seqs, 8, 16, 64) if kind == "plain" else (8, 16, 64))
        limits = Limits(max_num_batched_tokens=max(budget, seqs), max_num_seqs=seqs)
        nodes[-1] = replace(nodes[-1], limits=limits)
    if len(decode) > 1 and kind in ("plain", "crowded") and chance.random() < 0.4:
        nodes = [replace(node, key=STRANGER) if node.name == "d1" else node for node in nodes]
    undigested = ("X17", "X18") if not timing["digest"] else ()
    drift = chance.random() < 0.3
    everywhere = tuple(node.name for node in nodes)
    lasting = [("X6", tuple(dict.fromkeys((*prefill, *decode))))] if one_name and len(prefill) > 1 else []
    lasting += [("X39", everywhere)] if drift else []
    lasting += [("X23", everywhere)] if tiny else []
    lasting += [("X24", (name,)) for name in full]
    return Setup(
        model=model,
        nodes=tuple(nodes),
        prefill=prefill,
        decode=decode,
        rates=_rates(clockwork, kind, undigested),
        lasting=tuple(lasting),
        habits=_habits(chance, kind, max_model_len),
        pace=PACE[kind],
        num_clients=chance.choice((3, 8, 16) if kind == "plain" else (12, 20)),
        offsets={node.name: chance.uniform(0.0, 3600.0) for node in nodes},
        drift={node.name: chance.uniform(0.99, 1.01) if drift else 1.0 for node in nodes},
    )


def _rates(clockwork: Clockwork, kind: str, without: tuple[str, ...]) -> dict[str, float]:
    chance = clockwork.chance
    if kind != "plain" and chance.random() < DRILLS:
        return draw_drill(clockwork, without)
    return draw_rates(clockwork, chance.choice(SHARES if kind == "plain" else MILD), without)


def _seqs(chance: Random, kind: str, role: str) -> int:
    """Slots: one makes fetched requests wait, many of them use up a tiny pool."""
    if kind == "thrashing":
        return chance.choice((6, 8, 12))
    if kind in ("crowded", "mesh"):
        return chance.choice((4, 6)) if role == PRODUCER else chance.choice((1, 1, 2))
    return chance.choice((1, 2, 4, 6))


def _habits(chance: Random, kind: str, max_model_len: int) -> Habits:
    most = chance.choice({"plain": (4, 16, 24), "thrashing": (28, 35)}.get(kind, (24, 32)))
    longest = chance.choice((8, 12)) if kind != "plain" else max_model_len - most - 1
    return Habits(
        documents=tuple(
            tuple(chance.randrange(END - 3) for _ in range(chance.randint(1, longest))) for _ in range(3)
        ),
        split=chance.choice({"plain": (0.4, 0.8), "thrashing": (0.6, 0.8)}.get(kind, (0.9, 1.0))),
        think_s=chance.choice((0.002, 0.02, 0.2) if kind == "plain" else (0.002, 0.02)),
        max_prompt=longest,
        max_tokens=most,
    )


def _transfer(
    chance: Random,
    role: str,
    alone: bool,
    num_pages: int,
    timing: dict[str, float | str | bool],
    digest_host: bool,
    kind: str,
) -> tuple[ConnectorConfig | None, bool]:
    """The connectors of one engine, and whether its host tier is small."""
    crowded = kind != "crowded" and chance.random() < 0.3
    slots = chance.randint(2, 6) if crowded else chance.randint(num_pages, 3 * num_pages)
    policy = str(timing["failure_policy"])
    host = ConnectorConfig(
        kind=chance.choice((OFFLOADING, SIMPLE_CPU)),
        role=BOTH,
        failure_policy=policy,
        host_slots=slots,
        eviction_policy=chance.choice(("lru", "arc")),
        offload_prompt_only=chance.random() < 0.5,
        lazy_offload=chance.random() < 0.5,
        digest=digest_host,
    )
    if host.kind == OFFLOADING and slots >= 4 and chance.random() < 0.3:
        host = replace(host, pages_per_chunk=2)
    if alone:
        return (None, False) if chance.random() < 0.3 else (host, crowded)
    nixl = ConnectorConfig(
        kind=NIXL,
        role=role,
        failure_policy=policy,
        lease_s=float(timing["lease_s"]),
        transfer_timeout_s=float(timing["transfer_timeout_s"]),
        digest=bool(timing["digest"]),
    )
    if kind != "crowded" and chance.random() < (0.2 if kind == "thrashing" else 0.4):
        return nixl, False
    children = (nixl, host) if chance.random() < 0.6 else (host, nixl)
    multi = ConnectorConfig(
        kind=MULTI, role=role, failure_policy=policy, compose=chance.random() < 0.5, children=children
    )
    return multi, crowded
