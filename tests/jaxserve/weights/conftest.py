"""Fixtures shared with the model's tests, and tiny models as folders."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.goldens import tiny
from tests.jaxserve.model.conftest import default_source

__all__ = ["default_source", "tiny_folder"]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that gives a tiny model as a Hugging Face folder, not to be changed."""
    written: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in written:
            written[name] = tmp_path_factory.mktemp(name) / name
            tiny.write_folder(name, written[name])
        return written[name]

    return folder
