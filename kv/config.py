"""`--kv-transfer-config`: which connectors move pages, by vLLM's names and keys.

One frozen type for all kinds, so that a record of a run can hold it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

NIXL = "NixlConnector"
OFFLOADING = "OffloadingConnector"
SIMPLE_CPU = "SimpleCPUOffloadConnector"
MULTI = "MultiConnector"
KINDS = (NIXL, OFFLOADING, SIMPLE_CPU, MULTI)

PRODUCER, CONSUMER, BOTH = "kv_producer", "kv_consumer", "kv_both"
ROLES = (PRODUCER, CONSUMER, BOTH)

DEFAULT_CPU_BYTES = 8 << 30
LEASE_S = 30.0


class TransferConfigError(ValueError):
    """A transfer configuration that makes no sense; the message is one line and names the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectorConfig:
    """One connector, or several as children of a MultiConnector.

    Attributes:
        kind: one of KINDS.
        role: one of ROLES. For NIXL: who computes prompts for whom; for host tiers `kv_both` is ordinary.
        engine_id: names this engine to peers; "": drawn at start. Children have their parent's.
        failure_policy: "recompute" what a load did not bring, or "fail" its request.
        cpu_bytes: of a host tier, over all ranks.
        block_size: tokens per chunk of OffloadingConnector; 0: one page.
        eviction_policy: of OffloadingConnector: "lru" or "arc".
        offload_prompt_only: OffloadingConnector stores no page that holds generated tokens.
        lazy_offload: SimpleCPUOffloadConnector stores pages only when they are about to be evicted.
        lease_s: seconds that a NIXL lease lives without a heartbeat.
        transfer_timeout_s: deadline of one transfer.
        digest: check a digest of every page that arrives; a host tier does so only if it is asked to.
        compose: MultiConnector may take a prefix from one child and the rest from others.
        children: of a MultiConnector, in order.
        host_slots: pages of a host tier; filled in when the page's bytes are known.
        pages_per_chunk: of OffloadingConnector; filled in with `host_slots`.
    """

    kind: str
    role: str
    engine_id: str = ""
    failure_policy: str = "recompute"
    cpu_bytes: int = DEFAULT_CPU_BYTES
    block_size: int = 0
    eviction_policy: str = "lru"
    offload_prompt_only: bool = True
    lazy_offload: bool = False
    lease_s: float = LEASE_S
    transfer_timeout_s: float = 30.0
    digest: bool = True
    compose: bool = False
    children: tuple["ConnectorConfig", ...] = ()
    host_slots: int = 0
    pages_per_chunk: int = 1

    @property
    def leaves(self) -> tuple["ConnectorConfig", ...]:
        """The connectors that move pages, in order; a leaf's index here names it in commands."""
        return self.children if self.kind == MULTI else (self,)


