"""Historic bugs in what carries pages: transfers between peers, host tiers, ranks."""

from types import SimpleNamespace
from typing import Any

from kv.channel import ChannelError
from kv.connectors.host_tier import HostTierConnector
from kv.ranks import Ranks
from kv.tier import Tier
from kv.transfer_fetch import Fetch, Stage
from kv.transfer_leases import Leases
from kv.transfer_peer import Peer
from kv.wire import Confirmed, Refused
from tests.sim.planting import Planted, Swap


def _confirms_anything(right: Any) -> Any:
    def confirm(self: Any, message: Any) -> Any:
        held = [sorted({page for page in pages if page}) for pages in message.pages]
        row = SimpleNamespace(digests={})
        self._digest_pages(row, sorted(page for pages in held for page in pages))
        digests = tuple(tuple(row.digests.get(page, b"") for page in group) for group in message.pages)
        return Confirmed(epoch=message.epoch, digests=digests if message.digests else ())

    return confirm


def _compares_nothing(right: Any) -> Any:
    return lambda self, digests: right(self, None)


def _frees_at_timeout(right: Any) -> Any:
    return lambda self, fetch, error, stage, *, safe=True: right(self, fetch, error, stage)


def _swallows_lost_posts(right: Any) -> Any:
    def lost(self: Any, fetch: Any, now: float, error: str) -> None:
        self._suspect = True
        self._fetches.remove(fetch)
        self.tracked.pop(fetch.load.request_id, None)

    return lost


def _drops_failed_handshakes(right: Any) -> Any:
    def greeted(self: Any, answer: Any, now: float) -> None:
        if isinstance(answer, ChannelError):
            self.tracked.clear()
        else:
            right(self, answer, now)

    return greeted


def _waits_for_handshakes(right: Any) -> Any:
    def give_up(self: Any, fetch: Any, now: float, error: str) -> None:
        if fetch.stage is Stage.HANDSHAKE:
            fetch.deadline = now + 1e6
        else:
            right(self, fetch, now, error)

    return give_up


def _raises_at_refusals(right: Any) -> Any:
    def greeted(self: Any, answer: Any, now: float) -> None:
        if isinstance(answer, Refused):
            raise RuntimeError(f"the handshake was refused: {answer.reason}")
        right(self, answer, now)

    return greeted


def _drops_loads_of_old_life(right: Any) -> Any:
    def end(self: Any, fetch: Any, error: str | None, stage: str, *, safe: bool = True) -> None:
        if error is not None and "restarted" in error:
            self._fetches.remove(fetch)
            self.tracked.pop(fetch.load.request_id, None)
        else:
            right(self, fetch, error, stage, safe=safe)

    return end


def _unpins_twice(right: Any) -> Any:
    def load_ended(self: Any, source: Any, num_pages: int | None = None) -> None:
        right(self, source, num_pages)
        if num_pages is not None and num_pages < len(source.slots[0]):
            for chunk in self._tier._chunks(slot for slots in source.slots for slot in slots):
                self._tier._pins[chunk] -= 1

    return load_ended


def _never_unpins_failures(right: Any) -> Any:
    def load_ended(self: Any, source: Any, num_pages: int | None = None) -> None:
        if num_pages is not None and num_pages == len(source.slots[0]):
            right(self, source, num_pages)

    return load_ended


def _never_ends_failed_stores(right: Any) -> Any:
    def stored(self: Any, slots: Any, ok: bool) -> None:
        if ok:
            right(self, slots, ok)

    return stored


def _evicts_what_is_used(right: Any) -> Any:
    def victims(self: Any, count: int, keep: Any) -> Any:
        return self._policy.victims(count, lambda key: key[1] not in keep)

    return victims


def _expects_new_entries(right: Any) -> Any:
    def missing(self: Any, pages: Any, end: int) -> Any:
        for group in range(len(self._tail)):
            assert not self._tier.holds(group, pages.names[end - 1]), "it has been stored already"
        return right(self, pages, end)

    return missing


def _counts_first_rank(right: Any) -> Any:
    def loaded(self: Any, rank: int, event: Any) -> Any:
        self._loads.pop(event.move_id, None)
        return (event,) if rank == 0 else ()

    return loaded


