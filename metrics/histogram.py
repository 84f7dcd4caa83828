"""A histogram with fixed bounds, as a frozen value."""

import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

NANO = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Counts of non-negative observations per bucket, and their sum.

    The sum is a whole number of billionths, each observation rounded to the nearest: integers add exactly
    in any order, floats do not, so only this makes `merge` associative to the last bit.

    Attributes:
        bounds: inclusive upper bounds, strictly rising; one more bucket above the last has none.
        counts: observations per bucket (not cumulative), one more than bounds.
        sum_nano: sum of the observations in billionths of their unit.

    Raises:
        ValueError: the number of counts does not fit the bounds.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum_nano: int

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.bounds) + 1:
            raise ValueError(f"{len(self.counts)} counts do not fit {len(self.bounds)} bounds")

    @classmethod
    def empty(cls, bounds: tuple[float, ...]) -> "Histogram":
        """No observation: the identity of `merge` under these bounds.

        Raises:
            ValueError: the bounds do not rise strictly, or one is not finite.
        """
        if not all(math.isfinite(bound) for bound in bounds):
            raise ValueError(f"bounds must be finite: {bounds}")
        if any(low >= high for low, high in pairwise(bounds)):
            raise ValueError(f"bounds must rise strictly: {bounds}")
        return cls(bounds=bounds, counts=(0,) * (len(bounds) + 1), sum_nano=0)

    @property
    def count(self) -> int:
        """Number of observations."""
        return sum(self.counts)

    @property
    def sum(self) -> float:
        """Sum of the observations."""
        return self.sum_nano / NANO

    def observe(self, value: float) -> "Histogram":
        """One more observation.

        Raises:
            ValueError: it is negative or not finite.
        """
        if not 0 <= value < math.inf:
            raise ValueError(f"cannot observe {value}")
        index = bisect_left(self.bounds, value)
        counts = self.counts
        nano = value * NANO if isinstance(value, int) else round(float(value) * NANO)
        return Histogram(
            bounds=self.bounds,
            counts=(*counts[:index], counts[index] + 1, *counts[index + 1 :]),
            sum_nano=self.sum_nano + nano,
        )

    def observe_many(self, values: np.ndarray) -> "Histogram":
        """The same as `observe` of each value in turn, in one pass.

        Args:
            values: any integer or float dtype, `[N]`.

        Raises:
            ValueError: a value is negative or not finite.
        """
        if values.size == 0:
            return self
        floats = values.astype(np.float64)
        # Written so that a NaN, which compares false, fails too.
        if not (floats.min() >= 0 and floats.max() < math.inf):
            raise ValueError(f"cannot observe values from {floats.min()} to {floats.max()}")
        places = np.searchsorted(np.array(self.bounds, np.float64), floats, side="left")
        added = np.bincount(places, minlength=len(self.counts)).tolist()
        return Histogram(
            bounds=self.bounds,
            counts=tuple(a + b for a, b in zip(self.counts, added, strict=True)),
            sum_nano=self.sum_nano + _nano_sum(values, floats),
        )

    def merge(self, other: "Histogram") -> "Histogram":
        """The observations of both; associative and commutative.

        Raises:
            ValueError: the bounds differ.
        """
        if self.bounds != other.bounds:
            raise ValueError(f"bounds differ: {self.bounds} and {other.bounds}")
        return Histogram(
            bounds=self.bounds,
            counts=tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)),
            sum_nano=self.sum_nano + other.sum_nano,
        )


def _nano_sum(values: np.ndarray, floats: np.ndarray) -> int:
    """Sum in billionths of values that are known to be finite and not negative."""
    if values.dtype.kind in "iu":
        return int(values.sum(dtype=object)) * NANO
    scaled = np.rint(floats * NANO)
    if scaled.max() * scaled.size < 2**62:
        return int(scaled.astype(np.int64).sum())
    return sum(int(value) for value in scaled.tolist())
