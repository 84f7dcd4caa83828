"""From a configuration to the connectors of a scheduler."""

from kv.config import MULTI, NIXL, OFFLOADING, ConnectorConfig
from kv.connectors.base import Connector
from kv.connectors.multi import MultiConnector
from kv.connectors.nixl import NixlConnector
from kv.connectors.offloading import OffloadingConnector
from kv.connectors.simple_cpu import SimpleCpuOffloadConnector


def build(
    config: ConnectorConfig, *, windows: tuple[int | None, ...], page_size: int
) -> tuple[Connector, tuple[Connector, ...]]:
    """The connector that the scheduler asks, and the leaves by their index in commands.

    Raises:
        ValueError: several page groups, and a connector that can move only one.
    """
    leaves = tuple(
        _leaf(leaf, index=index, windows=windows, page_size=page_size)
        for index, leaf in enumerate(config.leaves)
    )
    connector = MultiConnector(leaves, compose=config.compose) if config.kind == MULTI else leaves[0]
    if len(windows) > 1 and not connector.supports_hma:
        raise ValueError(f"{config.kind} cannot move pages of {len(windows)} page groups")
    return connector, leaves


def _leaf(
    config: ConnectorConfig, *, index: int, windows: tuple[int | None, ...], page_size: int
) -> Connector:
    if config.kind == NIXL:
        return NixlConnector(config, index=index)
    kind = OffloadingConnector if config.kind == OFFLOADING else SimpleCpuOffloadConnector
    return kind(config, index=index, windows=windows, page_size=page_size)
