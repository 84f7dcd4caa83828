"""The index of a host tier against a twin that keeps entries in a plain list, and its eviction policies."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kv.eviction import Arc, Lru
from kv.tier import NO_SLOT, Tier, match_length

NAMES = [bytes([number]) for number in range(8)]
KEYS = [(group, name) for group in range(2) for name in NAMES]


class TierMachine(RuleBasedStateMachine):
    """Stores, loads, resets at random; the twin is a list of entries, the oldest first."""

    policy = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.tier = Tier(9, num_groups=2, pages_per_chunk=2, policy=self.policy)
        self.entries: list[tuple[int, bytes]] = []
        self.slots: dict[tuple[int, bytes], tuple[int, ...]] = {}
        self.storing: list[tuple[tuple[int, ...], tuple[int, bytes] | None]] = []
        self.loads: list[tuple[tuple[int, ...], tuple[int, bytes] | None]] = []

    def ready(self) -> list[tuple[int, bytes]]:
        return [key for key in self.entries if all(key != other for _, other in self.storing)]

    def idle(self) -> list[tuple[int, bytes]]:
        return [key for key in self.ready() if all(key != other for _, other in self.loads)]

    def busy_slots(self) -> set[int]:
        return {slot for slots, _ in (*self.storing, *self.loads) for slot in slots}

    @rule(data=st.data(), count=st.integers(1, 3), keep=st.sets(st.sampled_from(NAMES)))
    def reserve(self, data: st.DataObject, count: int, keep: set[bytes]) -> None:
        absent = [key for key in KEYS if key not in self.entries]
        keys = data.draw(st.permutations(absent))[:count]
        taken = {slot for slots in self.slots.values() for slot in slots} | self.busy_slots()
        short = len(keys) - (8 - len(taken)) // 2
        may_go = [key for key in self.idle() if key[1] not in keep]
        assert self.tier.room(count, keep) == min(count, (8 - len(taken)) // 2 + len(may_go))
        chunks = self.tier.reserve(keys, keep)
        if short > len(may_go):
            assert chunks is None
            return
        assert chunks is not None and len(chunks) == len(keys)
        gone = [key for key in self.entries if not self.tier.holds(*key)]
        assert set(gone) <= set(may_go) and len(gone) == max(0, short)
        if self.policy == "lru":
            assert gone == may_go[: len(gone)], "the least recently used go first"
        for key in gone:
            self.entries.remove(key)
            del self.slots[key]
        taken = {slot for slots in self.slots.values() for slot in slots} | self.busy_slots()
        assert self.tier.room(0) == 0
        for key, chunk in zip(reversed(keys), reversed(chunks), strict=True):
            slots = tuple(self.tier.slots(chunk))
            assert NO_SLOT not in slots and not taken & set(slots)
            self.slots[key] = slots
            self.entries.append(key)
            self.storing.append((slots, key))

    @precondition(lambda self: self.storing)
    @rule(data=st.data(), ok=st.booleans())
    def stored(self, data: st.DataObject, ok: bool) -> None:
        slots, key = self.storing.pop(data.draw(st.integers(0, len(self.storing) - 1)))
        self.tier.stored(slots, ok)
        if not ok and key is not None:
            self.entries.remove(key)
            del self.slots[key]

    @precondition(lambda self: self.ready())
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.ready()))
        slots = self.slots[key]
        self.tier.pin(((), (NO_SLOT, *slots)))
        self.loads.append((slots, key))
        self.entries.remove(key)
        self.entries.append(key)

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), good=st.booleans())
    def load_ends(self, data: st.DataObject, good: bool) -> None:
        slots, key = self.loads.pop(data.draw(st.integers(0, len(self.loads) - 1)))
        self.tier.unpin((slots, ()))
        if not good and key is not None:
            self.tier.forget(slots[:1])
            self.entries.remove(key)
            del self.slots[key]
            self.loads = [(other, None if known == key else known) for other, known in self.loads]

    @rule(key=st.sampled_from(KEYS), again=st.booleans())
    def use(self, key: tuple[int, bytes], again: bool) -> None:
        (self.tier.touch if again else self.tier.refresh)(*key)
        if key in self.entries:
            self.entries.remove(key)
            self.entries.append(key)

    @rule()
    def reset(self) -> None:
        self.tier.reset()
        self.entries.clear()
        self.slots.clear()
        self.storing = [(slots, None) for slots, _ in self.storing]
        self.loads = [(slots, None) for slots, _ in self.loads]

    @invariant()
    def agrees(self) -> None:
        self.tier.check()
        assert self.tier.storing == 2 * len(self.storing)
        taken = {slot for slots in self.slots.values() for slot in slots} | self.busy_slots()
        assert (self.tier.used, self.tier.pinned) == (len(taken), len(self.busy_slots()))
        assert self.tier.num_slots == 8 and self.tier.free_chunks == (8 - len(taken)) // 2
        assert [key for key in KEYS if self.tier.holds(*key)] == sorted(self.entries)
        storing = sorted(key for _, key in self.storing if key is not None)
        assert [key for key in KEYS if self.tier.is_storing(*key)] == storing

    @rule()
    def wrong_calls_are_refused(self) -> None:
        free = sorted(
            set(range(1, 9)) - self.busy_slots() - {s for kept in self.slots.values() for s in kept}
        )
        for call in (lambda s: self.tier.pin(((s,),)), lambda s: self.tier.unpin(((s,),)),
                     lambda s: self.tier.stored((s,), True)):  # fmt: skip
            for slot in free[:1]:
                with pytest.raises(ValueError, match="host chunk"):
                    call(slot)


class ArcTierMachine(TierMachine):
    policy = "arc"


TestTier = TierMachine.TestCase
TestArcTier = ArcTierMachine.TestCase
TestTier.settings = TestArcTier.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


def slow_match(known: list[set[bytes]], names: list[bytes], start: int, needed: list[int | None]) -> int:
    """Tries every end from the longest on."""
    for end in range(len(names), start, -1):
        first = [start if count is None else max(start, end - count) for count in needed]
        if all(names[at] in group for group, low in zip(known, first, strict=True) for at in range(low, end)):
            return end
    return min(start, len(names))


@given(
    known=st.lists(st.sets(st.sampled_from(NAMES)), min_size=3, max_size=3),
    length=st.integers(0, 8), start=st.integers(0, 8), count=st.integers(0, 4), other=st.integers(1, 4),
)  # fmt: skip
def test_the_longest_run_is_found_like_by_trying_all(known, length, start, count, other):
    names = NAMES[:length]
    for needed in ([None, count, other], [count, other, count], [None, None, count]):
        assert match_length(known, names, start, needed) == slow_match(known, names, start, needed)


def filled(names: list[bytes], *, pages_per_chunk: int, groups: int = 1) -> Tier:
    """A tier that holds a prompt's whole chunks, ready."""
    tier = Tier(64, num_groups=groups, pages_per_chunk=pages_per_chunk)
    for end, group in product(range(pages_per_chunk, len(names) + 1, pages_per_chunk), range(groups)):
        chunks = tier.reserve([(group, names[end - 1])])
        assert chunks is not None
        tier.stored(tier.slots(chunks[0]), True)
    return tier


