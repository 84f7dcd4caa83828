"""MultiConnector: several connectors as one.

Loads come from the first child, in order, that has tokens; every full page is offered to all of them; any
child that answers "later" defers the request (semantics of vLLM's MultiConnector). With `compose`, beyond
vLLM, a prefix may come from one child and the rest from others: tiers of this machine first, peers after.
"""

from collections.abc import Sequence
from dataclasses import replace

from kv.connectors.base import (
    LATER,
    Answer,
    Connector,
    FullPages,
    Later,
    LeaseOrder,
    Offer,
    Query,
    StoreOrder,
)
from kv.moves import HOST, Command, HostSource, PageLists, RemoteSource


class MultiConnector:
    """Asks, tells and adds up; decides nothing but whose tokens are loaded.

    Attributes:
        children: in the order of the configuration; a child's place is its index in commands.
    """

    __slots__ = ("_compose", "children")

    def __init__(self, children: Sequence[Connector], *, compose: bool = False) -> None:
        self.children = tuple(children)
        self._compose = compose

    @property
    def supports_hma(self) -> bool:
        """All children do: one that does not would store or send pages of a sliding window that have been
        taken for other content. No children support nothing."""
        return bool(self.children) and all(child.supports_hma for child in self.children)

    def arrived(self, request_id: str, remote: RemoteSource | None) -> Sequence[Command]:
        """Told to all."""
        return [command for child in self.children for command in child.arrived(request_id, remote)]

    def lookup(self, query: Query) -> Answer:
        """Asks every child, so that the answer does not depend on which one would have said "later"."""
        answers: list[tuple[Offer, ...]] = []
        for child in self.children:
            answer = child.lookup(query)
            if isinstance(answer, Later):
                return LATER
            answers.append(answer)
        if self._compose:
            return self._composed(query, answers)
        return next((answer for answer in answers if answer), ())

    def _composed(self, query: Query, answers: Sequence[tuple[Offer, ...]]) -> Answer:
        """Cheapest first; the next child is asked for what lies beyond."""
        order = sorted(
            (place for place, answer in enumerate(answers) if answer),
            key=lambda place: (answers[place][0].tier != HOST, place),
        )
        taken: list[Offer] = []
        done = query.num_computed
        for place in order:
            offers = answers[place]
            if taken:
                if done >= query.num_tokens or done % query.page_size:
                    break
                answer = self.children[place].lookup(replace(query, num_computed=done))
                if isinstance(answer, Later):
                    return LATER
                offers = answer
            taken += offers
            done += sum(offer.num_tokens for offer in offers)
        return tuple(taken)

    def allocated(self, request_id: str, pages: PageLists, offers: Sequence[Offer]) -> None:
        """The chosen child gets its offers; the others get the real pages with no tokens to load."""
        for place, child in enumerate(self.children):
            child.allocated(request_id, pages, [offer for offer in offers if offer.connector == place])

    def load_ended(self, source: RemoteSource | HostSource, num_pages: int | None = None) -> None:
        """The scheduler tells the child itself."""
        raise ValueError("a load ends at the child that ordered it")

    def offer(self, pages: FullPages) -> Sequence[StoreOrder]:
        """All children save."""
        return [order for child in self.children for order in child.offer(pages)]

    def offer_idle(self, idle: Sequence[tuple[int, int, bytes]]) -> Sequence[StoreOrder]:
        """All children save."""
        return [order for child in self.children for order in child.offer_idle(idle)]

    def stored(self, slots: Sequence[int], ok: bool) -> None:
        """The scheduler tells the child itself."""
        raise ValueError("a store ends at the child that ordered it")

    def finished(self, request_id: str, *, wants_lease: bool, completed: bool) -> LeaseOrder | None:
        """At most one child answers a request's client.

        Raises:
            ValueError: two children would set the same keys of `kv_transfer_params`.
        """
        orders = [
            order
            for child in self.children
            if (order := child.finished(request_id, wants_lease=wants_lease, completed=completed)) is not None
        ]
        if len(orders) > 1:
            raise ValueError("two connectors set the same keys of kv_transfer_params")
        return orders[0] if orders else None

    def released(self, request_id: str, remote: RemoteSource | None) -> Sequence[Command]:
        """Told to all."""
        return [command for child in self.children for command in child.released(request_id, remote)]

    def take_outcomes(self) -> Sequence[tuple[int, str, int]]:
        """Of all children."""
        return [outcome for child in self.children for outcome in child.take_outcomes()]

    def tiers(self) -> Sequence[tuple[int, int, int, int, int]]:
        """Of all children."""
        return [tier for child in self.children for tier in child.tiers()]

    def reset(self) -> None:
        """All children forget."""
        for child in self.children:
            child.reset()

    def check(self) -> None:
        """Recounts all children."""
        for child in self.children:
            child.check()
