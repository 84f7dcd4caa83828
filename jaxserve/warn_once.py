"""Warnings that are given once per process, however many engines start in it."""

import logging

from kv.config import ConnectorConfig, deprecated_roles

logger = logging.getLogger(__name__)

_given: set[str] = set()


def warn_once(log: logging.Logger, message: str) -> None:
    """Logs the message as a warning, unless that has been done."""
    if message not in _given:
        _given.add(message)
        log.warning(message)


def warn_of_roles(config: ConnectorConfig) -> None:
    """Warns once of roles that still work and will be refused. Called when an engine starts."""
    for message in deprecated_roles(config):
        warn_once(logger, message)


def reset() -> None:
    """Forgets what was given."""
    _given.clear()
