"""The ledger counts what its rows hold, whatever is opened, quarantined and closed in whatever order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.ledger import Kind, Ledger, Row, held
from kv.moves import HostSource, Lease, Load, Store
from kv.types import DUMMY_PAGE


def load(move_id: int, pages=(1, 2)) -> Row:
    move = Load(
        move_id=move_id, connector=0, request_id="a", first_page=0, pages=(tuple(pages),), num_tokens=8,
        source=HostSource(slots=(tuple(pages),)),
    )  # fmt: skip
    return Row(move=move, pages=held(move.pages))


def store(move_id: int, pages=(3,)) -> Row:
    return Row(move=Store(move_id=move_id, connector=0, pages=tuple(pages), slots=(1,)), pages=tuple(pages))


def lease(move_id: int, name: str = "a", deadline_s: float = 1.0) -> Row:
    move = Lease(
        move_id=move_id, connector=0, request_id=name, pages=((4,),), generations=((1,),), num_tokens=4
    )
    return Row(move=move, pages=(4,), deadline_s=deadline_s)


def test_numbers_are_never_given_twice():
    ledger = Ledger()
    assert [ledger.new_id() for _ in range(3)] == [1, 2, 3]
    ledger.open(store(3))
    ledger.close(ledger.get(3))
    assert ledger.new_id() == 4 and ledger.get(3) is None and len(ledger) == 0


def test_a_number_or_a_name_in_use_is_refused_and_changes_nothing():
    ledger = Ledger()
    ledger.open(lease(1))
    for row, why in ((store(1), "under way already"), (lease(2), "has a lease already")):
        with pytest.raises(ValueError, match=why):
            ledger.open(row)
        ledger.check()
    assert len(ledger) == 1 and ledger.get(2) is None and ledger.count(Kind.STORE) == 0


def test_a_load_in_quarantine_is_counted_there_alone():
    ledger, row = Ledger(), load(1)
    ledger.open(row)
    ledger.quarantine(row)
    ledger.quarantine(row)
    assert (ledger.count(Kind.LOAD), ledger.quarantined) == (0, 2)
    ledger.check()
    ledger.close(row)
    assert (ledger.count(Kind.LOAD), ledger.quarantined) == (0, 0)


def test_leases_are_found_by_name_and_the_next_deadline_is_the_earliest():
    ledger = Ledger()
    assert ledger.next_deadline() is None and ledger.lease("a") is None
    rows = [lease(1, "a", 5.0), lease(2, "b", 3.0), lease(3, "c", 4.0)]
    for row in rows:
        ledger.open(row)
    assert ledger.next_deadline() == 3.0 and ledger.lease("c") is rows[2] and ledger.leases() == rows
    ledger.close(rows[1])
    assert ledger.next_deadline() == 4.0 and ledger.num_leases == 2
    rows[2].deadline_s = 9.0
    assert ledger.next_deadline() == 5.0


def test_dummy_pages_are_held_by_nobody():
    assert held(((DUMMY_PAGE, 3), (5, DUMMY_PAGE), ())) == (3, 5)


@given(
    st.lists(st.tuples(st.sampled_from(["load", "store", "lease", "quarantine", "close"]), st.integers(0, 5)))
)
def test_the_counts_are_those_of_the_rows_after_every_change(acts):
    ledger = Ledger()
    for act, number in acts:
        rows = list(ledger)
        match act:
            case "load":
                ledger.open(load(ledger.new_id(), range(1, 1 + number)))
            case "store":
                ledger.open(store(ledger.new_id(), range(1, 1 + number)))
            case "lease" if ledger.lease(str(number)) is None:
                ledger.open(lease(ledger.new_id(), str(number), float(number)))
            case "quarantine" if number < len(rows) and rows[number].kind is Kind.LOAD:
                ledger.quarantine(rows[number])
            case "close" if number < len(rows):
                ledger.close(rows[number])
            case _:
                pass
        ledger.check()
        leases = [row for row in ledger if row.kind is Kind.LEASE]
        assert ledger.num_leases == len(leases)
        assert ledger.next_deadline() == min((row.deadline_s for row in leases), default=None)
    for row in tuple(ledger):
        ledger.close(row)
    ledger.check()
    assert ledger.quarantined == 0 and all(ledger.count(kind) == 0 for kind in Kind)
