"""NIXL and a host tier in one MultiConnector, as the scheduler builds it: who loads, who saves, who holds."""

import inspect
import json
from dataclasses import replace

import pytest

from jaxserve.movers import Movers
from jaxserve.report_moves import observe_events
from jaxserve.warn_once import reset, warn_of_roles
from kv.config import TransferConfigError, parse
from kv.connectors.base import LATER, Connector, FullPages, Later, LeaseOrder, Offer, Query, StoreOrder
from kv.connectors.build import build
from kv.connectors.multi import MultiConnector
from kv.connectors.nixl import NixlConnector
from kv.connectors.offloading import OffloadingConnector
from kv.connectors.simple_cpu import SimpleCpuOffloadConnector
from kv.moves import HOST, P2P, HostSource, Load, Loaded, RemoteSource, Store, Stored, Track, Untrack
from metrics.moves import MoveStats
from scheduler.state import initial_state
from tests.scheduler.test_loads import Hand, arrive
from tests.scheduler.test_moves import LIMITS, NIXL_D, NIXL_P, OFFLOAD, SIMPLE, config, multi, stats
from tests.scheduler.world import expected_output, request

SIZE = 4
NAMES = [bytes([number]) * 16 for number in range(1, 9)]
REMOTE = RemoteSource(
    engine_id="p", epoch="0" * 32, host="h", port=1, request_id="a", pages=((1, 2, 3, 4, 5),),
    generations=((1, 1, 1, 1, 1),), num_tokens=18, page_size=SIZE,
)  # fmt: skip
BOTH_ORDERS = pytest.mark.parametrize("nixl_first", [True, False], ids=["nixl first", "host first"])
TIERS = pytest.mark.parametrize("tier", [SIMPLE, OFFLOAD], ids=["simple", "offload"])


def pair(tier=SIMPLE, nixl_first: bool = True, **fields):
    """The MultiConnector of a configuration, its leaves, and where NIXL and the tier stand among them."""
    children = (NIXL_D, tier) if nixl_first else (tier, NIXL_D)
    connector, leaves = build(multi(*children, **fields), windows=(None,), page_size=SIZE)
    return connector, leaves, *((0, 1) if nixl_first else (1, 0))