def parse(text: str) -> ConnectorConfig:
    """Reads the JSON of `--kv-transfer-config`.

    Raises:
        TransferConfigError: not JSON, an unknown connector or key, a role that the connector cannot take, or
            a value out of range.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except TransferConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise TransferConfigError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise TransferConfigError("must be a JSON object")
    return _connector(value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise TransferConfigError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


_KEYS = ("kv_connector", "kv_role", "engine_id", "kv_load_failure_policy", "kv_connector_extra_config")
_EXTRA: dict[str, tuple[str, ...]] = {
    NIXL: ("kv_lease_duration", "transfer_timeout", "digest", "backends"),
    OFFLOADING: ("cpu_bytes_to_use", "block_size", "eviction_policy", "offload_prompt_only", "digest"),
    SIMPLE_CPU: ("cpu_bytes_to_use", "lazy_offload", "digest"),
    MULTI: ("connectors", "compose"),
}
_IGNORED = ("kv_buffer_device", "kv_rank", "kv_parallel_size", "kv_port", "kv_ip", "kv_buffer_size")
"""Keys of vLLM that say nothing here."""


def _connector(
    value: Mapping[str, Any], parent: ConnectorConfig | None = None, where: str = ""
) -> ConnectorConfig:
    for key in value:
        if key not in _KEYS and key not in _IGNORED:
            raise TransferConfigError(f"{where}unknown key {key!r}")
    kind = value.get("kv_connector")
    if kind not in KINDS or (parent is not None and kind == MULTI):
        known = ", ".join(name for name in KINDS if parent is None or name != MULTI)
        raise TransferConfigError(f"{where}kv_connector must be one of {known}, got {kind!r}")
    role = value.get("kv_role")
    if role not in ROLES:
        raise TransferConfigError(f"{where}{kind} needs kv_role, one of {', '.join(ROLES)}; got {role!r}")
    if kind in (OFFLOADING, SIMPLE_CPU) and role != BOTH:
        raise TransferConfigError(f"{where}{kind} stores and loads: its kv_role is {BOTH}, not {role}")
    policy = value.get("kv_load_failure_policy")
    if policy is None:
        policy = "recompute" if parent is None else parent.failure_policy
    if policy not in ("recompute", "fail"):
        raise TransferConfigError(f"{where}kv_load_failure_policy must be recompute or fail, got {policy!r}")
    engine_id = value.get("engine_id")
    if engine_id is None:
        engine_id = ""
    if not isinstance(engine_id, str) or len(engine_id) > 128 or not engine_id.isprintable():
        raise TransferConfigError(f"{where}engine_id must be a printable string of at most 128 characters")
    if parent is not None and engine_id not in ("", parent.engine_id):
        raise TransferConfigError(f"{where}{kind} has its parent's engine_id, it takes none of its own")
    extra = value.get("kv_connector_extra_config")
    if extra is None:
        extra = {}
    if not isinstance(extra, dict):
        raise TransferConfigError(f"{where}kv_connector_extra_config must be an object")
    if "bidirectional_kv_xfer" in extra:
        if extra["bidirectional_kv_xfer"]:
            raise TransferConfigError(f"{where}bidirectional_kv_xfer is not supported")
        extra = {key: entry for key, entry in extra.items() if key != "bidirectional_kv_xfer"}
    for key in extra:
        if key not in _EXTRA[kind]:
            raise TransferConfigError(f"{where}{kind} has no {key!r} in kv_connector_extra_config")
    if parent is not None and kind == NIXL and parent.role not in (BOTH, role):
        raise TransferConfigError(f"{where}{kind} cannot be {role} in a MultiConnector that is {parent.role}")
    config = ConnectorConfig(
        kind=kind,
        role=role,
        engine_id=engine_id if parent is None else parent.engine_id,
        failure_policy=policy,
    )
    return _with_extra(config, extra, where)


def _with_extra(config: ConnectorConfig, extra: Mapping[str, Any], where: str) -> ConnectorConfig:
    def number(key: str, default: float, *, whole: bool, least: float) -> Any:
        value = extra.get(key, default)
        fits = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
        if isinstance(value, bool) or not fits:
            raise TransferConfigError(f"{where}{key} must be a number, got {value!r}")
        if whole and value != int(value):
            raise TransferConfigError(f"{where}{key} must be a whole number, got {value!r}")
        if not least <= value < 2**53:
            bounds = f"at least {least:g} and below 2**53"
            raise TransferConfigError(f"{where}{key} must be {bounds}, got {value!r}")
        return int(value) if whole else float(value)

    def flag(key: str, default: bool) -> bool:
        value = extra.get(key, default)
        if not isinstance(value, bool):
            raise TransferConfigError(f"{where}{key} must be true or false, got {value!r}")
        return value

    match config.kind:
        case "NixlConnector":
            if extra.get("backends", ["UCX"]) != ["UCX"]:
                raise TransferConfigError(f'{where}backends must be ["UCX"], got {extra["backends"]!r}')
            return replace(
                config,
                lease_s=number("kv_lease_duration", LEASE_S, whole=False, least=1),
                transfer_timeout_s=number("transfer_timeout", 30.0, whole=False, least=0.1),
                digest=flag("digest", True),
            )
        case "OffloadingConnector":
            policy = extra.get("eviction_policy", "lru")
            if policy not in ("lru", "arc"):
                raise TransferConfigError(f"{where}eviction_policy must be lru or arc, got {policy!r}")
            if "cpu_bytes_to_use" not in extra:
                raise TransferConfigError(f"{where}OffloadingConnector needs cpu_bytes_to_use")
            return replace(
                config,
                cpu_bytes=number("cpu_bytes_to_use", 0, whole=True, least=1),
                block_size=number("block_size", 0, whole=True, least=0),
                eviction_policy=policy,
                offload_prompt_only=flag("offload_prompt_only", True),
                digest=flag("digest", False),
            )
        case "SimpleCPUOffloadConnector":
            return replace(
                config,
                cpu_bytes=number("cpu_bytes_to_use", DEFAULT_CPU_BYTES, whole=True, least=1),
                lazy_offload=flag("lazy_offload", False),
                digest=flag("digest", False),
            )
        case _:
            children = extra.get("connectors")
            if not isinstance(children, list) or not all(isinstance(child, dict) for child in children):
                raise TransferConfigError(f"{where}MultiConnector needs connectors, a list of objects")
            if not children:
                raise TransferConfigError(f"{where}MultiConnector needs at least one connector")
            made = tuple(
                _connector(child, config, f"kv_connector_extra_config.connectors[{index}]: ")
                for index, child in enumerate(children)
            )
            if sum(child.kind == NIXL for child in made) > 1:
                raise TransferConfigError(
                    f"{where}two NixlConnectors would both answer in kv_transfer_params: at most one"
                )
            return replace(config, children=made, compose=flag("compose", False))


def nixl_leaf(config: ConnectorConfig) -> ConnectorConfig | None:
    """The NIXL connector of a configuration; None: it has none."""
    return next((leaf for leaf in config.leaves if leaf.kind == NIXL), None)


def deprecated_roles(config: ConnectorConfig) -> tuple[str, ...]:
    """One warning per NIXL connector whose role is not explicit."""
    return tuple(
        f"{leaf.kind}: kv_role='kv_both' is deprecated and will be removed; say kv_producer for the engine "
        "that computes prompts and kv_consumer for the one that continues them"
        for leaf in config.leaves
        if leaf.kind == NIXL and leaf.role == BOTH
    )
