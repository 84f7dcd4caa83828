"""One JSON object, read field by field. Every reader names its field in the error."""

from collections.abc import Collection, Mapping

from jaxserve.api.errors import invalid

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

LARGEST_EXACT_FLOAT = 2.0**53


def names(words: str) -> frozenset[str]:
    """Field names, written as one text."""
    return frozenset(words.split())


class Fields:
    """Typed readers over a JSON object; null counts as absent.

    Args:
        body: the object.
        path: where it lies, for errors: "" or such as "stream_options".
    """

    def __init__(self, body: Mapping[str, object], path: str = "") -> None:
        self._body = body
        self._path = path

    def name(self, key: str) -> str:
        """The field's full name."""
        return f"{self._path}.{key}" if self._path else key

    def raw(self, key: str) -> object:
        """The value as JSON gave it; None where it is absent."""
        return self._body.get(key)

    def unknown(self, known: Collection[str]) -> tuple[str, ...]:
        """Keys that are not among `known`."""
        return tuple(key for key in self._body if key not in known)

    def asks_for(self, key: str) -> bool:
        """Whether the field holds anything but null, false, nothing or "none"."""
        value = self._body.get(key)
        if isinstance(value, (list, dict)):
            return bool(value)
        return not (value is None or value is False or value == "" or value == "none")

    def integer(self, key: str, *, low: int, high: int) -> int | None:
        """An integer in [low, high]; a float counts where it is whole."""
        value = self._body.get(key)
        if value is None:
            return None
        return self.as_integer(value, key, low=low, high=high)

    def as_integer(self, value: object, key: str, *, low: int, high: int) -> int:
        """`value`, found in field `key`, as an integer in [low, high]."""
        if isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST_EXACT_FLOAT:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise invalid(self.name(key), "must be an integer", code="invalid_type")
        if not low <= value <= high:
            raise invalid(self.name(key), f"must be between {low} and {high}")
        return value

    def number(self, key: str, *, low: float, high: float, above_low: bool = False) -> float | None:
        """A number in [low, high], or in (low, high] with `above_low`."""
        value = self._body.get(key)
        if value is None:
            return None
        return self.as_number(value, key, low=low, high=high, above_low=above_low)

    def as_number(
        self, value: object, key: str, *, low: float, high: float, above_low: bool = False
    ) -> float:
        """`value`, found in field `key`, as a number in [low, high]."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise invalid(self.name(key), "must be a number", code="invalid_type")
        if not low <= value <= high or (above_low and value == low):
            bounds = f"above {low} and at most {high}" if above_low else f"between {low} and {high}"
            raise invalid(self.name(key), f"must be {bounds}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._body.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise invalid(self.name(key), "must be true or false", code="invalid_type")
        return value

    def text(self, key: str, *, limit: int) -> str | None:
        """Any string of at most `limit` characters."""
        value = self._body.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            raise invalid(self.name(key), "must be a string", code="invalid_type")
        if len(value) > limit:
            raise invalid(self.name(key), f"must have at most {limit} characters")
        return value

    def label(self, key: str, *, limit: int) -> str | None:
        """A non-empty printable string of at most `limit` characters."""
        value = self.text(key, limit=limit)
        if value is not None and not (value and value.isprintable()):
            raise invalid(self.name(key), "must be a non-empty string of printable characters")
        return value

    def items(self, key: str, *, limit: int) -> list[object] | None:
        """An array of at most `limit` items."""
        value = self._body.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise invalid(self.name(key), "must be an array", code="invalid_type")
        if len(value) > limit:
            raise invalid(self.name(key), f"must have at most {limit} items")
        return value

    def mapping(self, key: str) -> "Fields | None":
        """The fields of an object."""
        value = self._body.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise invalid(self.name(key), "must be an object", code="invalid_type")
        return Fields(value, self.name(key))

    def entries(self, key: str, *, limit: int) -> Mapping[str, object]:
        """The keys and values of an object of at most `limit` entries; empty where it is absent."""
        value = self.mapping(key)
        if value is None:
            return {}
        if len(value._body) > limit:
            raise invalid(self.name(key), f"must have at most {limit} entries")
        return value._body
