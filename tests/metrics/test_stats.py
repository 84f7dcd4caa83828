import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics.counts import LabelledCounts
from metrics.stats import EXTERNAL_TIERS, PrefillStats, PromptTokenStats

SMALL = settings(deadline=None, max_examples=60)
parts = st.integers(-3, 60)
counts = st.integers(0, 10**12)


@st.composite
def prefills(draw: st.DrawFn) -> PrefillStats:
    prompt = draw(st.integers(1, 5000))
    hit = draw(st.integers(0, prompt))
    external = draw(st.integers(0, prompt - hit))
    host = draw(st.integers(0, external))
    tiers = draw(st.sampled_from([(), (("p2p", external - host), ("host", host))]))
    return PrefillStats(
        num_prompt_tokens=prompt, local_cache_hit=hit, external_kv_transfer=external, external_by_tier=tiers
    )


def by_tier(*tokens: int) -> LabelledCounts:
    return LabelledCounts(labels=EXTERNAL_TIERS, values=tokens)


sums = st.builds(
    PromptTokenStats,
    computed=counts,
    local_cache_hit=counts,
    external=st.builds(by_tier, counts, counts, counts, counts),
)


@SMALL
@given(prompt=parts, hit=parts, external=parts)
def test_either_the_parts_sum_to_the_prompt_or_nothing_is_constructed(
    prompt: int, hit: int, external: int
) -> None:
    legal = hit >= 0 and external >= 0 and hit + external <= prompt
    if legal:
        stats = PrefillStats(num_prompt_tokens=prompt, local_cache_hit=hit, external_kv_transfer=external)
        assert stats.local_compute >= 0
        assert stats.local_compute + stats.local_cache_hit + stats.external_kv_transfer == prompt
    else:
        with pytest.raises(ValueError):
            PrefillStats(num_prompt_tokens=prompt, local_cache_hit=hit, external_kv_transfer=external)


@pytest.mark.parametrize(
    "tiers",
    [
        (("host", 4),),
        (("host", 3), ("p2p", 3)),
        (("host", 6), ("p2p", -1)),
        (("host", 2), ("host", 3)),
        (("tape", 5),),
        (("device", 5),),
    ],
)
def test_tiers_that_are_not_the_external_tokens_cannot_be_constructed(
    tiers: tuple[tuple[str, int], ...],
) -> None:
    with pytest.raises(ValueError, match="tiers"):
        PrefillStats(num_prompt_tokens=9, local_cache_hit=0, external_kv_transfer=5, external_by_tier=tiers)


@pytest.mark.parametrize("source", ["computed", "local_cache_hit"])
def test_a_negative_source_cannot_be_constructed(source: str) -> None:
    numbers = {"computed": 1, "local_cache_hit": 1, source: -1}
    with pytest.raises(ValueError, match="negative"):
        PromptTokenStats(**numbers, external=by_tier(0, 0, 0, 0))


def test_tiers_of_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="tiers must be"):
        PromptTokenStats(computed=0, local_cache_hit=0, external=LabelledCounts.empty(("host",)))


@SMALL
@given(requests=st.lists(prefills(), max_size=20))
def test_the_fold_is_the_sum_of_the_requests(requests: list[PrefillStats]) -> None:
    stats = PromptTokenStats.empty()
    for request in requests:
        stats = stats.add(request)
    assert stats.by_source() == {
        "local_compute": sum(request.local_compute for request in requests),
        "local_cache_hit": sum(request.local_cache_hit for request in requests),
        "external_kv_transfer": sum(request.external_kv_transfer for request in requests),
    }
    assert stats.total == sum(request.num_prompt_tokens for request in requests)
    assert stats.total - stats.cached == stats.computed
    assert stats.total == sum(stats.by_source().values())
    assert stats.cached == sum(tokens for _, tokens in stats.cached_by_source())
    said = [dict(request.external_by_tier) for request in requests]
    assert dict(stats.cached_by_source()) == {
        "device": sum(request.local_cache_hit for request in requests),
        "host": sum(tiers.get("host", 0) for tiers in said),
        "p2p": sum(tiers.get("p2p", 0) for tiers in said),
        "disk": 0,
        "external_unspecified": sum(
            request.external_kv_transfer for request in requests if not request.external_by_tier
        ),
    }


@SMALL
@given(a=sums, b=sums, c=sums)
def test_merge_is_associative_and_commutative_with_an_identity(
    a: PromptTokenStats, b: PromptTokenStats, c: PromptTokenStats
) -> None:
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(b) == b.merge(a)
    assert a.merge(PromptTokenStats.empty()) == a == PromptTokenStats.empty().merge(a)


def test_sources_are_read_by_their_label_and_no_other() -> None:
    stats = PromptTokenStats(computed=1, local_cache_hit=2, external=by_tier(0, 2, 1, 0))
    assert [stats.get(label) for label in stats.by_source()] == [1, 2, 3]
    assert list(stats.by_source()) == ["local_compute", "local_cache_hit", "external_kv_transfer"]
    for unknown in ("computed", "recomputed", ""):
        with pytest.raises(ValueError, match="unknown source"):
            stats.get(unknown)
