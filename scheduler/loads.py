"""Pages that connectors bring for a sequence, before it has a slot."""

from kv.connectors.base import LATER, Later, Offer, Query
from kv.ledger import Row, held
from kv.moves import HOST, LOAD_FAILED, P2P, HostSource, Load, Loaded, Promised
from kv.types import DUMMY_PAGE
from scheduler.state import Fetch, SchedulerState, Segment, Sequence, Status, push_waiting
from scheduler.stores import offer_pages


def lookup(state: SchedulerState, sequence: Sequence, hit: int) -> tuple[Offer, ...] | Later:
    """What connectors can bring beyond a local hit of `hit` tokens."""
    if state.connector is None:
        return ()
    config, known = state.config, len(sequence.tokens)
    query = Query(
        request_id=sequence.request.request_id,
        names=sequence.names[1 : known // config.page_size + 1],
        num_tokens=known,
        num_computed=hit,
        page_size=config.page_size,
        windows=config.windows,
        remote=sequence.remote,
    )
    answer = state.connector.lookup(query)
    return LATER if isinstance(answer, Later) else tuple(answer)


def pages_to_load(state: SchedulerState, offers: tuple[Offer, ...]) -> int:
    """Pages that the offers fill, over all groups."""
    size = state.config.page_size
    total = 0
    for offer in offers:
        positions = -(-offer.num_tokens // size)
        lists = _needed(state, offer, positions)
        total += sum(sum(needed) for needed in lists)
    return total


def start_loads(
    state: SchedulerState, sequence: Sequence, found: list[list[int]], offers: tuple[Offer, ...], queried: int
) -> None:
    """Takes pages for what connectors offer and orders the loads. The caller has seen that there is room."""
    size, connector = state.config.page_size, state.connector
    if connector is None:
        raise ValueError("no connector is configured")
    request_id = sequence.request.request_id
    for pages in found:
        for page in pages:
            if page != DUMMY_PAGE:
                state.pages.share(page)
    fetch = Fetch(pages=[list(pages) for pages in found], hit=len(found[0]) * size, queried=queried)
    tables: list[list[int]] = [list(pages) for pages in found]
    for offer in offers:
        positions = -(-offer.num_tokens // size)
        targets = []
        for group, needed in enumerate(_needed(state, offer, positions)):
            taken, evicted = state.pages.take(sum(needed))
            for page in evicted:
                state.prefix.evict(page)
            fresh = iter(taken)
            targets.append(tuple(next(fresh) if wanted else DUMMY_PAGE for wanted in needed))
            tables[group] += targets[-1]
        load = Load(
            move_id=state.ledger.new_id(),
            connector=offer.connector,
            request_id=request_id,
            first_page=offer.first_page,
            pages=tuple(targets),
            num_tokens=offer.num_tokens,
            source=offer.source,
        )
        state.ledger.open(Row(move=load, pages=held(load.pages)))
        fetch.moves.add(load.move_id)
        state.news.commands.append(load)
    connector.allocated(request_id, tuple(map(tuple, tables)), offers)
    _count_lookup(state, sequence, fetch.hit, offers)
    sequence.fetch, sequence.status = fetch, Status.LOADING
    state.loading[request_id] = sequence


def pages_fetched(state: SchedulerState, sequence: Sequence) -> int:
    """Pages that a sequence holds without a slot, with those that are being loaded for it."""
    fetch = sequence.fetch
    if fetch is None:
        return 0
    rows = [row for move_id in fetch.moves if (row := state.ledger.get(move_id)) is not None]
    loaded = [group for segment in fetch.segments for group in segment.pages]
    return len(held(fetch.pages)) + len(held(loaded)) + sum(len(row.pages) for row in rows)


def not_loaded(state: SchedulerState, sequence: Sequence, hit: int) -> None:
    """A sequence is admitted without a load: connectors have nothing for it."""
    if state.connector is not None:
        _count_lookup(state, sequence, hit, ())
        let_peer_go(state, sequence)


def _count_lookup(state: SchedulerState, sequence: Sequence, hit: int, offers: tuple[Offer, ...]) -> None:
    """What was asked of connectors and promised by them at a request's admission, not when it resumes."""
    if sequence.preemptions or sequence.index or sequence.asked_again:
        return
    state.news.promised.append(
        Promised(
            request_id=sequence.request.request_id,
            queried_tokens=len(sequence.tokens) - hit,
            promised=tuple((offer.tier, offer.num_tokens) for offer in offers),
        )
    )


def _needed(state: SchedulerState, offer: Offer, positions: int) -> list[list[bool]]:
    """Per group and position: must a page be loaded there?

    A host tier says so with its slots; of a peer's pages a sliding-window group needs those that the tokens
    behind the load still see.
    """
    if isinstance(offer.source, HostSource):
        return [[slot != DUMMY_PAGE for slot in group] for group in offer.source.slots]
    size = state.config.page_size
    end = offer.first_page * size + offer.num_tokens
    lists = []
    for window in state.config.windows:
        # The last token is computed again, so the first query is the one at `end - 1`.
        seen = 0 if window is None else max(0, end - window) // size
        lists.append([offer.first_page + place >= seen for place in range(positions)])
    return lists


def loaded(state: SchedulerState, row: Row, load: Load, event: Loaded) -> list[tuple[Sequence, str]]:
    arrived = 0 if row.void or not event.safe else min(event.num_pages, len(load.pages[0]))
    sequence = state.sequences.get((load.request_id, 0))
    fetch = None if sequence is None else sequence.fetch
    mine = fetch is not None and load.move_id in fetch.moves
    if event.safe:
        state.ledger.close(row)
    else:
        state.ledger.quarantine(row)
    state.leaves[load.connector].load_ended(load.source, None if event.safe and row.void else arrived)
    kept = tuple(group[:arrived] if mine else () for group in load.pages)
    if event.safe:
        for page in set(row.pages).difference(held(kept)):
            state.pages.release(page)
    if sequence is None or fetch is None or not mine:
        return []
    size, asked = state.config.page_size, len(load.pages[0])
    begin = load.first_page * size
    fetch.moves.discard(load.move_id)
    fetch.segments.append(
        Segment(
            tier=HOST if isinstance(load.source, HostSource) else P2P,
            first=load.first_page,
            pages=kept,
            asked=asked,
            end=begin + load.num_tokens if arrived == asked else begin + arrived * size,
        )
    )
    if arrived < asked and fetch.error is None:
        fetch.error = event.error or "the pages did not arrive"
    return [] if fetch.moves else _fetched(state, sequence, fetch)


def _fetched(state: SchedulerState, sequence: Sequence, fetch: Fetch) -> list[tuple[Sequence, str]]:
    """All loads of a sequence have ended: the leading run of what arrived is its own."""
    let_peer_go(state, sequence)
    del state.loading[sequence.request.request_id]
    known, whole = len(sequence.tokens), True
    ends: list[tuple[str | None, int]] = [(None, fetch.hit)]
    for segment in sorted(fetch.segments, key=lambda segment: segment.first):
        if whole and segment.first == len(fetch.pages[0]):
            for mine, pages in zip(fetch.pages, segment.pages, strict=True):
                mine += pages
            ends.append((segment.tier, segment.end))
            whole = len(segment.pages[0]) == segment.asked
        else:
            for page in held(segment.pages):
                state.pages.release(page)
            whole = False
    fetch.segments.clear()
    arrived = ends[-1][1]
    usable = _usable(state, fetch, min(arrived, known - 1))
    if usable < min(arrived, known - 1):
        arrived = usable
        _cut(state, fetch, usable)
    fetch.tokens = usable
    fetch.sources = [(tier, min(end, arrived)) for tier, end in ends]
    _left_behind(state, fetch)
    _publish(state, sequence, fetch, fetch.tokens // state.config.page_size)
    state.fetched.append(sequence)
    transfer = state.config.transfer
    if fetch.error is not None and transfer is not None and transfer.failure_policy == "fail":
        return [(sequence, LOAD_FAILED)]
    if fetch.error is not None and fetch.tokens == fetch.hit and not sequence.asked_again:
        sequence.asked_again = True  # the peer is gone from the answers now, another tier may have something
        drop_fetch(state, sequence)
        push_waiting(state, sequence)
    return []


def _usable(state: SchedulerState, fetch: Fetch, tokens: int) -> int:
    """The longest prefix up to `tokens` behind which every group has the pages that a query sees.

    A load fills a sliding window only as far as its own end sees back, so one that came to less than that
    may be of no use to such a group.
    """
    size = state.config.page_size
    for end in (tokens, *range(tokens // size * size, fetch.hit, -size)):
        if all(
            DUMMY_PAGE not in pages[max(0, end - window + 1) // size : -(-end // size)]
            for window, pages in zip(state.config.windows, fetch.pages, strict=True)
            if window is not None
        ):
            return end
    return fetch.hit


def _cut(state: SchedulerState, fetch: Fetch, tokens: int) -> None:
    """Gives back pages behind the first `tokens` tokens, which are whole pages."""
    keep = tokens // state.config.page_size
    for pages in fetch.pages:
        for page in held([pages[keep:]]):
            state.pages.release(page)
        del pages[keep:]


def _left_behind(state: SchedulerState, fetch: Fetch) -> None:
    """A sliding window may skip pages between a local hit and a load: what lies before them is unseen too."""
    for pages in fetch.pages:
        last = max((entry for entry, page in enumerate(pages) if page == DUMMY_PAGE), default=0)
        for entry in range(last):
            if pages[entry] != DUMMY_PAGE:
                state.pages.release(pages[entry])
                pages[entry] = DUMMY_PAGE


def attribute(sequence: Sequence, tier: str | None, end: int) -> None:
    """Write-once: positions up to `end` that nothing has made usable before came from `tier`; None: the
    prefix cache. Only a prompt's first sequence is attributed, until its first token."""
    if sequence.prefilled or sequence.index != 0:
        return
    prompt = len(sequence.request.prompt_token_ids)
    new = max(0, min(end, prompt) - sequence.settled)
    if tier is None:
        sequence.hit += new
    elif new:
        sequence.external[tier] = sequence.external.get(tier, 0) + new
    sequence.settled = max(sequence.settled, min(end, prompt))


def _publish(state: SchedulerState, sequence: Sequence, fetch: Fetch, whole: int) -> None:
    """Enters the whole pages that arrived in the prefix cache, and offers them to the connectors."""
    first = fetch.hit // state.config.page_size
    for group, pages in enumerate(fetch.pages):
        for entry in range(first, whole):
            page = pages[entry]
            if page != DUMMY_PAGE and state.prefix.insert(group, sequence.names[entry + 1], page):
                state.pages.mark_cached(page)
    offer_pages(state, sequence, [pages[:whole] for pages in fetch.pages], first, whole)


def drop_fetch(state: SchedulerState, sequence: Sequence) -> None:
    """A sequence gives up what was fetched for it. Loads under way end by themselves."""
    fetch, sequence.fetch = sequence.fetch, None
    if fetch is None:
        return
    for page in (*held(fetch.pages), *held(group for entry in fetch.segments for group in entry.pages)):
        state.pages.release(page)
    if fetch.moves:
        del state.loading[sequence.request.request_id]
    else:
        state.fetched.remove(sequence)


def meet_peer(state: SchedulerState, sequence: Sequence) -> None:
    """A request came that a peer has computed."""
    remote = sequence.request.remote
    if state.connector is None or remote is None:
        return
    sequence.remote = remote
    state.remotes[sequence.request.request_id] = sequence
    state.news.commands += state.connector.arrived(sequence.request.request_id, remote)


def let_peer_go(state: SchedulerState, sequence: Sequence) -> None:
    """A sequence needs its peer no more: its load has ended, or it goes on without."""
    remote, sequence.remote = sequence.remote, None
    if state.connector is None or remote is None:
        return
    request_id = sequence.request.request_id
    del state.remotes[request_id]
    state.news.commands += state.connector.released(request_id, remote)
