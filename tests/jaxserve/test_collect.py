"""What `generate` takes for one prompt, and what for many."""

import numpy as np
import pytest

from jaxserve import SamplingParams
from jaxserve.collect import as_list, pairs


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("text", ["text"]),
        ([1, 2], [[1, 2]]),
        ((1, 2), [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1], (2, 3)], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
        ([], []),
        (np.array([1, 2]), [[1, 2]]),
    ],
)
def test_one_prompt_or_many(given, wanted):
    assert as_list(given) == wanted


def test_parameters_are_one_for_all_or_one_each():
    one, default = SamplingParams(max_tokens=1), SamplingParams()
    assert pairs(["a", "b"], None, default) == [("a", default), ("b", default)]
    assert pairs(["a", "b"], one, default) == [("a", one), ("b", one)]
    assert pairs(["a", "b"], [default, one], default) == [("a", default), ("b", one)]
    with pytest.raises(ValueError, match="2 prompts but 1"):
        pairs(["a", "b"], [one], default)


def test_single_ids_among_prompts_make_no_sense():
    with pytest.raises(ValueError, match="not single ids"):
        as_list(["a", 1])
