"""From an EngineConfig to the parts of an engine: model, tokenizer, pages, scheduler bounds."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxserve.batch import Bucket
from jaxserve.compiling import Blueprint, draw_up, enable_compilation_cache
from jaxserve.config import ConfigError, EngineConfig
from jaxserve.device import Device
from jaxserve.model.config import ModelConfig
from jaxserve.model.sharding import placed
from jaxserve.model.transformer import abstract_model
from jaxserve.shapes import Shape, buckets_of, compile_plan
from jaxserve.text import Tokenizer
from jaxserve.transfer import sized
from jaxserve.weights.load import Loaded, load_model, model_config
from jaxserve.weights.source import ModelSource, resolve
from kv.types import KvSpec, PageGroup
from scheduler.types import Limits, SamplingParams, SchedulerConfig

GIB = 1 << 30
DEFAULT_KV_BYTES = GIB
"""Of the page buffer where neither --kv-cache-memory-bytes nor --num-gpu-blocks-override is given."""

DEFAULT_CPU_DTYPE = "bfloat16"
"""What "auto" means on a CPU: see docs/performance.md for the figures."""

SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
"""Fields of generation_config.json that change the defaults of requests, as in vLLM."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parts:
    """Everything an engine is made of, loaded but not running.

    Attributes:
        eos_token_ids: the model's own end tokens.
        default_sampling: from generation_config.json, by vLLM's names.
        chat_template: source; None: the model has none.
    """

    source: ModelSource
    loaded: Loaded
    tokenizer: Tokenizer
    device: Device
    spec: KvSpec
    scheduler: SchedulerConfig
    limits: Limits
    dtype: str
    default_sampling: Mapping[str, float | int]
    chat_template: str | None


