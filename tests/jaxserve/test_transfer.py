"""What requests may ask of this engine's connectors, and what a configuration comes to."""

import importlib
from dataclasses import replace

import pytest

from jaxserve.config import ConfigError
from jaxserve.outputs import RequestRefused
from jaxserve.transfer import Door, sized
from kv.config import BOTH, CONSUMER, MULTI, NIXL, OFFLOADING, PRODUCER, SIMPLE_CPU, ConnectorConfig
from kv.moves import LeaseTerms
from kv.nixl import NixlUnavailable, make_agent
from kv.seal import Identity
from kv.types import KvSpec, PageGroup
from scheduler.types import Request, SamplingParams

KEY = bytes(range(32))
PROMPT = tuple(range(10))
SPEC = KvSpec(
    groups=(PageGroup(name="all", layers=(0, 1), kv_heads=2, head_dim=8),), page_size=16, dtype="float32"
)
WHO = Identity(engine_id="p", epoch="0" * 32, host="localhost", port=5600, tp_size=1, page_size=16)
TERMS = LeaseTerms(request_id="p-1", pages=((3,),), generations=((1,),), num_tokens=10, cached_tokens=4)
LEASE = {"do_remote_decode": True, "do_remote_prefill": False}


def request(prompt=PROMPT, salt: str = "") -> Request:
    return Request(
        request_id="p-1", prompt_token_ids=tuple(prompt), sampling=SamplingParams(), eos_token_ids=(),
        cache_salt=salt,
    )  # fmt: skip


def door(role: str, *, multi: bool = False) -> Door:
    config = ConnectorConfig(kind=NIXL, role=role)
    if multi:
        tier = ConnectorConfig(kind=SIMPLE_CPU, role=BOTH)
        config = ConnectorConfig(kind=MULTI, role=BOTH, children=(tier, config))
    return Door(config=config, key=KEY, identity=WHO)


def source() -> dict:
    """The parameters that a producer's answer carries, as D is given them."""
    return dict(door(PRODUCER).seal(TERMS, request()))


MULTIS = pytest.mark.parametrize("multi", [False, True])


@MULTIS
@pytest.mark.parametrize(("role", "taken"), [(PRODUCER, True), (CONSUMER, False), (BOTH, True)])
def test_a_lease_is_given_by_engines_that_serve_peers(role, taken, multi):
    if taken:
        assert door(role, multi=multi).open(LEASE, PROMPT, "").lease
        return
    with pytest.raises(RequestRefused, match="kv_consumer and takes no do_remote_decode"):
        door(role, multi=multi).open(LEASE, PROMPT, "")


@MULTIS
@pytest.mark.parametrize(("role", "taken"), [(PRODUCER, False), (CONSUMER, True), (BOTH, True)])
def test_pages_are_taken_by_engines_that_read_from_peers(role, taken, multi):
    if taken:
        remote = door(role, multi=multi).open(source(), PROMPT, "").remote
        assert (remote.request_id, remote.num_tokens, remote.pages) == ("p-1", 10, ((3,),))
        assert remote.cached_tokens == 4
        return
    with pytest.raises(RequestRefused, match="kv_producer and takes no do_remote_prefill"):
        door(role, multi=multi).open(source(), PROMPT, "")


@pytest.mark.parametrize("role", [PRODUCER, CONSUMER, BOTH])
@pytest.mark.parametrize("params", [{}, {"do_remote_decode": False, "do_remote_prefill": False}])
def test_parameters_that_ask_for_nothing_are_nothing(role, params):
    opened = door(role).open(params, PROMPT, "")
    assert opened.remote is None and not opened.lease


@pytest.mark.parametrize(
    "config", [None, ConnectorConfig(kind=SIMPLE_CPU, role=BOTH), ConnectorConfig(kind=OFFLOADING, role=BOTH)]
)
def test_an_engine_without_nixl_refuses_by_name(config):
    for params in (LEASE, source()):
        with pytest.raises(RequestRefused, match="no NixlConnector"):
            Door(config=config).open(params, PROMPT, "")
    assert not Door(config=config).open({}, PROMPT, "").lease


@pytest.mark.parametrize(
    ("prompt", "salt", "key"),
    [(PROMPT[:-1], "", KEY), (PROMPT[::-1], "", KEY), (PROMPT, "x", KEY), (PROMPT, "", b"k" * 32)],
)
def test_pages_of_another_prompt_salt_or_key_are_refused(prompt, salt, key):
    with pytest.raises(RequestRefused) as refused:
        replace(door(CONSUMER), key=key).open(source(), prompt, salt)
    assert refused.value.param == "kv_transfer_params"


def test_an_engine_that_nobody_can_read_seals_nothing():
    with pytest.raises(RuntimeError, match="no peer"):
        Door().seal(TERMS, request())


def tier(kind: str, **fields) -> ConnectorConfig:
    return ConnectorConfig(kind=kind, role=BOTH, **fields)


def test_host_tiers_are_sized_in_whole_pages_and_chunks():
    page = SPEC.page_bytes
    made = sized(tier(SIMPLE_CPU, cpu_bytes=3 * page + 1), SPEC, 10)
    assert (made.host_slots, made.pages_per_chunk) == (3, 1)
    made = sized(tier(OFFLOADING, cpu_bytes=8 * page, block_size=64), SPEC, 10)
    assert (made.host_slots, made.pages_per_chunk) == (8, 4)
    nixl = ConnectorConfig(kind=NIXL, role=CONSUMER)
    both = ConnectorConfig(kind=MULTI, role=BOTH, children=(nixl, tier(SIMPLE_CPU, cpu_bytes=page)))
    made = sized(both, SPEC, 10)
    assert made.children[0] == nixl and made.children[1].host_slots == 1
    assert sized(nixl, SPEC, 10) == nixl


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (tier(SIMPLE_CPU, cpu_bytes=SPEC.page_bytes - 1), "less than one page"),
        (tier(OFFLOADING, cpu_bytes=1), "less than one page"),
        (tier(OFFLOADING, cpu_bytes=1 << 20, block_size=24), "block_size 24 must be a multiple"),
        (tier(OFFLOADING, cpu_bytes=1 << 20, block_size=8), "block_size 8 must be a multiple"),
        (tier(OFFLOADING, cpu_bytes=3 * SPEC.page_bytes, block_size=64), "fit into cpu_bytes_to_use"),
    ],
)
@MULTIS
def test_a_tier_that_cannot_be_cut_into_pages_is_one_clear_line(config, says, multi):
    if multi:
        config = ConnectorConfig(kind=MULTI, role=BOTH, children=(config,))
    with pytest.raises(ConfigError) as refused:
        sized(config, SPEC, 10)
    message = str(refused.value)
    assert message.startswith("--kv-transfer-config: ") and says in message and "\n" not in message


@pytest.mark.parametrize("error", [ImportError("no module\nnamed nixl"), OSError("libucp.so: not found")])
def test_without_nixl_one_line_says_what_to_install(error, monkeypatch):
    def missing(name: str):
        raise error

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(NixlUnavailable) as refused:
        make_agent("d")
    message = str(refused.value)
    assert "pip install" in message and "\n" not in message
