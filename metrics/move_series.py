"""The families of moves: what a scrape shows of MoveStats. Pure.

Names, labels and buckets are vLLM's where it has them; docs/metrics.md says which are ours.
"""

from dataclasses import dataclass

from metrics.exposition import Family, Sample
from metrics.moves import HostCopies, MoveStats, NixlStats, OffloadStats, SimpleOffloadStats
from metrics.series import Kind, Value

Labelled = tuple[tuple[str, Value], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadTier:
    """One OffloadingConnector's host tier as it was made. Attributes: num_tokens: tokens that it can hold."""

    num_chunks: int
    pages_per_chunk: int
    num_bytes: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SimpleTier:
    """One SimpleCPUOffloadConnector's host tier as it was made."""

    lazy_offload: bool
    slots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveSeries:
    """What one engine shows of its moves.

    Attributes:
        stats: the snapshot.
        fetches: the engine may load from peers: a NixlConnector whose role is not `kv_producer`.
        offload_tiers, simple_tiers: the host tiers that it has.
    """

    stats: MoveStats
    fetches: bool = False
    offload_tiers: tuple[OffloadTier, ...] = ()
    simple_tiers: tuple[SimpleTier, ...] = ()


def move_families(series: MoveSeries) -> tuple[Family, ...]:
    """The families of `EngineSeries.extra`: pages always, the others with their connector."""
    stats = series.stats
    return (
        _labelled("kv_pages", "gauge", "All KV pages by state.", "state", stats.pages.by_state()),
        _labelled(
            "kv_pages_in_moves",
            "gauge",
            "KV pages in use that moves hold; one that two hold counts twice.",
            "move",
            stats.pages.in_moves(),
        ),
        *_fetch(series),
        *(_nixl(stats.nixl, stats.pages.quarantined) if stats.nixl is not None else ()),
        *(_offload(stats.offload, series.offload_tiers) if stats.offload is not None else ()),
        *(_simple(stats.simple, series.simple_tiers) if stats.simple is not None else ()),
    )


def _one(name: str, kind: Kind, help_text: str, value: Value) -> Family:
    return Family(name=name, kind=kind, help=help_text, samples=(Sample(value=value),))


def _labelled(name: str, kind: Kind, help_text: str, label: str, values: Labelled) -> Family:
    samples = tuple(Sample(labels=(of,), value=value) for of, value in values)
    return Family(name=name, kind=kind, help=help_text, label_names=(label,), samples=samples)


def _facts(name: str, help_text: str, label_names: tuple[str, ...], rows: list[tuple[object, ...]]) -> Family:
    """A constant 1 per row; rows that read alike show once, since a series has one value."""
    texts = dict.fromkeys(tuple(str(value) for value in row) for row in rows)
    samples = tuple(Sample(labels=row, value=1) for row in texts)
    return Family(name=name, kind="gauge", help=help_text, label_names=label_names, samples=samples)


def _fetch(series: MoveSeries) -> tuple[Family, ...]:
    if not series.fetches:
        return ()
    text = "Requests whose prompt a peer holds, by how far their load is."
    return (_labelled("num_requests_kv_fetch_by_stage", "gauge", text, "stage", series.stats.fetch.items()),)


def _nixl(stats: NixlStats, quarantined: int) -> tuple[Family, ...]:
    failed = stats.failed_reads + stats.failed_notifications
    return (
        _one("nixl_xfer_time_seconds", "histogram", "Duration of a completed read.", stats.read_s),
        _one("nixl_post_time_seconds", "histogram", "Time to post a completed read.", stats.post_s),
        _one("nixl_bytes_transferred", "histogram", "Bytes of a completed read.", stats.read_bytes),
        _one("nixl_num_descriptors", "histogram", "Descriptors of a completed read.", stats.descriptors),
        _one(
            "nixl_num_failed_transfers", "counter", "Reads, handshakes and notifications that failed.", failed
        ),
        _one(
            "nixl_num_failed_notifications",
            "counter",
            "Peers that could not be told that their lease may end.",
            stats.failed_notifications,
        ),
        _one("nixl_num_kv_expired_reqs", "counter", "Leases that nobody read in time.", stats.expired),
        _one(
            "nixl_num_notifications_after_expiry",
            "counter",
            "Peers that read a lease after it had ended.",
            stats.late_reads,
        ),
        _one(
            "kv_digest_failures",
            "counter",
            "Pages that arrived but were not what the peer holds.",
            stats.digest_failures,
        ),
        _one(
            "kv_stale_reads", "counter", "Loads refused because the peer's pages changed.", stats.stale_reads
        ),
        _one("kv_transfer_retries", "counter", "Reads that were made again.", stats.retries),
        _one(
            "kv_pages_quarantined", "gauge", "Pages that a load may still write after its end.", quarantined
        ),
        _one("kv_leases", "gauge", "Leases held for peers.", stats.leases),
    )


def _by_direction(loads: Value, stores: Value) -> Labelled:
    return (("CPU_to_GPU", loads), ("GPU_to_CPU", stores))


def _failures(prefix: str, loads: HostCopies, stores: HostCopies) -> Family:
    return _labelled(
        f"{prefix}_copy_failures",
        "counter",
        "Copies that did not move all of their pages.",
        "direction",
        (("load", loads.failures), ("store", stores.failures)),
    )


def _offload(stats: OffloadStats, tiers: tuple[OffloadTier, ...]) -> tuple[Family, ...]:
    loads, stores, tier = stats.loads, stats.stores, stats.tier
    old = "Deprecated: use the series of one direction. "
    return (
        _one("kv_offload_load_bytes", "counter", "Bytes copied from the host tier.", loads.num_bytes),
        _one("kv_offload_load_time", "counter", "Seconds of copies from the host tier.", loads.seconds),
        _one("kv_offload_load_size", "histogram", "Bytes of a copy from the host tier.", loads.size),
        _one("kv_offload_store_bytes", "counter", "Bytes copied to the host tier.", stores.num_bytes),
        _one("kv_offload_store_time", "counter", "Seconds of copies to the host tier.", stores.seconds),
        _one("kv_offload_store_size", "histogram", "Bytes of a copy to the host tier.", stores.size),
        _labelled(
            "kv_offload_total_bytes",
            "counter",
            f"{old}Bytes copied.",
            "transfer_type",
            _by_direction(loads.num_bytes, stores.num_bytes),
        ),
        _labelled(
            "kv_offload_total_time",
            "counter",
            f"{old}Seconds of copies.",
            "transfer_type",
            _by_direction(loads.seconds, stores.seconds),
        ),
        _labelled(
            "kv_offload_size",
            "histogram",
            f"{old}Bytes of a copy.",
            "transfer_type",
            _by_direction(loads.size, stores.size),
        ),
        _failures("kv_offload", loads, stores),
        _one(
            "kv_offload_allocation_failure",
            "counter",
            "Pages not stored because the host tier had no room.",
            stats.no_room,
        ),
        _one(
            "kv_offload_cpu_cache_usage_perc",
            "gauge",
            "Fraction of the host tier that copies work on, 0 to 1; occupancy is kv_offload_cpu_used_blocks.",
            tier.fraction(tier.pinned),
        ),
        _one(
            "kv_offload_cpu_cache_write_usage_perc",
            "gauge",
            "Fraction of the host tier that stores fill, 0 to 1.",
            tier.fraction(tier.storing),
        ),
        _one(
            "kv_offload_cpu_cache_read_usage_perc",
            "gauge",
            "Fraction of the host tier that loads read, 0 to 1.",
            tier.fraction(tier.pinned - tier.storing),
        ),
        _one("kv_offload_cpu_used_blocks", "gauge", "Host pages that hold a page.", tier.used),
        _one("kv_offload_cpu_blocks", "gauge", "Host pages.", tier.slots),
        _facts(
            "kv_offload_config_info",
            "The host tier, in the labels.",
            (
                *("cpu_num_chunks", "cpu_blocks_per_chunk"),
                *("cpu_kv_cache_size_bytes", "cpu_kv_cache_size_tokens"),
            ),
            [(each.num_chunks, each.pages_per_chunk, each.num_bytes, each.num_tokens) for each in tiers],
        ),
    )


def _simple(stats: SimpleOffloadStats, tiers: tuple[SimpleTier, ...]) -> tuple[Family, ...]:
    loads, stores, tier = stats.loads, stats.stores, stats.tier
    return (
        _labelled(
            "simple_kv_offload_save_outcomes",
            "counter",
            "Pages offered for a store, by what became of them.",
            "outcome",
            stats.outcomes.items(),
        ),
        _labelled(
            "simple_kv_offload_load_blocks",
            "counter",
            "Pages of loads, when they are ordered and again when they have come; never add the two.",
            "phase",
            (("issued", stats.issued_pages), ("completed", stats.loaded_pages)),
        ),
        _labelled(
            "simple_kv_offload_bytes",
            "counter",
            "Bytes copied.",
            "direction",
            (("load", loads.num_bytes), ("store", stores.num_bytes)),
        ),
        _failures("simple_kv_offload", loads, stores),
        _one(
            "simple_kv_offload_used_blocks",
            "gauge",
            "Host pages that copies work on; occupancy is simple_kv_offload_cached_blocks.",
            tier.pinned,
        ),
        _one("simple_kv_offload_pending_store_blocks", "gauge", "Host pages that stores fill.", tier.storing),
        _one("simple_kv_offload_cached_blocks", "gauge", "Host pages that hold a page.", tier.used),
        _facts(
            "simple_kv_offload_info",
            "The host tier, in the labels.",
            ("backend", "page_cache", "lazy_offload", "capacity_blocks"),
            [("cpu", "false", str(each.lazy_offload).lower(), each.slots) for each in tiers],
        ),
    )
