"""Flags of the engine, shared by every command that runs a model."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxserve.config import BACKENDS, DTYPES, POLICIES, EngineConfig
from jaxserve.weights.smollm2 import default_cache_dir
from jaxserve.weights.source import DEFAULT_MODEL

SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


def size(text: str) -> int:
    """A count or bytes with an optional suffix: 2G is 2 GiB, 2g is two thousand million (as in vLLM)."""
    factor = SUFFIXES.get(text[-1:], 1)
    digits = text[:-1] if factor != 1 else text
    try:
        value = float(digits) * factor
        if value != value or value in (float("inf"), float("-inf")) or value != int(value):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number such as 4096, 512M or 2G") from None
    return int(value)


class OneValue(argparse.Action):
    """An option of two names, or one given twice: only with one value."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given = f"_{self.dest}_given"
        if getattr(namespace, given, values) != values:
            names = " and ".join(self.option_strings)
            parser.error(f"{names} are one option; it was given as {getattr(namespace, given)} and {values}")
        setattr(namespace, given, values)
        setattr(namespace, self.dest, values)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model, as an argument or as vLLM's `--model`."""
    parser.add_argument(
        "model_tag",
        nargs="?",
        metavar="MODEL",
        help="a Hugging Face folder, a GGUF file, an Orbax folder, a hub name, or "
        f"{DEFAULT_MODEL} (the default)",
    )
    parser.add_argument("--model", dest="model_flag", metavar="MODEL", help="the same as the argument")


def model_of(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """The model that was asked for."""
    if args.model_tag and args.model_flag and args.model_tag != args.model_flag:
        parser.error(f"two models: {args.model_tag} and --model {args.model_flag}")
    return args.model_tag or args.model_flag or DEFAULT_MODEL


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Flags that become an EngineConfig."""
    defaults = EngineConfig(model=DEFAULT_MODEL)
    group = parser.add_argument_group("model and engine")
    add = group.add_argument
    add("--dtype", choices=(*DTYPES, "float"), default="auto", help="of weights, activations and KV")
    add(
        "--max-model-len",
        type=size,
        metavar="N",
        help="longest prompt + output in tokens (default: the model's)",
    )
    add("--block-size", "--page-size", dest="page_size", action=OneValue, type=size, metavar="N",
        default=defaults.page_size, help="tokens per KV page (default %(default)s)")  # fmt: skip
    add("--kv-cache-memory-bytes", type=size, metavar="BYTES", help="size of the KV page buffer (default 1G)")
    add(
        "--num-gpu-blocks-override",
        dest="num_pages",
        type=size,
        metavar="N",
        help="pages of the KV page buffer",
    )
    add("--max-num-seqs", type=size, default=defaults.max_num_seqs, metavar="N",
        help="sequences that run at once (default %(default)s)")  # fmt: skip
    add("--max-num-batched-tokens", type=size, metavar="N",
        help=f"token budget of a step (default {defaults.max_num_batched_tokens})")  # fmt: skip
    add("--max-num-queued-reqs", type=size, default=defaults.max_num_queued_reqs, metavar="N",
        help="requests that may wait; beyond, 429 (default %(default)s)")  # fmt: skip
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True,
        help="share the pages of equal prefixes")  # fmt: skip
    add("--scheduling-policy", choices=POLICIES, default="fcfs", help="who runs first (default fcfs)")
    add("--attention-backend", choices=BACKENDS, default="auto", help="of paged attention")
    add("--enforce-eager", action="store_true", help="compile each shape on first use, not before the start")
    add("--seed", type=int, default=0, help="seeds of requests without one are drawn from it")
    add("--generation-config", choices=("auto", "vllm"), default="auto",
        help="auto: sampling defaults from the model's generation_config.json; vllm: none")  # fmt: skip
    add("--chat-template", type=Path, metavar="FILE", help="in place of the model's chat template")
    add("--cache-dir", "--download-dir", dest="cache_dir", type=Path, metavar="DIR",
        help="of downloaded models and compiled programs (default: the user's cache folder)")  # fmt: skip
    add("--record", type=Path, metavar="FILE", help="write every step's inputs there, for jaxserve replay")


def engine_config(
    args: argparse.Namespace, model: str, environ: Mapping[str, str] = os.environ, **more: Any
) -> EngineConfig:
    """The flags as a configuration.

    Raises:
        ConfigError: a value out of range, or a contradiction.
    """
    tokens = args.max_num_batched_tokens
    if tokens is None:
        tokens = max(EngineConfig(model=model).max_num_batched_tokens, args.max_num_seqs)
    return EngineConfig(
        model=model,
        dtype="float32" if args.dtype == "float" else args.dtype,
        max_model_len=args.max_model_len,
        page_size=args.page_size,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        num_pages=args.num_pages,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=tokens,
        max_num_queued_reqs=args.max_num_queued_reqs,
        enable_prefix_caching=args.enable_prefix_caching,
        scheduling_policy=args.scheduling_policy,
        attention_backend=args.attention_backend,
        enforce_eager=args.enforce_eager,
        seed=args.seed,
        generation_config=args.generation_config,
        chat_template=args.chat_template,
        cache_dir=args.cache_dir or default_cache_dir(environ),
        record=args.record,
        **more,
    )