def test_a_run_may_begin_inside_a_chunk_and_ends_with_one():
    tier = filled(NAMES, pages_per_chunk=3)
    found = tier.match(NAMES, 1, 8, [None], 16)
    assert found == ((2, 3, 4, 5, 6),), (
        "two chunks of three hold six of eight pages; the first page is not asked"
    )
    assert tier.match(NAMES, 1, 5, [None], 16) == ((2, 3),)
    assert tier.match(NAMES, 3, 5, [None], 16) == ((),)
    assert tier.match(NAMES, 7, 8, [None], 16) == ((),)


def test_a_sliding_window_needs_only_what_is_seen_behind_the_run():
    tier = filled(NAMES, pages_per_chunk=2, groups=2)
    found = tier.match(NAMES, 1, 8, [None, 33], 16)
    assert found is not None
    assert [slot != NO_SLOT for slot in found[0]] == [True] * 7
    assert [slot != NO_SLOT for slot in found[1]] == [False] * 5 + [True] * 2
    assert found[1][-2:] == (15, 16)
    assert tier.match(NAMES, 1, 8, [None, 1], 16) == (found[0], (NO_SLOT,) * 7), (
        "a window of one sees no page"
    )


def test_a_page_that_is_still_being_stored_defers_only_a_run_that_needs_it():
    tier = filled(NAMES[:2], pages_per_chunk=1, groups=2)
    chunks = tier.reserve([(0, NAMES[2]), (1, NAMES[2])])
    assert chunks == [4, 5]
    assert tier.match(NAMES, 0, 8, [None, 33], 16) is None
    assert tier.match(NAMES, 0, 2, [None, 33], 16) == ((1, 3), (2, 4))
    tier.stored([5], True)
    assert tier.match(NAMES, 0, 8, [None, 33], 16) is None, "one group is not ready"
    tier.stored([6], True)
    assert tier.match(NAMES, 0, 8, [None, 33], 16) == ((1, 3, 5), (NO_SLOT, 4, 6))