def assemble(config: EngineConfig, cache_dir: Path, report: Callable[[str], None]) -> Parts:
    """Loads the model and allocates its pages.

    Raises:
        ConfigError: the options do not fit the model.
        WeightsError: the model cannot be had or read.
    """
    template = None
    if config.chat_template is not None:
        try:
            template = config.chat_template.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat-template {config.chat_template} cannot be read: {error}") from error
    source = resolve(config.model, cache_dir=cache_dir, report=report)
    tokenizer = load_tokenizer(source)
    enable_compilation_cache(cache_dir / "compiled")
    dtype = resolve_dtype(config.dtype)
    loaded = load_model(source, dtype=dtype)
    if tokenizer.vocab_size > loaded.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {loaded.config.vocab_size}"
        )
    spec = kv_spec(loaded.config, config.page_size, dtype)
    num_pages = pool_pages(config, spec)
    max_model_len = model_length(config, loaded.config, spec, num_pages)
    device = Device(
        loaded,
        spec,
        num_pages=num_pages,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.token_budget,
        max_model_len=max_model_len,
        backend=config.attention_backend,
        deterministic=config.deterministic,
        pool_must_stay=config.kv_transfer is not None,
    )
    scheduler = SchedulerConfig(
        windows=tuple(group.sliding_window for group in spec.groups),
        page_size=spec.page_size,
        num_pages=num_pages,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        cache_key=f"{loaded.weights_digest}/{dtype}",
        enable_prefix_caching=config.enable_prefix_caching,
        policy=config.scheduling_policy,
        transfer=None if config.kv_transfer is None else sized(config.kv_transfer, spec, num_pages),
    )
    defaults = sampling_defaults(source) if config.generation_config == "auto" else {}
    return Parts(
        source=source,
        loaded=loaded,
        tokenizer=tokenizer,
        device=device,
        spec=spec,
        scheduler=scheduler,
        limits=Limits(max_num_batched_tokens=config.token_budget, max_num_seqs=config.max_num_seqs),
        dtype=dtype,
        default_sampling=defaults,
        chat_template=template if template is not None else tokenizer.chat_template,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draft:
    """What an engine's programs are compiled from, known from the model's configuration alone.

    Attributes:
        buckets: shapes of steps.
        plan: every shape.
        blueprint: see `compiling.Blueprint`.
        dtype: of weights, activations and KV.
    """

    buckets: list[Bucket]
    plan: tuple[Shape, ...]
    blueprint: Blueprint
    dtype: str


def draft(config: EngineConfig, cache_dir: Path, report: Callable[[str], None]) -> Draft:
    """The compile plan of `assemble(config, ...)`, without its weights and pages.

    Raises:
        ConfigError: the options do not fit the model.
        WeightsError: the model cannot be had, or its configuration cannot be read.
    """
    source = resolve(config.model, cache_dir=cache_dir, report=report)
    model, dtype = model_config(source), resolve_dtype(config.dtype)
    spec = kv_spec(model, config.page_size, dtype)
    num_pages = pool_pages(config, spec)
    max_model_len = model_length(config, model, spec, num_pages)
    graphdef, weights = abstract_model(model, dtype=dtype)
    buckets = buckets_of(config.max_num_seqs, config.token_budget, deterministic=config.deterministic)
    return Draft(
        buckets=buckets,
        plan=compile_plan(buckets, max_model_len),
        blueprint=draw_up(
            graphdef,
            placed(weights),
            model,
            spec,
            num_pages=num_pages,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            backend=config.attention_backend,
            deterministic=config.deterministic,
        ),
        dtype=dtype,
    )


def load_tokenizer(source: ModelSource) -> Tokenizer:
    """The tokenizer that lies with the model."""
    return (
        Tokenizer.from_gguf(source.path) if source.kind == "gguf" else Tokenizer.from_hf_folder(source.path)
    )


def resolve_dtype(asked: str) -> str:
    """What "auto" stands for on this platform."""
    if asked != "auto":
        return asked
    return DEFAULT_CPU_DTYPE if jax.default_backend() == "cpu" else "bfloat16"


def kv_spec(model: ModelConfig, page_size: int, dtype: str) -> KvSpec:
    """The model's pages: one group over all layers."""
    group = PageGroup(
        name="full" if model.sliding_window is None else "sliding",
        layers=tuple(range(model.num_layers)),
        kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        sliding_window=model.sliding_window,
    )
    return KvSpec(groups=(group,), page_size=page_size, dtype=dtype)


def pool_pages(config: EngineConfig, spec: KvSpec) -> int:
    """Pages of the pool, the dummy page among them.

    Raises:
        ConfigError: the memory holds no page.
    """
    if config.num_pages is not None:
        return config.num_pages
    asked = config.kv_cache_memory_bytes or DEFAULT_KV_BYTES
    pages = asked // spec.page_bytes
    if pages < 2:
        raise ConfigError(
            f"--kv-cache-memory-bytes {asked} holds less than 2 pages of {spec.page_bytes} bytes "
            f"({spec.page_size} tokens)"
        )
    return pages


def model_length(config: EngineConfig, model: ModelConfig, spec: KvSpec, num_pages: int) -> int:
    """The longest sequence: what was asked, else the model's context or what the pool holds, if less.

    Raises:
        ConfigError: more was asked than the model or the pool can serve.
    """
    longest, held = model.max_position_embeddings, (num_pages - 1) * spec.page_size
    asked = config.max_model_len
    if asked is None:
        return min(longest, held)
    if asked > longest:
        raise ConfigError(f"--max-model-len {asked} exceeds the model's context of {longest} tokens")
    if asked > held and model.sliding_window is None:
        raise ConfigError(
            f"--max-model-len {asked} needs {-(-asked // spec.page_size)} KV pages and the pool has "
            f"{num_pages - 1}: lower it to {held} or raise --kv-cache-memory-bytes"
        )
    return asked


def sampling_defaults(source: ModelSource) -> dict[str, float | int]:
    """Sampling defaults that lie with the model; a GGUF file has none.

    Raises:
        ConfigError: the file is not JSON, or holds a value that makes no sense.
    """
    place = source.path / "generation_config.json"
    if source.kind == "gguf" or not place.is_file():
        return {}
    try:
        values: Any = json.loads(place.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{place} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{place} holds no JSON object")
    found = {
        name: value
        for name in SAMPLING_DEFAULTS
        if isinstance(value := values.get(name), int | float) and not isinstance(value, bool)
    }
    if "max_new_tokens" in found:
        found["max_tokens"] = found.pop("max_new_tokens")
    try:
        SamplingParams(**found)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{place}: {error} (--generation-config vllm ignores the file)") from error
    return found
