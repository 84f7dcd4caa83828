"""`--kv-transfer-config`: what is understood, and that everything else is one clear line."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv.config import (
    DEFAULT_CPU_BYTES,
    ConnectorConfig,
    TransferConfigError,
    deprecated_roles,
    nixl_leaf,
    parse,
)


def nixl(role: str = "kv_producer", **more: Any) -> dict[str, Any]:
    return {"kv_connector": "NixlConnector", "kv_role": role, **more}


def offloading(cpu_bytes: object = 1 << 20, **extra: Any) -> dict[str, Any]:
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": cpu_bytes, **extra},
    }


def simple(**extra: Any) -> dict[str, Any]:
    return {
        "kv_connector": "SimpleCPUOffloadConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }


def multi(*children: object, role: str = "kv_both", **more: Any) -> dict[str, Any]:
    extra = {"connectors": list(children)} | more.pop("extra", {})
    return {
        "kv_connector": "MultiConnector",
        "kv_role": role,
        "kv_connector_extra_config": extra,
        **more,
    }


def read(value: object) -> ConnectorConfig:
    return parse(json.dumps(value))


def test_a_nixl_connector() -> None:
    config = read(nixl("kv_consumer", engine_id="d", kv_load_failure_policy="fail", kv_buffer_device="cpu"))
    assert (config.kind, config.role, config.engine_id) == ("NixlConnector", "kv_consumer", "d")
    assert config.failure_policy == "fail"
    assert config.leaves == (config,)
    assert nixl_leaf(config) is config


def test_defaults() -> None:
    plain = read(nixl(engine_id=None, kv_load_failure_policy=None, kv_connector_extra_config=None))
    assert plain == read(nixl())
    assert (plain.failure_policy, plain.engine_id, plain.digest) == ("recompute", "", True)
    assert (plain.lease_s, plain.transfer_timeout_s) == (30.0, 30.0)
    tier = read(simple())
    assert (tier.cpu_bytes, tier.lazy_offload, tier.digest) == (DEFAULT_CPU_BYTES, False, False)
    assert nixl_leaf(tier) is None


def test_extra_keys() -> None:
    extra = {"kv_lease_duration": 5, "transfer_timeout": 0.5, "digest": False, "backends": ["UCX"]}
    config = read(nixl(kv_connector_extra_config=extra | {"bidirectional_kv_xfer": False}))
    assert (config.lease_s, config.transfer_timeout_s, config.digest) == (5.0, 0.5, False)
    tier = read(offloading(1e6, block_size=64, eviction_policy="arc", offload_prompt_only=False))
    assert (tier.cpu_bytes, tier.block_size, tier.eviction_policy) == (1_000_000, 64, "arc")
    assert not tier.offload_prompt_only
    assert read(offloading()).offload_prompt_only
    assert read(offloading(1e6, digest=True)).digest and read(simple(digest=True)).digest
    assert read(simple(lazy_offload=True, cpu_bytes_to_use=1)).lazy_offload


def test_children_keep_their_order_and_take_from_their_parent() -> None:
    config = read(
        multi(
            nixl("kv_both", engine_id="e"),
            offloading(),
            simple(),
            engine_id="e",
            kv_load_failure_policy="fail",
            extra={"compose": True},
        )
    )
    kinds = [leaf.kind for leaf in config.leaves]
    assert kinds == ["NixlConnector", "OffloadingConnector", "SimpleCPUOffloadConnector"]
    assert {leaf.engine_id for leaf in config.leaves} == {"e"}
    assert {leaf.failure_policy for leaf in config.leaves} == {"fail"}
    assert config.compose
    assert nixl_leaf(config) is config.children[0]


WRONG: list[tuple[str, str]] = [
    ("", "not JSON"),
    ("{", "not JSON"),
    ("nonsense", "not JSON"),
    ("[]", "JSON object"),
    ("null", "JSON object"),
    ("[" * 100_000, "not JSON"),
    ('{"kv_role": "kv_both", "kv_role": "kv_both"}', "'kv_role' appears twice"),
    (
        '{"kv_connector": "SimpleCPUOffloadConnector", "kv_role": "kv_both", "kv_connector_extra_config": '
        '{"lazy_offload": true, "lazy_offload": false}}',
        "'lazy_offload' appears twice",
    ),
    (json.dumps(offloading(float("nan"))), "not JSON: NaN"),
    (json.dumps(offloading(float("inf"))), "not JSON: Infinity"),
    (json.dumps(offloading("@")).replace('"@"', "1e999"), "cpu_bytes_to_use must be a number"),
    (json.dumps(offloading("@")).replace('"@"', "9" * 5000), "not JSON"),
    (json.dumps(offloading(10**400)), "cpu_bytes_to_use must be at least 1"),
    ("{}", "kv_connector must be one of NixlConnector, .*MultiConnector, got None"),
    (
        json.dumps(nixl() | {"kv_connector": "LMCacheConnectorV1"}),
        "kv_connector must be .*'LMCacheConnectorV1'",
    ),
    (json.dumps(nixl() | {"kv_connector": ["NixlConnector"]}), "kv_connector must be"),
    (json.dumps({"kv_connector": "NixlConnector"}), "NixlConnector needs kv_role"),
    (json.dumps(nixl("producer")), "kv_role, one of kv_producer, kv_consumer, kv_both; got 'producer'"),
    (json.dumps(nixl() | {"kv_role": {}}), "kv_role"),
    (json.dumps(nixl(kv_connectr=1)), "unknown key 'kv_connectr'"),
    (json.dumps(nixl(**{"a\nb": 1})), r"unknown key 'a\\nb'"),
    (json.dumps(nixl(engine_id=7)), "engine_id"),
    (json.dumps(nixl(engine_id="a\nb")), "engine_id"),
    (json.dumps(nixl(engine_id="a" * 129)), "engine_id"),
    (json.dumps(nixl(kv_load_failure_policy="ignore")), "kv_load_failure_policy must be recompute or fail"),
    (json.dumps(nixl(kv_connector_extra_config=[])), "kv_connector_extra_config must be an object"),
    (json.dumps(nixl(kv_connector_extra_config={"bidirectional_kv_xfer": True})), "bidirectional_kv_xfer"),
    (
        json.dumps(nixl(kv_connector_extra_config={"lazy_offload": True})),
        "NixlConnector has no 'lazy_offload'",
    ),
    (json.dumps(nixl(kv_connector_extra_config={"a\nb": True})), r"no 'a\\nb'"),
    (json.dumps(nixl(kv_connector_extra_config={"kv_lease_duration": 0})), "kv_lease_duration"),
    (json.dumps(nixl(kv_connector_extra_config={"kv_lease_duration": True})), "kv_lease_duration"),
    (json.dumps(nixl(kv_connector_extra_config={"transfer_timeout": "1"})), "transfer_timeout"),
    (json.dumps(nixl(kv_connector_extra_config={"digest": 1})), "digest must be true or false"),
    (json.dumps(nixl(kv_connector_extra_config={"backends": ["GDS"]})), "backends"),
    (
        json.dumps(offloading() | {"kv_role": "kv_producer"}),
        "OffloadingConnector stores and loads: .*kv_both",
    ),
    (json.dumps(simple() | {"kv_role": "kv_consumer"}), "SimpleCPUOffloadConnector stores and loads"),
    (json.dumps(offloading() | {"kv_connector_extra_config": {}}), "needs cpu_bytes_to_use"),
    (json.dumps(offloading(0)), "cpu_bytes_to_use must be at least 1"),
    (json.dumps(offloading(1.5)), "cpu_bytes_to_use must be a whole number"),
    (json.dumps(offloading(block_size=-1)), "block_size"),
    (json.dumps(offloading(eviction_policy="fifo")), "eviction_policy must be lru or arc"),
    (json.dumps(offloading(offload_prompt_only="yes")), "offload_prompt_only"),
    (json.dumps(simple(lazy_offload=0)), "lazy_offload"),
    (json.dumps(simple(num_cpu_blocks=3)), "num_cpu_blocks"),
    (json.dumps(multi()), "MultiConnector needs at least one connector"),
    (json.dumps(multi("NixlConnector")), "connectors, a list of objects"),
    (json.dumps(multi() | {"kv_connector_extra_config": {}}), "MultiConnector needs connectors"),
    (
        json.dumps(multi(simple(), multi(simple()))),
        r"connectors\[1\]: kv_connector must be .*'MultiConnector'",
    ),
    (json.dumps(multi(nixl("kv_both"), nixl("kv_both"))), "two NixlConnectors"),
    (json.dumps(multi(nixl("kv_consumer"), role="kv_producer")), r"connectors\[0\]: NixlConnector cannot be"),
    (json.dumps(multi(nixl(engine_id="x"), engine_id="y")), "engine_id"),
    (json.dumps(multi({"kv_connector": "NixlConnector"})), r"connectors\[0\]: NixlConnector needs kv_role"),
    (json.dumps(multi(simple(), extra={"compose": "yes"})), "compose must be true or false"),
]


@pytest.mark.parametrize(("text", "problem"), WRONG, ids=[problem[:40] for _, problem in WRONG])
def test_what_makes_no_sense_is_refused_by_name(text: str, problem: str) -> None:
    with pytest.raises(TransferConfigError, match=problem) as refused:
        parse(text)
    assert len(str(refused.value).splitlines()) == 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=4), below, max_size=3),
    max_leaves=5,
)
_KEYS = "kv_connector kv_role engine_id kv_load_failure_policy kv_connector_extra_config kv_port x"
_EXTRA_KEYS = (
    "cpu_bytes_to_use block_size eviction_policy offload_prompt_only lazy_offload digest connectors compose "
    "kv_lease_duration backends bidirectional_kv_xfer"
)
KEYS = st.sampled_from(tuple(re.findall(r"\w+", _KEYS)))
EXTRA_KEYS = st.sampled_from(tuple(re.findall(r"\w+", _EXTRA_KEYS)))


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from([nixl(), offloading(), simple(), multi(nixl("kv_both"), simple())]),
    st.dictionaries(KEYS, VALUES, max_size=2),
    st.dictionaries(EXTRA_KEYS, VALUES, max_size=2),
)
def test_no_value_escapes_as_another_error(
    base: dict[str, Any], changes: dict[str, Any], extra: dict[str, Any]
) -> None:
    own = base.get("kv_connector_extra_config", {})
    value = base | {"kv_connector_extra_config": own | extra} | changes
    try:
        config = read(value)
    except TransferConfigError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert config.leaves
        assert all(leaf.cpu_bytes >= 1 for leaf in config.leaves)


def test_only_nixl_asks_for_an_explicit_role() -> None:
    assert deprecated_roles(read(simple())) == deprecated_roles(read(offloading())) == ()
    assert deprecated_roles(read(multi(offloading(), nixl()))) == ()
    assert len(deprecated_roles(read(multi(offloading(), nixl("kv_both"))))) == 1
