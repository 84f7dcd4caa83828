"""Where prompt tokens came from, as frozen values."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillStats:
    """Where the prompt tokens of one request came from.

    The three parts never overlap and always sum to the prompt: `local_compute` is a property, the
    remainder, so no violation of the sum can be constructed (semantics of vLLM's PrefillStats).

    Raises:
        ValueError: a part is negative, or the parts exceed the prompt.
    """

    num_prompt_tokens: int
    local_cache_hit: int
    external_kv_transfer: int

    def __post_init__(self) -> None:
        if self.local_cache_hit < 0 or self.external_kv_transfer < 0:
            raise ValueError(f"negative part in {self}")
        if self.local_cache_hit + self.external_kv_transfer > self.num_prompt_tokens:
            raise ValueError(f"parts exceed the prompt in {self}")

    @property
    def local_compute(self) -> int:
        """Prompt tokens whose KV this engine computed."""
        return self.num_prompt_tokens - self.local_cache_hit - self.external_kv_transfer


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTokenStats:
    """Prompt tokens of many requests by source: the fold of each request's PrefillStats.

    `total` and `cached` are properties, so they cannot disagree with the sources. Each request is added
    once, with its first token; a request that ends before it is never added (vLLM's PromptTokenStats).

    Attributes:
        computed: tokens whose KV this engine computed; the label is `local_compute`.
        local_cache_hit: tokens found in this engine's prefix cache.
        external_kv_transfer: tokens whose KV a connector brought.

    Raises:
        ValueError: a source is negative.
    """

    computed: int
    local_cache_hit: int
    external_kv_transfer: int

    def __post_init__(self) -> None:
        if self.computed < 0 or self.local_cache_hit < 0 or self.external_kv_transfer < 0:
            raise ValueError(f"negative source in {self}")

    @classmethod
    def empty(cls) -> "PromptTokenStats":
        """No request: the identity of `merge`."""
        return cls(computed=0, local_cache_hit=0, external_kv_transfer=0)

    @property
    def total(self) -> int:
        """All prompt tokens."""
        return self.computed + self.local_cache_hit + self.external_kv_transfer

    @property
    def cached(self) -> int:
        """Prompt tokens that were not computed here."""
        return self.local_cache_hit + self.external_kv_transfer

    def add(self, prefill: PrefillStats) -> "PromptTokenStats":
        """One more request."""
        return PromptTokenStats(
            computed=self.computed + prefill.local_compute,
            local_cache_hit=self.local_cache_hit + prefill.local_cache_hit,
            external_kv_transfer=self.external_kv_transfer + prefill.external_kv_transfer,
        )

    def merge(self, other: "PromptTokenStats") -> "PromptTokenStats":
        """The requests of both; associative and commutative."""
        return PromptTokenStats(
            computed=self.computed + other.computed,
            local_cache_hit=self.local_cache_hit + other.local_cache_hit,
            external_kv_transfer=self.external_kv_transfer + other.external_kv_transfer,
        )

    def by_source(self) -> dict[str, int]:
        """Tokens by the label of their source, in vLLM's order."""
        return {
            "local_compute": self.computed,
            "local_cache_hit": self.local_cache_hit,
            "external_kv_transfer": self.external_kv_transfer,
        }

    def get(self, source: str) -> int:
        """Tokens of one source.

        Raises:
            ValueError: there is no such source.
        """
        sources = self.by_source()
        if source not in sources:
            raise ValueError(f"unknown source {source!r}, expected one of {tuple(sources)}")
        return sources[source]
