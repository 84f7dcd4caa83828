"""The faults that a simulation injects: what they are, and how often they strike.

Numbers are those of the catalogue in docs/testing.md. A fault's rate is drawn from the seed: a probability
per event for what strikes an engine, per opportunity (a message, a transfer, a step, a copy) for the rest.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from jaxserve.sim.clockwork import Clockwork


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of fault.

    Attributes:
        low, high: its rate is drawn between them, evenly in the logarithm.
        boost: so many times more often does it strike where a request is in a state that is seldom reached;
            less for what ends that state.
        weight: so many times more often than others does a world have it.
    """

    name: str
    low: float
    high: float
    boost: float = 8.0
    weight: float = 1.0


STRIKES = {
    "X1": Kind(
        name="an engine is killed, and X2 comes back at its address", low=0.0015, high=0.01, boost=3.0
    ),
    "X3": Kind(name="an engine is stopped for a while", low=0.001, high=0.008),
    "X4": Kind(name="an engine is 100 times slower for a while", low=0.001, high=0.006),
    "X5": Kind(
        name="an engine comes back with another version of the model", low=0.001, high=0.006, boost=3.0
    ),
    "X11": Kind(name="one direction between two hosts is cut for a while", low=0.001, high=0.01),
    "X12": Kind(name="a host's answers are lost for a while", low=0.001, high=0.008, weight=2.0),
    "X33": Kind(name="a client goes away", low=0.002, high=0.015, boost=40.0, weight=3.0),
    "X35": Kind(name="a request id is used twice", low=0.01, high=0.1, boost=8.0, weight=2.0),
    "X36": Kind(name="a request is aborted twice", low=0.002, high=0.015, boost=40.0, weight=5.5),
    "X37": Kind(name="a client repeats its request at once, many times", low=0.003, high=0.015, weight=1.5),
    "X38": Kind(name="an engine's clock jumps by an hour", low=0.0006, high=0.004, boost=16.0, weight=2.5),
    "X41": Kind(name="an engine is asked to end", low=0.0015, high=0.01, boost=3.0),
    "X42": Kind(name="an engine's tokenizer fails", low=0.003, high=0.015, boost=30.0, weight=5.0),
    "X43": Kind(
        name="an engine's loop stalls for five seconds", low=0.002, high=0.012, boost=16.0, weight=2.5
    ),
    "X45": Kind(name="an engine can open no file for a while", low=0.001, high=0.008, boost=16.0, weight=2.5),
    "X46": Kind(name="the prefix cache is emptied", low=0.002, high=0.02, weight=2.0),
    "X19": Kind(name="transfers given up write late", low=0.03, high=0.15, boost=24.0, weight=3.0),
    "X27": Kind(name="a bit flips in host memory", low=0.03, high=0.2, boost=16.0, weight=4.0),
}
"""Whole engines, hosts and clients; a probability per event. One of them strikes at most, in this order: the
last two are so frequent where they find their moment that they would leave the others nothing."""

CHANCES = {
    "X7": Kind(name="a message is lost", low=0.005, high=0.2),
    "X8": Kind(name="a message is 100 times slower", low=0.01, high=0.2),
    "X9": Kind(name="messages overtake each other", low=0.05, high=0.5),
    "X10": Kind(name="a message arrives twice", low=0.01, high=0.3),
    "X13": Kind(
        name="a handshake is cut short, or (more rarely) another message", low=0.05, high=0.3, boost=8.0
    ),
    "X14": Kind(name="a transfer cannot be posted", low=0.03, high=0.2, boost=8.0, weight=5.0),
    "X15": Kind(name="a transfer never ends", low=0.02, high=0.15, boost=8.0, weight=3.5),
    "X16": Kind(
        name="a transfer fails after it has written a part", low=0.03, high=0.2, boost=6.0, weight=3.5
    ),
    "X17": Kind(name="a transfer is done, with a bit flipped", low=0.03, high=0.2, boost=6.0, weight=3.5),
    "X18": Kind(
        name="a transfer is done, and has written nothing", low=0.05, high=0.5, boost=16.0, weight=2.5
    ),
    "X21": Kind(name="transfers end in another order", low=0.2, high=0.8, boost=16.0, weight=2.5),
    "X22": Kind(name="a confirmation or a release is lost, or comes twice", low=0.02, high=0.4, weight=2.0),
    "X25": Kind(name="a copy to or from host memory fails", low=0.05, high=0.5, boost=16.0, weight=2.5),
    "X26": Kind(name="a step finds no memory", low=0.004, high=0.03, weight=2.5, boost=24.0),
    "X28": Kind(name="a step raises", low=0.004, high=0.03, weight=2.0, boost=24.0),
    "X29": Kind(name="a step takes 100 times longer", low=0.01, high=0.08),
    "X30": Kind(name="a row's logits are no numbers", low=0.004, high=0.04, boost=24.0),
    "X31": Kind(name="a step takes a minute, to compile", low=0.006, high=0.04, boost=20.0, weight=2.5),
    "X32": Kind(
        name="a step fails and the donated pool is lost, or it moves",
        low=0.004,
        high=0.03,
        boost=16.0,
        weight=2.5,
    ),
    "X40": Kind(name="a timer fires late", low=0.01, high=0.2),
}
"""A probability per opportunity."""

LASTING = {
    "X6": "two engines have one name",
    "X20": "a lease ends while its pages are being read",
    "X23": "the pool is tiny",
    "X24": "a host tier is full",
    "X39": "clocks drift",
}
"""Properties of a world, or what follows from the others; they are met where they bite."""

NAMES = {**{key: kind.name for key, kind in (*STRIKES.items(), *CHANCES.items())}, **LASTING}


DRILLED = 3
"""Faults of a world that is a drill."""

NEEDS = {"X19": ("X15", 0.15), "X27": ("X46", 0.03)}
"""Faults that meet few without another, and its rate: no transfer is given up where none hangs, and little is
loaded from host memory while the prefix cache has it too."""


def draw_rates(clockwork: Clockwork, share: float, without: Iterable[str] = ()) -> dict[str, float]:
    """A rate for each fault that a world has: about `share` of all, so that worlds differ in kind."""
    chance = clockwork.chance
    rates = {}
    for fault, kind in (*STRIKES.items(), *CHANCES.items()):
        drawn = chance.random() < share * kind.weight
        rate = kind.low * (kind.high / kind.low) ** chance.random()
        if drawn and fault not in without:
            rates[fault] = rate
    return rates | _needed(rates)


def draw_drill(clockwork: Clockwork, without: Iterable[str] = ()) -> dict[str, float]:
    """Few faults, and as often as they ever are: requests come far between them."""
    kinds = {name: kind for name, kind in {**STRIKES, **CHANCES}.items() if name not in without}
    drilled = set(clockwork.chance.sample(sorted(kinds), DRILLED))
    drilled |= {"X19"} if "X15" in drilled else set()
    rates = {name: kind.high for name, kind in kinds.items() if name in drilled}
    return rates | _needed(rates)


def _needed(rates: dict[str, float]) -> dict[str, float]:
    """Those that are needed, at least as often as that."""
    needed = dict(NEEDS[fault] for fault in rates if fault in NEEDS)
    return {name: max(rate, rates.get(name, 0.0)) for name, rate in needed.items()}