def query(remote=REMOTE, computed: int = 0, tokens: int = 18) -> Query:
    return Query(
        request_id="a", names=NAMES[: tokens // SIZE], num_tokens=tokens, num_computed=computed,
        page_size=SIZE, windows=(None,), remote=remote,
    )  # fmt: skip


def full(first: int, last: int, request_id: str = "a") -> FullPages:
    return FullPages(
        request_id=request_id, names=NAMES[:last], tables=(tuple(range(10, 10 + last)),), first=first,
        last=last, num_prompt_tokens=32, page_size=SIZE,
    )  # fmt: skip


def save(connector, leaves, pages: int) -> None:
    """Puts the first pages into every tier."""
    for order in connector.offer(full(0, pages)):
        leaves[order.connector].stored(order.slots, True)


class Recording:
    """A child that notes what it is told and answers what it was given."""

    supports_hma = True

    def __init__(self, answer=()) -> None:
        self.answer, self.told, self.commands, self.orders = answer, [], [], []
        self.lease: LeaseOrder | None = None

    def arrived(self, request_id, remote):
        return self.commands

    def released(self, request_id, remote):
        return self.commands

    def lookup(self, query):
        return self.answer

    def allocated(self, request_id, pages, offers) -> None:
        self.told.append((request_id, pages, tuple(offers)))

    def offer(self, pages):
        return self.orders

    def offer_idle(self, idle):
        return self.orders

    def finished(self, request_id, *, wants_lease, completed):
        return self.lease

    def take_outcomes(self):
        return [(0, "stored", 1)]

    def tiers(self):
        return [(0, 1, 0, 0, 8)]


def offer_of(place: int, tokens: int = 8) -> Offer:
    source = HostSource(slots=((1, 2),))
    return Offer(connector=place, tier=HOST, num_tokens=tokens, first_page=0, source=source)


@BOTH_ORDERS
@TIERS
def test_tokens_are_loaded_from_the_first_child_that_has_some(tier, nixl_first):
    connector, leaves, nixl, host = pair(tier, nixl_first)
    (offer,) = connector.lookup(query())
    assert (offer.connector, offer.tier, offer.num_tokens) == (nixl, P2P, 18)
    save(connector, leaves, 4)
    (offer,) = connector.lookup(query())
    assert offer.connector == 0 and offer.tier == (P2P if nixl_first else HOST)
    (offer,) = connector.lookup(query(remote=None))
    assert (offer.connector, offer.tier, offer.num_tokens) == (host, HOST, 16)
    assert connector.lookup(query(remote=None, computed=16)) == ()


def test_every_child_that_can_save_saves():
    children = (SIMPLE, NIXL_D, OFFLOAD)
    connector, leaves = build(multi(*children), windows=(None,), page_size=SIZE)
    orders = connector.offer(full(0, 3))
    assert [(order.connector, order.pages) for order in orders] == [(0, (10, 11, 12)), (2, (10, 11, 12))]
    for order in orders:
        leaves[order.connector].stored(order.slots, True)
    assert [(place, used) for place, used, *_ in connector.tiers()] == [(0, 3), (2, 3)]
    assert sorted(connector.take_outcomes()) == [(0, "stored", 3), (2, "stored", 3)]


@BOTH_ORDERS
def test_any_child_that_says_later_defers_the_request(nixl_first):
    connector, leaves, _, host = pair(SIMPLE, nixl_first)
    (order,) = connector.offer(full(0, 4))
    assert isinstance(connector.lookup(query()), Later)
    leaves[host].stored(order.slots, True)
    assert not isinstance(connector.lookup(query()), Later)
    for place in range(3):
        answers = [(offer_of(0),), (offer_of(1),), (offer_of(2),)]
        answers[place] = LATER
        assert isinstance(MultiConnector([Recording(answer) for answer in answers]).lookup(query()), Later)


@pytest.mark.parametrize("chosen", [None, 0, 1, 2])
def test_children_that_load_nothing_get_the_real_pages_and_no_tokens(chosen):
    children = [Recording() for _ in range(3)]
    offers = () if chosen is None else (offer_of(chosen),)
    pages = ((7, 8, 9),)
    MultiConnector(children).allocated("a", pages, offers)
    for place, child in enumerate(children):
        assert child.told == [("a", pages, offers if place == chosen else ())]


def test_commands_of_all_children_come_in_their_order_and_name_them():
    children = [Recording(), Recording(), Recording()]
    for place, child in enumerate(children):
        child.commands = [
            Track(connector=place, request_id="a", source=REMOTE), Untrack(connector=place, request_id="a")
        ]  # fmt: skip
        child.orders = [StoreOrder(connector=place, pages=(place + 1,), slots=(place + 1,))]
    connector = MultiConnector(children)
    for commands in (connector.arrived("a", REMOTE), connector.released("a", REMOTE)):
        assert [command.connector for command in commands] == [0, 0, 1, 1, 2, 2]
    assert [order.connector for order in connector.offer(full(0, 1))] == [0, 1, 2]
    assert [order.connector for order in connector.offer_idle([])] == [0, 1, 2]
    assert len(connector.tiers()) == len(connector.take_outcomes()) == 3


@BOTH_ORDERS
def test_a_child_is_named_by_its_place_in_what_it_orders(nixl_first):
    connector, leaves, nixl, host = pair(SIMPLE, nixl_first)
    (track,) = connector.arrived("a", REMOTE)
    (untrack,) = connector.released("a", REMOTE)
    assert track == Track(connector=nixl, request_id="a", source=REMOTE)
    assert untrack == Untrack(connector=nixl, request_id="a")
    (order,) = connector.offer(full(0, 2))
    assert order.connector == host and leaves[host] is connector.children[host]


@BOTH_ORDERS
def test_statistics_are_kept_per_class_of_child(nixl_first):
    kinds = tuple(leaf.kind for leaf in ((NIXL_D, SIMPLE) if nixl_first else (SIMPLE, NIXL_D)))
    nixl, host = kinds.index(NIXL_D.kind), kinds.index(SIMPLE.kind)
    movers = Movers(kinds)
    movers.start(
        [
            Load(
                move_id=1, connector=nixl, request_id="a", first_page=0, pages=((1, 2),), num_tokens=8,
                source=REMOTE,
            ),
            Store(move_id=2, connector=host, pages=(3,), slots=(3,)),
        ]
    )  # fmt: skip
    events = [
        Loaded(move_id=1, num_pages=2, num_bytes=100, num_descriptors=2, seconds=0.5),
        Stored(move_id=2, num_bytes=70, seconds=0.25),
    ]
    seen = observe_events(MoveStats.empty(kinds), events, movers)
    assert seen.nixl is not None and seen.simple is not None and seen.offload is None
    assert seen.nixl.read_bytes.count == 1 and seen.simple.stores.num_bytes == 70
    assert seen.simple.loads.num_bytes == 0
    assert observe_events(seen, events, movers) == seen, "an answer was counted twice"


class NoHma(Recording):
    supports_hma = False


@pytest.mark.parametrize(
    ("children", "all_of_them"),
    [
        ([], False),
        ([Recording()], True),
        ([NoHma()], False),
        ([Recording(), Recording()], True),
        ([Recording(), NoHma()], False),
        ([NoHma(), Recording()], False),
    ],
)
def test_hybrid_allocation_is_supported_where_every_child_supports_it(children, all_of_them):
    assert MultiConnector(children).supports_hma is all_of_them


@BOTH_ORDERS
@TIERS
def test_the_real_pair_supports_hybrid_allocation(tier, nixl_first):
    assert pair(tier, nixl_first)[0].supports_hma is True


def test_hybrid_allocation_that_a_child_lacks_fails_at_start(monkeypatch):
    monkeypatch.setattr(SimpleCpuOffloadConnector, "supports_hma", False)
    build(multi(NIXL_D, SIMPLE), windows=(None,), page_size=SIZE)
    with pytest.raises(ValueError, match="MultiConnector cannot move pages of 2 page groups"):
        build(multi(NIXL_D, SIMPLE), windows=(None, 8), page_size=SIZE)
    with pytest.raises(ValueError, match="page groups"):
        initial_state(config(multi(NIXL_D, SIMPLE), windows=(None, 8)))
    build(multi(NIXL_D, OFFLOAD), windows=(None, 8), page_size=SIZE)


def test_two_children_that_would_set_the_same_keys_are_an_error():
    first, second = Recording(), Recording()
    connector = MultiConnector([first, second])
    assert connector.finished("a", wants_lease=True, completed=True) is None
    second.lease = LeaseOrder(connector=1)
    assert connector.finished("a", wants_lease=True, completed=True) == LeaseOrder(connector=1)
    first.lease = LeaseOrder(connector=0)
    with pytest.raises(ValueError, match="same keys"):
        connector.finished("a", wants_lease=True, completed=True)
    nixl = {"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}
    extra = {"connectors": [nixl, nixl]}
    with pytest.raises(TransferConfigError, match="two NixlConnectors"):
        parse(
            json.dumps(
                {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
            )
        )


@BOTH_ORDERS
@TIERS
def test_only_the_nixl_child_of_a_producer_keeps_pages_for_a_peer(tier, nixl_first):
    children = (NIXL_P, tier) if nixl_first else (tier, NIXL_P)
    connector, _ = build(multi(*children), windows=(None,), page_size=SIZE)
    want = LeaseOrder(connector=0 if nixl_first else 1)
    assert connector.finished("a", wants_lease=True, completed=True) == want
    assert connector.finished("a", wants_lease=False, completed=True) is None
    assert connector.finished("a", wants_lease=True, completed=False) is None


def child(role: str) -> str:
    tier = {
        "kv_connector": "SimpleCPUOffloadConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 20},
    }  # fmt: skip
    nixl = {"kv_connector": "NixlConnector", "kv_role": role}
    extra = {"connectors": [nixl, tier]}
    return json.dumps(
        {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    )


def said(role: str, caplog) -> list[str]:
    reset()
    with caplog.at_level("WARNING"):
        warn_of_roles(parse(child(role)))
    reset()
    return [record.getMessage() for record in caplog.records]


def test_kv_both_deprecation_warning(caplog):
    (message,) = said("kv_both", caplog)
    assert "kv_role='kv_both'" in message and "deprecated" in message


@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer"])
def test_explicit_kv_role_no_deprecation_warning(role, caplog):
    assert said(role, caplog) == []


def test_pages_stay_held_until_every_asynchronous_save_of_them_has_ended():
    for order in ((0, 1), (1, 0)):
        world = Hand(config(multi(SIMPLE, OFFLOAD), pages=20), LIMITS)
        world.step(arrivals=(request("a", range(8), max_tokens=1),))
        while not world.under_way:
            world.step()
        plan = world.step()
        assert ("a", 0) in world.finished and plan.gauges.pages_in_use == 2
        stores = {move.connector: move for move in world.under_way}
        assert set(stores) == {0, 1} and stores[0].pages == stores[1].pages
        world.under_way.clear()
        plan = world.step(events=(world._store(stores[order[0]]),))
        assert plan.gauges.pages_in_use == 2 and plan.moves.gauges.storing_pages == 2
        plan = world.step(events=(world._store(stores[order[1]]),))
        assert plan.gauges.pages_in_use == 0 and plan.gauges.pages_idle == 2


@BOTH_ORDERS
@TIERS
def test_a_prompt_goes_through_both_children_and_is_counted_where_it_came_from(tier, nixl_first):
    children = (NIXL_D, tier) if nixl_first else (tier, NIXL_D)
    world = Hand(config(multi(*children)), LIMITS)
    arrive(world, "a", range(18))
    world.settle()
    assert stats(world, "a") == (0, 0, 18)
    assert dict(world.prefilled["a"].external_by_tier) == {"p2p": 18}
    world.step(reset_prefix_cache=True)
    arrive(world, "b", range(18), remote=False)  # what a peer brought was saved by the host tier
    world.settle()
    assert stats(world, "b") == (2, 0, 16)
    assert dict(world.prefilled["b"].external_by_tier) == {"host": 16}
    for name in ("a", "b"):
        assert world.output(name) == expected_output(world.requests[name], 64)


def test_every_public_method_of_the_protocol_is_there_in_every_connector():
    wanted = {name for name in vars(Connector) if not name.startswith("_")}
    assert len(wanted) > 10
    for kind in (NixlConnector, OffloadingConnector, SimpleCpuOffloadConnector, MultiConnector):
        for name in wanted:
            ours = inspect.getattr_static(kind, name)
            if inspect.isfunction(ours):
                theirs = inspect.signature(getattr(Connector, name)).parameters
                assert list(inspect.signature(ours).parameters) == list(theirs), f"{kind.__name__}.{name}"
            else:
                assert name == "supports_hma"


def test_a_tier_that_stores_while_a_peer_loads_gets_the_pages_only_when_they_are_good():
    world = Hand(config(multi(NIXL_D, replace(SIMPLE, host_slots=8))), LIMITS)
    plan = arrive(world, "a", range(18))
    assert not any(isinstance(command, Store) for command in plan.moves.commands)
    plan = world.step(events=tuple(world.end_loads(2)))
    stores = [command for command in plan.moves.commands if isinstance(command, Store)]
    assert sum(len(store.pages) for store in stores) == 2
    world.settle()
    assert stats(world, "a") == (10, 0, 8)
