import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics.counts import LabelledCounts

LABELS = ("a", "b", "c")
SMALL = settings(deadline=None, max_examples=60)
counts = st.tuples(*[st.integers(0, 10**9)] * 3).map(lambda v: LabelledCounts(labels=LABELS, values=v))


@SMALL
@given(events=st.lists(st.tuples(st.sampled_from(LABELS), st.integers(0, 9))))
def test_adding_counts_every_event_under_its_label(events: list[tuple[str, int]]) -> None:
    value = LabelledCounts.empty(LABELS)
    for label, amount in events:
        value = value.add(label, amount)
    recount = {label: sum(n for other, n in events if other == label) for label in LABELS}
    assert dict(value.items()) == recount
    assert [value.get(label) for label in LABELS] == list(recount.values())
    assert value.total == sum(recount.values())


@SMALL
@given(a=counts, b=counts, c=counts)
def test_merge_is_associative_and_commutative_with_an_identity(
    a: LabelledCounts, b: LabelledCounts, c: LabelledCounts
) -> None:
    empty = LabelledCounts.empty(LABELS)
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(b) == b.merge(a)
    assert a.merge(empty) == a == empty.merge(a)


def test_what_makes_no_sense_is_refused() -> None:
    value = LabelledCounts.empty(LABELS)
    with pytest.raises(ValueError, match="unknown label 'd'"):
        value.add("d")
    with pytest.raises(ValueError, match="unknown label 'd'"):
        value.get("d")
    with pytest.raises(ValueError, match="never falls"):
        value.add("a", -1)
    with pytest.raises(ValueError, match="labels differ"):
        value.merge(LabelledCounts.empty(("a", "b")))
    with pytest.raises(ValueError, match="negative"):
        LabelledCounts(labels=LABELS, values=(0, -1, 0))
    with pytest.raises(ValueError, match="distinct"):
        LabelledCounts.empty(("a", "a"))
    with pytest.raises(ValueError, match="one count"):
        LabelledCounts(labels=LABELS, values=(0, 0))