def test_a_tier_without_room_for_one_chunk_is_refused():
    with pytest.raises(ValueError, match="3 pages holds no chunk of 4"):
        Tier(3, num_groups=1, pages_per_chunk=4)


def test_room_is_made_for_all_or_none():
    tier = filled(NAMES[:4], pages_per_chunk=16)
    for number in range(4):
        chunks = tier.reserve([(0, NAMES[number])])
        assert chunks is not None
        tier.stored(tier.slots(chunks[0]), True)
    tier.pin(((1,),))
    keys = [(0, b"new %d" % number) for number in range(4)]
    assert tier.reserve(keys) is None
    assert all(tier.holds(0, name) for name in NAMES[:4]), "nothing was evicted in vain"
    assert tier.reserve(keys[:3]) is not None


def test_arc_keeps_what_was_used_twice_when_a_scan_passes_and_lru_does_not():
    for policy, survives in ((Arc(4), True), (Lru(), False)):
        for number in range(2):
            policy.add((0, NAMES[number]))
            policy.touch((0, NAMES[number]))
        for number in range(20):
            if len(policy.order()) == 4:
                victims = policy.victims(1, lambda _: True)
                policy.evict(victims[0])
            policy.add((1, bytes([number])))
        assert ((0, NAMES[0]) in policy.order()) is survives


def test_a_ghost_moves_the_target_once_and_comes_back_as_frequent():
    arc = Arc(4)
    for number in range(4):
        arc.add((0, NAMES[number]))
    assert arc.victims(2, lambda _: True) == [(0, NAMES[0]), (0, NAMES[1])]
    arc.evict((0, NAMES[0]))
    arc.evict((0, NAMES[1]))
    assert arc.target == 0
    arc.add((0, NAMES[0]))
    assert arc.target == 1 and arc.order()[-1] == (0, NAMES[0])
    arc.evict((0, NAMES[0]))
    arc.add((0, NAMES[0]))
    assert arc.target == 0, "a ghost of the frequent list moves the target back"
    arc.touch((0, NAMES[2]))
    arc.add((0, NAMES[1]))
    assert arc.target == 1
    assert arc.victims(4, lambda _: True) == [(0, NAMES[number]) for number in (3, 0, 2, 1)]
    assert len(arc.victims(5, lambda _: True)) == 4
    assert arc.victims(5, lambda key: key[1] in NAMES[2:]) == [(0, NAMES[3]), (0, NAMES[2])]
    arc.clear()
    assert arc.order() == [] and arc.target == 0
