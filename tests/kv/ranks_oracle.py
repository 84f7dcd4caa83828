"""What ranks say in any order, and what must be told of it: a second opinion that sees the whole history."""

from collections.abc import Callable

from hypothesis import strategies as st

from kv.moves import (
    Event,
    LeaseRead,
    LeaseTouched,
    Loaded,
    NotificationFailed,
    Safe,
    Stored,
)

LOADS, STORES, UNKNOWN = (1, 2), (3,), 77
"""Moves that were ordered, and one that never was."""
LEASED, REQUESTS = "a", ("d", "e")

History = list[tuple[int, Event]]
"""(rank, event) in the order in which polls see them."""
Due = list[tuple[int, Event]]
"""(index in the history at which it is due, merged event)."""


@st.composite
def reports_of_load(draw: st.DrawFn, move_id: int) -> list[Event]:
    """All that one rank says of a load: an answer, perhaps `Safe` later or never, perhaps something twice."""
    failed = draw(st.booleans())
    answer = Loaded(
        move_id=move_id,
        num_pages=draw(st.integers(0, 1)) if failed else 2,
        safe=not failed or draw(st.booleans()),
        error=draw(st.sampled_from(("late", "torn"))) if failed else None,
        stage=draw(st.sampled_from(("handshake", "transfer", "verify"))) if failed else "",
        num_bytes=draw(st.integers(0, 9)),
        num_descriptors=draw(st.integers(0, 9)),
        seconds=draw(st.sampled_from((0.0, 0.5, 2.0))),
        post_seconds=draw(st.sampled_from((0.0, 0.25))),
        digest_failures=draw(st.integers(0, 2)),
        retries=draw(st.integers(0, 1)),
    )
    said: list[Event] = [answer]
    if draw(st.booleans()):  # of a load that was safe, it means nothing
        said.append(Safe(move_id=move_id))
    if draw(st.booleans()):
        said.append(draw(st.sampled_from((Loaded(move_id=move_id, num_pages=0), said[-1]))))
    return said


@st.composite
def rank_scripts(draw: st.DrawFn) -> list[Event]:
    """What one rank says, in its order: reports of every move, and things that it should not say."""
    threads = [draw(reports_of_load(move_id)) for move_id in LOADS]
    for move_id in STORES:
        error = draw(st.sampled_from((None, "full", "torn")))
        threads.append([Stored(move_id=move_id, error=error, num_bytes=draw(st.integers(0, 9)))])
    noise: list[Event] = [
        Loaded(move_id=UNKNOWN, num_pages=1),
        Safe(move_id=UNKNOWN),
        Stored(move_id=LOADS[0]),
        Loaded(move_id=STORES[0], num_pages=1),
        Safe(move_id=LOADS[1]),
        Stored(move_id=STORES[0], error="again"),
        LeaseRead(request_id=LEASED, at_s=draw(st.sampled_from((1.0, 2.0)))),
        LeaseRead(request_id="never leased", at_s=3.0),
        LeaseTouched(request_ids=(LEASED, "b"), at_s=draw(st.sampled_from((1.0, 2.0)))),
        *(NotificationFailed(request_id=name) for name in REQUESTS),
    ]
    threads += [[event] for event in draw(st.lists(st.sampled_from(noise), max_size=8))]
    order = draw(st.permutations([index for index, said in enumerate(threads) for _ in said]))
    rest = [iter(said) for said in threads]
    return [next(rest[index]) for index in order]


@st.composite
def polls(draw: st.DrawFn) -> list[list[list[Event]]]:
    """Per poll and rank, what the rank says then."""
    count, number = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    seen: list[list[list[Event]]] = [[[] for _ in range(count)] for _ in range(number)]
    for rank in range(count):
        script = draw(rank_scripts())
        when = draw(st.lists(st.integers(0, number - 1), min_size=len(script), max_size=len(script)))
        for poll, event in zip(sorted(when), script, strict=True):
            seen[poll][rank].append(event)
    return seen


def told(history: History, count: int) -> list[Event]:
    """All merged events that `count` ranks' history has made due, in order."""
    due: Due = []
    for move_id in LOADS:
        due += told_of_load(history, count, move_id)
    for move_id in STORES:
        due += told_of_store(history, count, move_id)
    for name in (LEASED, "never leased"):
        due += told_of_lease(history, count, name)
    for name in REQUESTS:
        due += [
            (at, said) for at, (_, said) in enumerate(history) if said == NotificationFailed(request_id=name)
        ][:1]
    due += [(at, said) for at, (_, said) in enumerate(history) if isinstance(said, LeaseTouched)]
    return [event for _, event in sorted(due, key=lambda entry: entry[0])]


def told_of_load(history: History, count: int, move_id: int) -> Due:
    """A load's merged events."""
    firsts = _firsts(history, count, lambda event: isinstance(event, Loaded) and event.move_id == move_id)
    if firsts is None:
        return []
    answers = [event for _, event in firsts if isinstance(event, Loaded)]
    all_answered = max(at for at, _ in firsts)
    safe_at: list[float] = []
    for rank, (at, _) in enumerate(firsts):
        later = [i for i in range(at, len(history)) if history[i] == (rank, Safe(move_id=move_id))]
        safe_at.append(at if answers[rank].safe else min(later, default=float("inf")))
    all_safe = max(safe_at)
    blamed = next((answer for answer in answers if answer.error is not None), Loaded(move_id=0, num_pages=0))
    merged = Loaded(
        move_id=move_id,
        num_pages=min(answer.num_pages for answer in answers),
        safe=all_safe <= all_answered,
        error=blamed.error,
        stage=blamed.stage,
        num_bytes=sum(answer.num_bytes for answer in answers),
        num_descriptors=sum(answer.num_descriptors for answer in answers),
        seconds=max(answer.seconds for answer in answers),
        post_seconds=max(answer.post_seconds for answer in answers),
        digest_failures=sum(answer.digest_failures for answer in answers),
        retries=max(answer.retries for answer in answers),
    )
    due: Due = [(all_answered, merged)]
    if all_answered < all_safe < float("inf"):
        due.append((int(all_safe), Safe(move_id=move_id)))
    return due


def told_of_store(history: History, count: int, move_id: int) -> Due:
    """A store's merged event."""
    firsts = _firsts(history, count, lambda event: isinstance(event, Stored) and event.move_id == move_id)
    if firsts is None:
        return []
    answers = [event for _, event in firsts if isinstance(event, Stored)]
    merged = Stored(
        move_id=move_id,
        error=next((answer.error for answer in answers if answer.error is not None), None),
        num_bytes=sum(answer.num_bytes for answer in answers),
    )
    return [(max(at for at, _ in firsts), merged)]


def told_of_lease(history: History, count: int, name: str) -> Due:
    """The merged event of a lease that is given at most once in this history."""
    firsts = _firsts(history, count, lambda event: isinstance(event, LeaseRead) and event.request_id == name)
    if firsts is None:
        return []
    at_s = max(event.at_s for _, event in firsts if isinstance(event, LeaseRead))
    return [(max(at for at, _ in firsts), LeaseRead(request_id=name, at_s=at_s))]


def _firsts(history: History, count: int, wanted: Callable[[Event], bool]) -> Due | None:
    """When each rank first said something, and what; None: not all have."""
    found: Due = []
    for rank in range(count):
        said = [(at, event) for at, (who, event) in enumerate(history) if who == rank and wanted(event)]
        if not said:
            return None
        found.append(said[0])
    return found
