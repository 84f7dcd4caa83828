"""Counts under a fixed set of labels, as a frozen value."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledCounts:
    """One non-negative count per label. The labels are fixed at birth, so every series exists from the start.

    Attributes:
        labels: distinct label values, in the order in which they are shown.
        values: their counts.

    Raises:
        ValueError: a label twice, a negative count, or not one count per label.
    """

    labels: tuple[str, ...]
    values: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.values) or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"needs one count for each distinct label, got {self.labels} and {self.values}")
        if min(self.values, default=0) < 0:
            raise ValueError(f"negative count in {self}")

    @classmethod
    def empty(cls, labels: tuple[str, ...]) -> "LabelledCounts":
        """All zero: the identity of `merge` under these labels."""
        return cls(labels=labels, values=(0,) * len(labels))

    @property
    def total(self) -> int:
        """The sum over all labels."""
        return sum(self.values)

    def items(self) -> tuple[tuple[str, int], ...]:
        """(label, count) pairs in the order of the labels."""
        return tuple(zip(self.labels, self.values, strict=True))

    def get(self, label: str) -> int:
        """The count of one label.

        Raises:
            ValueError: there is no such label.
        """
        return self.values[self._index(label)]

    def add(self, label: str, amount: int = 1) -> "LabelledCounts":
        """Count `amount` more under one label.

        Raises:
            ValueError: there is no such label, or the amount is negative.
        """
        if amount < 0:
            raise ValueError(f"a count never falls: {amount} for {label!r}")
        index = self._index(label)
        values = self.values
        return LabelledCounts(
            labels=self.labels, values=(*values[:index], values[index] + amount, *values[index + 1 :])
        )

    def merge(self, other: "LabelledCounts") -> "LabelledCounts":
        """The counts of both; associative and commutative.

        Raises:
            ValueError: the labels differ.
        """
        if self.labels != other.labels:
            raise ValueError(f"labels differ: {self.labels} and {other.labels}")
        values = tuple(a + b for a, b in zip(self.values, other.values, strict=True))
        return LabelledCounts(labels=self.labels, values=values)

    def _index(self, label: str) -> int:
        if label not in self.labels:
            raise ValueError(f"unknown label {label!r}, expected one of {self.labels}")
        return self.labels.index(label)
