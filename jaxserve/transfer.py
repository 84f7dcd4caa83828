"""From a configuration to drivers: what moves pages in this engine, and what clients are told of it."""

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxserve.config import ConfigError, EngineConfig
from jaxserve.device import Device
from jaxserve.movers import Movers
from jaxserve.outputs import RequestRefused, Transfer
from kv.auth import AuthKeyError, is_loopback, load_key
from kv.channel import ChannelError
from kv.config import CONSUMER, NIXL, PRODUCER, ConnectorConfig, nixl_leaf
from kv.copies import PointerCopies, ProgramCopies
from kv.digest import DIGEST_NAME, digest_rows
from kv.driver import PageCopies
from kv.host import HostDriver
from kv.layout import derive_cpu_config, describe_pool
from kv.moves import LeaseTerms
from kv.nixl import NixlDriver, NixlUnavailable, stay_on_this_machine
from kv.seal import (
    CompatFacts,
    Identity,
    ParamsKind,
    SealError,
    compat_hash,
    open_sealed,
    prompt_digest,
    read_params,
    seal,
)
from kv.tcp_channel import TcpChannel
from kv.transfer_agent import AgentError
from kv.transfer_plan import EngineFacts
from kv.types import ITEM_BYTES, KvSpec
from kv.wire import PROTOCOL
from scheduler.types import Request, SchedulerConfig

logger = logging.getLogger("jaxserve")


