"""A snapshot of a model from the Hugging Face hub."""

import logging
import re
from pathlib import Path

from httpx import HTTPError
from huggingface_hub import snapshot_download

from jaxserve.weights.errors import WeightsError

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
_WANTED = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
]
_log = logging.getLogger(__name__)


def snapshot(name: str) -> Path:
    """The folder of a hub model, downloaded where it is not in the hub's own cache. Never pickles.

    Raises:
        WeightsError: no such model, no permission, or no network and no copy.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except (OSError, ValueError, HTTPError) as error:
        # The library's messages span lines and name addresses; whoever needs them has the log.
        _log.debug("hub download of %s failed", name, exc_info=True)
        raise WeightsError(
            f"{name}: neither a file or folder here nor to be had from the Hugging Face hub"
            f" ({type(error).__name__})"
        ) from error
