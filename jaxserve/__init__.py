"""Serve large language models with JAX.

from jaxserve import Engine, SamplingParams

The names below load what they need on first use: a router or `--help` must not wait for JAX. Their types are
in `__init__.pyi`.
"""

from importlib import import_module

_HOMES = {
    "CompletionOutput": "jaxserve.outputs",
    "ConfigError": "jaxserve.config",
    "Delta": "jaxserve.outputs",
    "Engine": "jaxserve.engine",
    "EngineConfig": "jaxserve.config",
    "EngineError": "jaxserve.outputs",
    "FinishReason": "scheduler.types",
    "PrefillStats": "metrics.stats",
    "QueueFull": "jaxserve.outputs",
    "RequestOutput": "jaxserve.outputs",
    "RequestRefused": "jaxserve.outputs",
    "SamplingParams": "scheduler.types",
    "TokenLogprobs": "jaxserve.outputs",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    """A public name, from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