MOVES = (
    Planted(
        name="stale blocks",
        comes_from="vLLM 52234",
        failure="F1",
        what="pages are read by number: nobody asks whether the lease and its generations still hold",
        laws=("I7", "I9", "I10", "I14"),
        swaps=(Swap(where=Leases, name="_confirm", wrong=_confirms_anything),),
    ),
    Planted(
        name="garbage in 200",
        comes_from="vllm-backport 33",
        failure="F22",
        what="what a transfer brought is used without comparing its digests",
        laws=("I7", "I9", "I14"),
        swaps=(Swap(where=Fetch, name="settle", wrong=_compares_nothing),),
    ),
    Planted(
        name="timed-out load",
        comes_from="SGLang 24527",
        failure="F25",
        what="the target pages of a transfer past its deadline are reused while the peer may still write",
        laws=("I5",),
        swaps=(Swap(where=Peer, name="_end", wrong=_frees_at_timeout),),
    ),
    Planted(
        name="swallowed post",
        comes_from="vLLM 55181",
        failure="F7",
        what="a transfer that fails is logged, and its request waits for ever",
        laws=("I2", "I12"),
        swaps=(Swap(where=Peer, name="_lost", wrong=_swallows_lost_posts),),
    ),
    Planted(
        name="dead in handshake",
        comes_from="vLLM 26171",
        failure="F8",
        what="a handshake that nobody answers is told to nobody, and has no deadline",
        laws=("I2", "I12"),
        swaps=(
            Swap(where=Peer, name="_greeted", wrong=_drops_failed_handshakes),
            Swap(where=Peer, name="_give_up", wrong=_waits_for_handshakes),
        ),
    ),
    Planted(
        name="refusal kills",
        comes_from="vLLM 40364",
        failure="F9",
        what="a refused handshake raises through the loop that serves all peers",
        laws=("I13", "I17"),
        swaps=(Swap(where=Peer, name="_greeted", wrong=_raises_at_refusals),),
    ),
    Planted(
        name="peer churn",
        comes_from="Dynamo 13088",
        failure="F32",
        what="loads from a peer that was restarted are dropped without an answer",
        laws=("I2", "I12"),
        swaps=(Swap(where=Peer, name="_end", wrong=_drops_loads_of_old_life),),
    ),
    Planted(
        name="negative pins",
        comes_from="LMCache 3381",
        failure="F34",
        what="a host page whose load fails is unpinned twice",
        laws=("I1-I3", "I17"),
        swaps=(Swap(where=HostTierConnector, name="load_ended", wrong=_unpins_twice),),
    ),
    Planted(
        name="pins for ever",
        comes_from="LMCache 3884",
        failure="F35",
        what="a host page whose load fails stays pinned",
        laws=("I2",),
        swaps=(Swap(where=HostTierConnector, name="load_ended", wrong=_never_unpins_failures),),
    ),
    Planted(
        name="onboarding hangs",
        comes_from="Dynamo 5012",
        failure="F33",
        what="a store that fails never ends, and whoever needs its page is told to come later for ever",
        laws=("I2", "I12"),
        swaps=(Swap(where=Tier, name="stored", wrong=_never_ends_failed_stores),),
    ),
    Planted(
        name="evicts live pages",
        comes_from="Mooncake 3421",
        failure="F38",
        what="the host tier evicts pages that are being loaded or stored",
        laws=("I1-I3", "I8", "I13"),
        swaps=(Swap(where=Tier, name="_victims", wrong=_evicts_what_is_used),),
    ),
    Planted(
        name="offered again",
        comes_from="vLLM 54914",
        failure="F12",
        what="a page offered once more after a preemption, or by another request, is an assertion",
        laws=("I17",),
        swaps=(Swap(where=HostTierConnector, name="_missing", wrong=_expects_new_entries),),
    ),
    Planted(
        name="first rank counts",
        comes_from="SGLang 28702",
        failure="F26",
        what="a load counts as done when the first rank has reported",
        laws=("I5", "I7", "I14"),
        swaps=(Swap(where=Ranks, name="_loaded", wrong=_counts_first_rank),),
    ),
)
