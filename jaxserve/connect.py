"""From a configuration to drivers: what moves pages in this engine, and who it is to its peers."""

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from jaxserve.config import ConfigError, EngineConfig
from jaxserve.device import Device
from jaxserve.movers import Movers
from jaxserve.transfer import Door, facts_of
from kv.auth import AuthKeyError, is_loopback, load_key
from kv.channel import ChannelError
from kv.config import CONSUMER, NIXL, ConnectorConfig, nixl_leaf
from kv.copies import PointerCopies, ProgramCopies
from kv.digest import digest_rows
from kv.driver import PageCopies
from kv.host import HostDriver
from kv.nixl import NixlDriver, NixlUnavailable, stay_on_this_machine
from kv.seal import Identity
from kv.tcp_channel import TcpChannel
from kv.transfer_agent import AgentError
from kv.types import ITEM_BYTES, KvSpec
from scheduler.types import SchedulerConfig

logger = logging.getLogger("jaxserve")


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
