"""Roles that still work and will not: said once."""

import json
import logging
from collections.abc import Generator

import pytest

from jaxserve.warn_once import reset, warn_of_roles, warn_once
from kv.config import ConnectorConfig, parse

TIERS = ["OffloadingConnector", "SimpleCPUOffloadConnector"]


@pytest.fixture(autouse=True)
def nothing_said() -> Generator[None, None, None]:
    reset()
    yield
    reset()


def nixl(role: str) -> dict[str, object]:
    return {"kv_connector": "NixlConnector", "kv_role": role}


def tier(kind: str) -> dict[str, object]:
    extra = {"cpu_bytes_to_use": 1 << 20}
    return {"kv_connector": kind, "kv_role": "kv_both", "kv_connector_extra_config": extra}


def config(*connectors: dict[str, object], role: str = "kv_both") -> ConnectorConfig:
    """The only connector, or a MultiConnector of several."""
    if len(connectors) == 1:
        return parse(json.dumps(connectors[0]))
    extra = {"connectors": connectors}
    whole = {"kv_connector": "MultiConnector", "kv_role": role, "kv_connector_extra_config": extra}
    return parse(json.dumps(whole))


@pytest.mark.parametrize("beside", [None, *TIERS])
def test_kv_both_deprecation_warning(beside: str | None, caplog: pytest.LogCaptureFixture) -> None:
    chosen = config(nixl("kv_both"), *([] if beside is None else [tier(beside)]))
    warn_of_roles(chosen)
    warn_of_roles(chosen)
    (said,) = caplog.records
    assert said.levelno == logging.WARNING
    assert "kv_role='kv_both'" in said.message and "deprecated" in said.message
    reset()
    warn_of_roles(chosen)
    assert len(caplog.records) == 2


@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer"])
@pytest.mark.parametrize("parent", [None, "kv_both", "explicit"])
@pytest.mark.parametrize("kind", TIERS)
def test_explicit_kv_role_no_deprecation_warning(
    role: str, parent: str | None, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    if parent is None:
        chosen = config(nixl(role))
    else:
        chosen = config(nixl(role), tier(kind), role=role if parent == "explicit" else parent)
    warn_of_roles(chosen)
    assert caplog.records == []


@pytest.mark.parametrize("kind", TIERS)
def test_host_tiers_are_kv_both_without_a_warning(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_roles(config(tier(kind)))
    assert caplog.records == []


def test_different_messages_are_all_said(caplog: pytest.LogCaptureFixture) -> None:
    for message in ("a", "b", "a", "100 %s"):
        warn_once(logging.getLogger("tests"), message)
    assert [record.message for record in caplog.records] == ["a", "b", "100 %s"]