def sized(config: ConnectorConfig, spec: KvSpec, num_pages: int) -> ConnectorConfig:
    """The configuration with the host tiers' pages filled in.

    Raises:
        ConfigError: a host tier holds no page, or its chunks are not of whole pages.
    """
    leaves = []
    for leaf in config.leaves:
        if leaf.kind == NIXL:
            leaves.append(leaf)
            continue
        try:
            slots = derive_cpu_config(describe_pool(spec, num_pages), leaf.cpu_bytes).num_blocks
        except ValueError as error:
            raise ConfigError(f"--kv-transfer-config: {leaf.kind}: {error}") from error
        chunk, rest = divmod(leaf.block_size, spec.page_size)
        if rest or (chunk > slots):
            raise ConfigError(
                f"--kv-transfer-config: {leaf.kind}: block_size {leaf.block_size} must be a multiple of "
                f"--block-size {spec.page_size} and fit into cpu_bytes_to_use"
            )
        leaves.append(replace(leaf, host_slots=slots, pages_per_chunk=max(1, chunk)))
    return replace(config, children=tuple(leaves)) if config.children else leaves[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """What requests may ask of this engine's connectors, and who its peers are.

    Attributes:
        config: None: pages never leave the pool.
        key: shared with peers; None: no NIXL.
        identity: of this engine, for peers; None: it serves no leases.
    """

    config: ConnectorConfig | None = None
    key: bytes | None = None
    identity: Identity | None = None

    def open(self, params: Mapping[str, Any], prompt_token_ids: tuple[int, ...], cache_salt: str) -> Transfer:
        """What `kv_transfer_params` ask for. Callable from any thread.

        Raises:
            RequestRefused: they cannot be had from this engine, or are no peer's.
        """
        try:
            kind = read_params(params)
            if kind is ParamsKind.NOTHING:
                return Transfer()
            leaf = None if self.config is None else nixl_leaf(self.config)
            if leaf is None or self.key is None:
                raise SealError("this server has no NixlConnector (--kv-transfer-config)")
            if kind is ParamsKind.LEASE:
                if leaf.role == CONSUMER:
                    raise SealError(f"this server is a {CONSUMER} and takes no do_remote_decode")
                return Transfer(lease=True)
            if leaf.role == PRODUCER:
                raise SealError(f"this server is a {PRODUCER} and takes no do_remote_prefill")
            source = open_sealed(params, prompt=prompt_digest(prompt_token_ids, cache_salt), key=self.key)
            if source.num_tokens != len(prompt_token_ids):
                raise SealError("remote_num_tokens is not the length of the prompt")
        except SealError as error:
            raise RequestRefused(str(error), param="kv_transfer_params") from error
        return Transfer(remote=source)

    def seal(self, terms: LeaseTerms, request: Request) -> Mapping[str, Any]:
        """A lease's terms as a client takes them to a peer."""
        if self.identity is None or self.key is None:
            raise RuntimeError("a lease was given, but no peer could read it")
        prompt = prompt_digest(request.prompt_token_ids, request.cache_salt)
        return seal(terms, who=self.identity, prompt=prompt, key=self.key)


def open_door(
    config: EngineConfig, scheduler: SchedulerConfig, spec: KvSpec, device: Device, cache_dir: Path
) -> tuple[Door, Movers]:
    """Makes the drivers of all connectors, listening where the role asks for it.

    Raises:
        ConfigError: no key, no NIXL, no memory, or an address that cannot be had; the message names the flag.
    """
    transfer = scheduler.transfer
    if transfer is None:
        return Door(), Movers()
    leaf = nixl_leaf(transfer)
    try:
        key = None if leaf is None else load_key(config.kv_auth_key_file, cache_dir=cache_dir)
    except AuthKeyError as error:
        raise ConfigError(f"--kv-auth-key-file: {error}") from error
    kinds = [entry.kind for entry in transfer.leaves]
    movers = Movers(kinds)
    door = Door(config=transfer, key=key)
    for index, entry in enumerate(transfer.leaves):
        copies = page_copies(device)
        if entry.kind != NIXL:
            try:
                driver = HostDriver(
                    entry.host_slots,
                    spec.page_bytes,
                    copies,
                    wake=movers.wake,
                    clock=time.monotonic,
                    digest=digest_rows if entry.digest else None,
                )
            except ValueError as error:
                movers.close()
                raise ConfigError(f"--kv-transfer-config: {entry.kind}: {error}") from error
            movers.add(index, driver)
        elif key is not None:
            driver, identity = _nixl(config, entry, scheduler, spec, device, copies, movers, key)
            movers.add(index, driver)
            door = replace(door, identity=identity)
    movers.sealed_by(door.seal)
    return door, movers


def facts_of(
    leaf: ConnectorConfig,
    *,
    engine_id: str,
    epoch: str,
    cache_key: str,
    dtype: str,
    page_shape: tuple[int, int, int, int, int],
    item_bytes: int,
) -> EngineFacts:
    """What peers must agree on with this engine.

    Args:
        leaf: its NixlConnector.
        engine_id, epoch: its name, and that of this life.
        cache_key: of its model.
        page_shape: layers, keys and values, heads, page size, width of a head.
    """
    layers, _, heads, size, head_dim = page_shape
    compat = CompatFacts(
        protocol=PROTOCOL,
        cache_key=cache_key,
        dtype=dtype,
        page_shape=(layers, 2, heads, head_dim),
        num_layers=layers,
        kv_heads=heads,
        head_dim=head_dim,
        digest=DIGEST_NAME,
    )
    return EngineFacts(
        engine_id=engine_id,
        epoch=epoch,
        page_size=size,
        page_shape=page_shape,
        item_bytes=item_bytes,
        compat=compat_hash(compat),
        role=leaf.role,
    )


def page_copies(device: Device) -> PageCopies:
    """How drivers reach pages: by address in host memory, else through programs between the steps."""
    regions = device.regions()
    if all(region.device == "cpu" for region in regions):
        return PointerCopies(regions)
    return ProgramCopies(lambda: device.pages, device.put_pages, lock=device.lock, ranks=len(regions))


def _nixl(
    config: EngineConfig,
    leaf: ConnectorConfig,
    scheduler: SchedulerConfig,
    spec: KvSpec,
    device: Device,
    copies: PageCopies,
    movers: Movers,
    key: bytes,
) -> tuple[NixlDriver, Identity]:
    """The NIXL driver, and how its engine is named to peers."""
    facts = facts_of(
        leaf,
        engine_id=leaf.engine_id or secrets.token_hex(16),
        epoch=secrets.token_hex(16),
        cache_key=scheduler.cache_key,
        dtype=spec.dtype,
        page_shape=spec.page_shape,
        item_bytes=ITEM_BYTES[spec.dtype],
    )
    host = config.side_channel_host
    listens = leaf.role != CONSUMER
    if config.kv_auth_key_file is None and is_loopback(host):
        stay_on_this_machine()
    channels: list[TcpChannel] = []

    def make_channel(wake: Callable[[], None]) -> TcpChannel:
        port = config.side_channel_port if listens else None
        channels.append(TcpChannel(host, port, key=key, wake=wake, engine_id=facts.engine_id))
        return channels[0]

    try:
        driver = NixlDriver(
            make_channel=make_channel,
            copies=copies,
            regions=device.regions(),
            facts=facts,
            config=leaf,
            wake=movers.wake,
            clock=time.monotonic,
        )
    except NixlUnavailable as error:
        raise ConfigError(f"--kv-transfer-config: {error}") from error
    except AgentError as error:
        raise ConfigError(f"--kv-transfer-config: NIXL cannot be used: {error}") from error
    except ChannelError as error:
        raise ConfigError(f"--nixl-side-channel-port {config.side_channel_port}: {error}") from error
    identity = Identity(
        engine_id=facts.engine_id,
        epoch=facts.epoch,
        host=host,
        port=channels[0].port or 0,
        tp_size=1,
        page_size=facts.page_size,
    )
    if listens:
        logger.info("NIXL side channel on %s:%d, role %s", host, identity.port, leaf.role)
    return driver, identity
