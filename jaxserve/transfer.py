"""What requests may ask of an engine's connectors, and what clients and peers are told of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxserve.config import ConfigError
from jaxserve.outputs import RequestRefused, Transfer
from kv.config import CONSUMER, NIXL, PRODUCER, ConnectorConfig, nixl_leaf
from kv.digest import DIGEST_NAME
from kv.layout import derive_cpu_config, describe_pool
from kv.moves import LeaseTerms
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
from kv.transfer_plan import EngineFacts
from kv.types import KvSpec
from kv.wire import PROTOCOL
from scheduler.types import Request


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
