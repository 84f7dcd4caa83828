"""What clients of a simulated cluster ask, and how patient the router before them is."""

from dataclasses import dataclass, replace

from jaxserve.router.options import RouterOptions
from jaxserve.sim.clockwork import Clockwork
from jaxserve.sim.hash_model import END, VOCAB
from jaxserve.sim.router import SCHEME
from scheduler.types import SamplingParams

NAMES_OF_STOPS = ("ab", "Z", "€", "0a")


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """What clients of a world are like.

    Attributes:
        documents: what prompts begin with.
        split: share of requests that go through prefill and decode engines.
        think_s: mean pause between a client's requests.
    """

    documents: tuple[tuple[int, ...], ...]
    split: float
    think_s: float
    max_prompt: int
    max_tokens: int

    def draw(self, clockwork: Clockwork) -> tuple[tuple[int, ...], SamplingParams, str, int]:
        """A request: its prompt, its parameters, its tenant and its priority."""
        chance = clockwork.chance
        document = chance.choice(self.documents)
        kept = document[: chance.randint(0, min(len(document), self.max_prompt - 1))]
        tail = chance.randint(1, max(1, min(12, self.max_prompt - len(kept))))
        if chance.random() < 0.3:  # the same question again
            prompt = document[: max(1, min(len(document), self.max_prompt))]
        else:
            prompt = (*kept, *(chance.randrange(END - 3) for _ in range(tail)))  # whole characters
        most = chance.randint(1, self.max_tokens)
        fancy = chance.random() < 0.3
        sampling = SamplingParams(
            n=chance.choice((1, 1, 2, 3)) if fancy else 1,
            max_tokens=most,
            min_tokens=chance.randint(0, most) if fancy and chance.random() < 0.5 else 0,
            temperature=0.0,
            seed=chance.getrandbits(31),
            ignore_eos=chance.random() < 0.5,
            stop_token_ids=(chance.randrange(VOCAB),) if fancy else (),
        )
        if fancy and sampling.min_tokens == 0:
            stops = tuple(stop for stop in NAMES_OF_STOPS if chance.random() < 0.3)
            sampling = replace(sampling, stop=stops)
        return prompt, sampling, chance.choice(("", "", "tenant")), chance.randrange(3)


def draw_router(clockwork: Clockwork, prefill: list[str], decode: list[str]) -> RouterOptions:
    """A router that is more or less patient. Args: prefill, decode: hosts."""
    chance = clockwork.chance
    return RouterOptions(
        prefill=tuple(SCHEME + host for host in prefill),
        decode=tuple(SCHEME + host for host in decode),
        prefill_timeout_s=chance.choice((3.0, 600.0, 600.0)),
        silence_timeout_s=chance.choice((3.0, 600.0, 600.0)),
        probe_interval_s=chance.choice((0.2, 1.0)),
        probe_timeout_s=chance.choice((0.2, 3.0)),
    )
