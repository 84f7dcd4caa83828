"""Bytes to one JSON object, strictly.

`json.loads` alone accepts NaN, infinities, duplicate keys, lone surrogates and UTF-16, and dies of deep
nesting and very long integers. Here each of these is an `ApiError`, and no input reaches the recursion
limit.
"""

import json
import math
import re
from collections.abc import Iterator

from jaxserve.api.errors import ApiError, invalid, printable

MAX_DEPTH = 32
"""Nested arrays and objects."""

MAX_DIGITS = 20
"""Longest integer that is parsed; 64 bits take 20 digits with their sign."""

# An unterminated string is taken to the end of the input: else each quote in it would be tried again.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")
_LONG_INTEGER = re.compile(rb"\d{%d}" % MAX_DIGITS)
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


class _BadNumber:
    """Stands for a number that JSON or 64 bits do not know, until its field is found."""


_BAD_NUMBER = _BadNumber()


def parse_object(data: bytes) -> dict[str, object]:
    """The JSON object in a request body.

    Args:
        data: UTF-8 without a byte order mark.

    Raises:
        ApiError: 400 `invalid_json`, or `invalid_value` where a field holds NaN, an infinity, a number of
            more than 20 digits, a lone surrogate or a key twice.
    """
    if data.startswith(b"\xef\xbb\xbf"):
        raise _invalid_json("starts with a byte order mark")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _invalid_json(f"is not valid UTF-8 at byte {error.start}") from None
    if not text.strip(" \t\r\n"):
        raise _invalid_json("is empty")
    _check_depth(data)
    found_bad_number = False

    def bad_number(_: str) -> _BadNumber:
        nonlocal found_bad_number
        found_bad_number = True
        return _BAD_NUMBER

    def number(literal: str) -> float | _BadNumber:
        value = float(literal)
        return value if math.isfinite(value) else bad_number(literal)

    def integer(literal: str) -> int | _BadNumber:
        return int(literal) if len(literal) <= MAX_DIGITS else bad_number(literal)

    try:
        value = json.loads(
            text,
            object_pairs_hook=_object_without_duplicates,
            parse_constant=bad_number,
            parse_float=number,
            parse_int=integer if _LONG_INTEGER.search(data) else None,
        )
    except json.JSONDecodeError as error:
        raise _invalid_json(f"is not valid JSON at line {error.lineno}, column {error.colno}") from None
    if not isinstance(value, dict):
        raise _invalid_json("must be a JSON object")
    if found_bad_number or _SURROGATE_ESCAPE.search(data):
        _check_leaves(value)
    return value


def _invalid_json(problem: str) -> ApiError:
    return ApiError(400, f"The request body {problem}.", code="invalid_json")


def _check_depth(data: bytes) -> None:
    """Bounds the nesting before any recursive parser sees it; linear in the body."""
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", data)):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise _invalid_json(f"is nested deeper than {MAX_DEPTH} levels")


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise invalid(twice, "appears twice in one object", code="duplicate_key")
    return value


def _check_leaves(root: dict[str, object]) -> None:
    for path, leaf in _leaves(root, ""):
        if isinstance(leaf, _BadNumber):
            raise invalid(path, "must be a finite number of at most 64 bits")
        if isinstance(leaf, str):
            try:
                leaf.encode("utf-8")
            except UnicodeEncodeError:
                raise invalid(path, "holds half of a surrogate pair, which is no text") from None


def _leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    """Every scalar below `value` with its path; keys are given as leaves too."""
    if isinstance(value, dict):
        for key, item in value.items():
            below = f"{path}.{printable(key, 64)}" if path else printable(key, 64)
            yield below, key
            yield from _leaves(item, below)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value
