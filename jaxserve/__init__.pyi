"""Serve large language models with JAX.

from jaxserve import Engine, SamplingParams
"""

from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine import Engine
from jaxserve.outputs import (
    CompletionOutput,
    Delta,
    EngineError,
    QueueFull,
    RequestOutput,
    RequestRefused,
    TokenLogprobs,
)
from metrics.stats import PrefillStats
from scheduler.types import FinishReason, SamplingParams

__all__ = [
    "CompletionOutput",
    "ConfigError",
    "Delta",
    "Engine",
    "EngineConfig",
    "EngineError",
    "FinishReason",
    "PrefillStats",
    "QueueFull",
    "RequestOutput",
    "RequestRefused",
    "SamplingParams",
    "TokenLogprobs",
]
