"""Stop strings against a slow twin that looks at the whole text after every character."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.text.stop import StopStrings

TEXT = st.text(alphabet="ab\u00e9", max_size=30)
STOPS = st.lists(st.text(alphabet="ab\u00e9", min_size=1, max_size=5), max_size=6).map(tuple)


def slow_stop(text: str, stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


def streamed(pushes: list[str], stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    matcher = StopStrings(stops, include)
    emitted, hit = "", None
    for text in pushes:
        emit, hit = matcher.push(text)
        emitted += emit
    return emitted + matcher.flush(), hit


@settings(deadline=None, max_examples=500)
@given(
    pushes=st.lists(st.text(alphabet="ab\u00e9", max_size=4), max_size=12), stops=STOPS, include=st.booleans()
)
def test_equals_slow_twin_however_the_text_is_cut(
    pushes: list[str], stops: tuple[str, ...], include: bool
) -> None:
    assert streamed(pushes, stops, include) == slow_stop("".join(pushes), stops, include)


@settings(deadline=None, max_examples=200)
@given(text=TEXT, stops=STOPS)
def test_never_emits_what_a_later_match_would_take_back(text: str, stops: tuple[str, ...]) -> None:
    matcher = StopStrings(stops)
    final, _ = slow_stop(text, stops, include=False)
    emitted = ""
    for character in text:
        emitted += matcher.push(character)[0]
        assert final.startswith(emitted)


@settings(deadline=None, max_examples=200)
@given(text=TEXT, stops=STOPS)
def test_holds_back_no_more_than_needed(text: str, stops: tuple[str, ...]) -> None:
    if slow_stop(text, stops, include=False)[1] is not None:
        return
    emit, _ = StopStrings(stops).push(text)
    starts = [n for n in range(len(text) + 1) if any(stop.startswith(text[n:]) for stop in stops)]
    assert emit == text[: min(starts, default=len(text))]


def test_a_stop_string_over_three_tokens() -> None:
    matcher = StopStrings(("END.",))
    assert matcher.push("the E") == ("the ", None)
    assert matcher.push("N") == ("", None)
    assert matcher.push("D. more") == ("", "END.")
    assert matcher.push("late") == ("", "END.")
    assert matcher.flush() == ""


def test_a_false_start_comes_out_late() -> None:
    matcher = StopStrings(("\n\nUser:",))
    assert matcher.push("yes\n\nUs") == ("yes", None)
    assert matcher.push("ually") == ("\n\nUsually", None)


def test_include_keeps_the_match_and_holds_nothing_back() -> None:
    matcher = StopStrings(("END",), include=True)
    assert matcher.push("xE") == ("xE", None)
    assert matcher.push("NDtail") == ("ND", "END")


def test_ties_go_to_the_first_in_the_list() -> None:
    assert StopStrings(("bc", "abc")).push("abc") == ("a", "bc")
    assert StopStrings(("abc", "bc")).push("abc") == ("", "abc")


def test_no_stops_and_empty_stops() -> None:
    assert StopStrings(()).push("text") == ("text", None)
    with pytest.raises(ValueError, match="empty"):
        StopStrings(("a", ""))


def test_many_long_stops_stay_cheap() -> None:
    stops = tuple("a" * 200 + chr(0x4E00 + i) for i in range(64))
    matcher = StopStrings(stops)
    begin = time.perf_counter()
    emitted = sum(len(matcher.push("aaaa")[0]) for _ in range(10_000))
    assert emitted == 40_000 - 200
    assert time.perf_counter() - begin < 2.0
