import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.api.body import MAX_DEPTH, parse_object
from jaxserve.api.errors import ApiError

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    SCALARS | TEXT,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(TEXT, below, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(TEXT, VALUES, max_size=5), st.booleans())
def test_whatever_json_writes_is_read_back(value: dict[str, object], ascii_only: bool) -> None:
    assert parse_object(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200) | st.text('{}[]":,\\u0dDeE1.-+ntf \n', max_size=60).map(str.encode))
def test_any_bytes_give_an_object_or_an_error(data: bytes) -> None:
    try:
        assert isinstance(parse_object(data), dict)
    except ApiError as error:
        assert error.status == 400


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"  \n",
        b"{",
        b'{"a":1,}',
        b"{}x",
        b"[]",
        b'"a"',
        b"null",
        b"1",
        b'{"a":"\xff"}',
        b'\xef\xbb\xbf{"a":1}',
        '{"a":1}'.encode("utf-16"),
        b'{"a":' * 100_000,
        b"[" * 100_000,
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":"\n"}',
        b'{"a":01}',
        b"{'a':1}",
    ],
    ids=lambda data: repr(data[:12]) + str(len(data)),
)
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_object(data)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ('{"t": NaN}', "t"),
        ('{"t": Infinity}', "t"),
        ('{"t": -Infinity}', "t"),
        ('{"t": 1e999}', "t"),
        ('{"t": -1e999}', "t"),
        ('{"t": %s}' % ("9" * 5000), "t"),
        ('{"t": -%s}' % ("9" * 21), "t"),
        ('{"a": {"b": [1, {"c": NaN}]}}', "a.b[1].c"),
        (r'{"a": ["x", "\ud800"]}', "a[1]"),
        (r'{"a": "\udc00\ud800"}', "a"),
        (r'{"\ud800": 1}', "?"),
        ('{"a": 1, "b": 2, "a": 3}', "a"),
        ('{"m": [{"x": 1, "x": 1}]}', "x"),
    ],
)
def test_what_json_cannot_mean_is_refused_by_name(text: str, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_object(text.encode())
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r'{"a": "\ud83d\ude00"}', "😀"),
        (r'{"a": "\\ud800"}', r"\ud800"),
        (r'{"a": "\u0000"}', "\0"),
        ('{"a": 9223372036854775807}', 2**63 - 1),
        ('{"a": "%s"}' % ("9" * 5000), "9" * 5000),
        ('{"a": "%s"}' % ("[{" * 5000), "[{" * 5000),
        (r'{"a": "\"[[[["}', '"[[[['),
        (' {"a" : [] } \r\n', []),
    ],
)
def test_odd_but_legal_values(text: str, value: object) -> None:
    assert parse_object(text.encode()) == {"a": value}


def nested(levels: int) -> bytes:
    return b'{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"


def test_the_depth_limit_is_exact() -> None:
    assert parse_object(nested(MAX_DEPTH))
    with pytest.raises(ApiError, match="nested deeper"):
        parse_object(nested(MAX_DEPTH + 1))


def test_depth_counts_levels_not_brackets() -> None:
    assert len(parse_object(json.dumps({"a": [[]] * 1000}).encode())["a"]) == 1000  # type: ignore[arg-type]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("data", [b'{"' + b'\\"' * 500_000, b'"' * 1_000_001, b'{"a":"' + b"\\" * 1_000_001])
def test_unterminated_strings_take_linear_time(data: bytes) -> None:
    with pytest.raises(ApiError):
        parse_object(b"[" * 40 + data)
