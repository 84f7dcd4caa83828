import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics.stats import PrefillStats, PromptTokenStats

SMALL = settings(deadline=None, max_examples=60)
parts = st.integers(-3, 60)
counts = st.integers(0, 10**12)


@st.composite
def prefills(draw: st.DrawFn) -> PrefillStats:
    prompt = draw(st.integers(1, 5000))
    hit = draw(st.integers(0, prompt))
    external = draw(st.integers(0, prompt - hit))
    return PrefillStats(num_prompt_tokens=prompt, local_cache_hit=hit, external_kv_transfer=external)


sums = st.builds(PromptTokenStats, computed=counts, local_cache_hit=counts, external_kv_transfer=counts)


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


@pytest.mark.parametrize("source", ["computed", "local_cache_hit", "external_kv_transfer"])
def test_a_negative_source_cannot_be_constructed(source: str) -> None:
    numbers = {"computed": 1, "local_cache_hit": 1, "external_kv_transfer": 1}
    with pytest.raises(ValueError, match="negative"):
        PromptTokenStats(**(numbers | {source: -1}))


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


@SMALL
@given(a=sums, b=sums, c=sums)
def test_merge_is_associative_and_commutative_with_an_identity(
    a: PromptTokenStats, b: PromptTokenStats, c: PromptTokenStats
) -> None:
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(b) == b.merge(a)
    assert a.merge(PromptTokenStats.empty()) == a == PromptTokenStats.empty().merge(a)


def test_sources_are_read_by_their_label_and_no_other() -> None:
    stats = PromptTokenStats(computed=1, local_cache_hit=2, external_kv_transfer=3)
    assert [stats.get(label) for label in stats.by_source()] == [1, 2, 3]
    assert list(stats.by_source()) == ["local_compute", "local_cache_hit", "external_kv_transfer"]
    for unknown in ("computed", "recomputed", ""):
        with pytest.raises(ValueError, match="unknown source"):
            stats.get(unknown)
