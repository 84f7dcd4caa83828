"""Every option of the engine in one frozen value, checked once, before anything is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kv.auth import AuthKeyError, require_explicit_key
from kv.config import NIXL, ConnectorConfig, nixl_leaf

DTYPES = ("auto", "float32", "bfloat16")
BACKENDS = ("auto", "xla", "pallas")
POLICIES = ("fcfs", "priority")

TOKEN_BUDGET = 512
DETERMINISTIC_TOKEN_BUDGET = 128
"""Smaller: every step is padded to it, that of a single decode too. docs/performance.md has the figures."""


class ConfigError(ValueError):
    """An option that makes no sense, alone or with others; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What to serve, and with how much.

    Attributes:
        model: a folder, a GGUF file, a hub name or "smollm2".
        served_model_name: names that clients use, the first is the main one; empty: `model`.
        dtype: of weights, activations and KV; "auto": what docs/performance.md found faster on this platform.
        max_model_len: bound on prompt + output tokens; None: the model's, or what the pool holds.
        page_size: tokens per KV page, a power of two.
        kv_cache_memory_bytes: size of the page buffer; None: DEFAULT_KV_BYTES.
        num_pages: pages of the page buffer, in place of kv_cache_memory_bytes.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: token budget of one step; None: see `token_budget`.
        max_num_queued_reqs: requests that may wait; beyond, they are refused.
        enable_prefix_caching: requests share the pages of equal prefixes.
        scheduling_policy: "fcfs" or "priority".
        attention_backend: "xla", "pallas" or "auto".
        enforce_eager: compile buckets on first use, not before the engine is ready.
        deterministic: a request gives bitwise the same tokens and log-probabilities in any company, in any
            chunks, cached or not; one without a seed has the engine's. Slower: every step has one shape.
        seed: of the engine: seeds of requests without one are drawn from it.
        generation_config: "auto": sampling defaults from the model's generation_config.json; "vllm": none.
        chat_template: file with a chat template, in place of the model's.
        cache_dir: of downloaded models and compiled programs; None: the user's cache folder.
        record: file that the inputs of every step are written to, for `jaxserve replay`.
        log_stats: a line of statistics every ten seconds while busy.
        kv_transfer: what moves pages, from `kv.config.parse`; None: nothing does.
        side_channel_host: this machine's address on which peers reach the NIXL side channel.
        side_channel_port: of the side channel; 0: any free one.
        kv_auth_key_file: key that this engine and its peers share; None: one in the user's cache folder,
            which is enough for engines of one user on one machine.

    Raises:
        ConfigError: a value out of range, or two that contradict each other.
    """

    model: str
    served_model_name: tuple[str, ...] = ()
    dtype: str = "auto"
    max_model_len: int | None = None
    page_size: int = 16
    kv_cache_memory_bytes: int | None = None
    num_pages: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    max_num_queued_reqs: int = 1024
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"
    attention_backend: str = "auto"
    enforce_eager: bool = False
    deterministic: bool = False
    seed: int = 0
    generation_config: str = "auto"
    chat_template: Path | None = None
    cache_dir: Path | None = None
    record: Path | None = None
    log_stats: bool = True
    kv_transfer: ConnectorConfig | None = None
    side_channel_host: str = "localhost"
    side_channel_port: int = 5600
    kv_auth_key_file: Path | None = None

    def __post_init__(self) -> None:
        _one_of("--dtype", self.dtype, DTYPES)
        _one_of("--attention-backend", self.attention_backend, BACKENDS)
        _one_of("--scheduling-policy", self.scheduling_policy, POLICIES)
        _one_of("--generation-config", self.generation_config, ("auto", "vllm"))
        for flag, value in (
            ("--max-model-len", self.max_model_len),
            ("--kv-cache-memory-bytes", self.kv_cache_memory_bytes),
            ("--max-num-seqs", self.max_num_seqs),
            ("--max-num-batched-tokens", self.max_num_batched_tokens),
            ("--max-num-queued-reqs", self.max_num_queued_reqs),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{flag} must be at least 1, got {value}")
        if not all(self.served_model_name) or not self.names[0]:
            raise ConfigError("--served-model-name and the model's name must not be empty")
        if self.page_size < 1 or self.page_size & (self.page_size - 1) or self.page_size > 1024:
            raise ConfigError(f"--block-size must be a power of two up to 1024, got {self.page_size}")
        if self.num_pages is not None and self.num_pages < 2:
            raise ConfigError(f"--num-gpu-blocks-override must be at least 2, got {self.num_pages}")
        if self.num_pages is not None and self.kv_cache_memory_bytes is not None:
            raise ConfigError("--num-gpu-blocks-override and --kv-cache-memory-bytes contradict each other")
        if self.token_budget < self.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens ({self.max_num_batched_tokens}) must be at least --max-num-seqs "
                f"({self.max_num_seqs}): every running sequence needs a token per step"
            )
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError("--seed must fit 64 bits")
        if self.kv_transfer is not None:
            self._check_transfer(self.kv_transfer)

    def _check_transfer(self, transfer: Any) -> None:
        if not isinstance(transfer, ConnectorConfig):
            raise ConfigError(f"kv_transfer must come from kv.config.parse, got {type(transfer).__name__}")
        tier = next((leaf.kind for leaf in transfer.leaves if leaf.kind != NIXL), None)
        if tier is not None and not self.enable_prefix_caching:
            raise ConfigError(f"--no-enable-prefix-caching leaves {tier} nothing to keep: it finds prefixes")
        if nixl_leaf(transfer) is None:
            return
        host = self.side_channel_host
        if not 0 <= self.side_channel_port < 2**16:
            raise ConfigError(f"--nixl-side-channel-port must be below 65536, got {self.side_channel_port}")
        if not host or host != host.strip() or not host.isprintable():
            raise ConfigError(f"--nixl-side-channel-host must be an address, got {host!r}")
        if host in ("0.0.0.0", "::"):
            raise ConfigError(
                f"--nixl-side-channel-host {host}: peers are told this address and must be able to use it"
            )
        try:
            require_explicit_key(host, self.kv_auth_key_file is not None)
        except AuthKeyError as error:
            raise ConfigError(f"--nixl-side-channel-host: {error}") from error

    @property
    def token_budget(self) -> int:
        """Tokens of one step at most: as asked, else a default that leaves every sequence a token."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        usual = DETERMINISTIC_TOKEN_BUDGET if self.deterministic else TOKEN_BUDGET
        return max(usual, self.max_num_seqs)

    @property
    def names(self) -> tuple[str, ...]:
        """Names that clients may use, the main one first."""
        return self.served_model_name or (self.model,)


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{flag} must be one of {', '.join(allowed)}, got {value!r}")
