"""Where prompt tokens came from, as frozen values."""

from dataclasses import dataclass

from metrics.counts import LabelledCounts

UNSPECIFIED = "external_unspecified"
EXTERNAL_TIERS = ("host", "p2p", "disk", UNSPECIFIED)
"""Where a connector can have tokens from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillStats:
    """Where the prompt tokens of one request came from.

    The three parts never overlap and always sum to the prompt: `local_compute` is a property, the
    remainder, so no violation of the sum can be constructed (semantics of vLLM's PrefillStats).

    Attributes:
        num_prompt_tokens: the whole prompt.
        local_cache_hit: of these, found in this engine's prefix cache.
        external_kv_transfer: of these, brought by a connector.
        external_by_tier: the same tokens by where they lay, (one of EXTERNAL_TIERS, tokens); empty: not said.

    Raises:
        ValueError: a part is negative, the parts exceed the prompt, a tier is unknown or named twice, or the
            tiers do not sum to `external_kv_transfer`.
    """

    num_prompt_tokens: int
    local_cache_hit: int
    external_kv_transfer: int
    external_by_tier: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.local_cache_hit < 0 or self.external_kv_transfer < 0:
            raise ValueError(f"negative part in {self}")
        if self.local_cache_hit + self.external_kv_transfer > self.num_prompt_tokens:
            raise ValueError(f"parts exceed the prompt in {self}")
        if self.external_by_tier:
            self._check_tiers()

    def _check_tiers(self) -> None:
        tiers = [tier for tier, _ in self.external_by_tier]
        if len(set(tiers)) != len(tiers) or not set(tiers) <= set(EXTERNAL_TIERS):
            raise ValueError(f"tiers must be distinct and of {EXTERNAL_TIERS}, got {self.external_by_tier}")
        tokens = [tokens for _, tokens in self.external_by_tier]
        if min(tokens) < 0 or sum(tokens) != self.external_kv_transfer:
            raise ValueError(f"tiers do not sum to external_kv_transfer in {self}")

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
        external: tokens whose KV a connector brought, by tier.

    Raises:
        ValueError: a source is negative, or the tiers are not EXTERNAL_TIERS.
    """

    computed: int
    local_cache_hit: int
    external: LabelledCounts

    def __post_init__(self) -> None:
        if self.computed < 0 or self.local_cache_hit < 0:
            raise ValueError(f"negative source in {self}")
        if self.external.labels != EXTERNAL_TIERS:
            raise ValueError(f"tiers must be {EXTERNAL_TIERS}, got {self.external.labels}")

    @classmethod
    def empty(cls) -> "PromptTokenStats":
        """No request: the identity of `merge`."""
        return cls(computed=0, local_cache_hit=0, external=LabelledCounts.empty(EXTERNAL_TIERS))

    @property
    def external_kv_transfer(self) -> int:
        """Tokens whose KV a connector brought, from any tier."""
        return self.external.total

    @property
    def total(self) -> int:
        """All prompt tokens."""
        return self.computed + self.cached

    @property
    def cached(self) -> int:
        """Prompt tokens that were not computed here."""
        return self.local_cache_hit + self.external_kv_transfer

    def add(self, prefill: PrefillStats) -> "PromptTokenStats":
        """One more request; what it does not say of tiers counts as `external_unspecified`."""
        external = self.external
        if prefill.external_kv_transfer:
            for tier, tokens in prefill.external_by_tier or ((UNSPECIFIED, prefill.external_kv_transfer),):
                external = external.add(tier, tokens)
        return PromptTokenStats(
            computed=self.computed + prefill.local_compute,
            local_cache_hit=self.local_cache_hit + prefill.local_cache_hit,
            external=external,
        )

    def merge(self, other: "PromptTokenStats") -> "PromptTokenStats":
        """The requests of both; associative and commutative."""
        return PromptTokenStats(
            computed=self.computed + other.computed,
            local_cache_hit=self.local_cache_hit + other.local_cache_hit,
            external=self.external.merge(other.external),
        )

    def cached_by_source(self) -> tuple[tuple[str, int], ...]:
        """(where they lay, tokens) of what was not computed here; sums to `cached`."""
        return (("device", self.local_cache_hit), *self.external.items())

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
