"""Flags of the engine, shared by every command that runs a model."""

import argparse
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxserve.config import (
    BACKENDS,
    DETERMINISTIC_TOKEN_BUDGET,
    DTYPES,
    POLICIES,
    TOKEN_BUDGET,
    ConfigError,
    EngineConfig,
)
from jaxserve.weights.smollm2 import default_cache_dir
from jaxserve.weights.source import DEFAULT_MODEL
from kv.config import BOTH, OFFLOADING, ConnectorConfig, TransferConfigError, parse

SIDE_CHANNEL_HOST = "VLLM_NIXL_SIDE_CHANNEL_HOST"
SIDE_CHANNEL_PORT = "VLLM_NIXL_SIDE_CHANNEL_PORT"

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
        help=f"token budget of a step (default {TOKEN_BUDGET}; "
        f"{DETERMINISTIC_TOKEN_BUDGET} with --deterministic)")  # fmt: skip
    add("--max-num-queued-reqs", type=size, default=defaults.max_num_queued_reqs, metavar="N",
        help="requests that may wait; beyond, 429 (default %(default)s)")  # fmt: skip
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True,
        help="share the pages of equal prefixes")  # fmt: skip
    add("--scheduling-policy", choices=POLICIES, default="fcfs", help="who runs first (default fcfs)")
    add("--attention-backend", choices=BACKENDS, default="auto", help="of paged attention")
    add("--enforce-eager", action="store_true", help="compile each shape on first use, not before the start")
    add("--deterministic", action="store_true",
        help="the same request gives bitwise the same answer in any company; slower")  # fmt: skip
    add("--seed", type=int, default=0, help="seeds of requests without one are drawn from it")
    add("--generation-config", choices=("auto", "vllm"), default="auto",
        help="auto: sampling defaults from the model's generation_config.json; vllm: none")  # fmt: skip
    add("--chat-template", type=Path, metavar="FILE", help="in place of the model's chat template")
    add("--cache-dir", "--download-dir", dest="cache_dir", type=Path, metavar="DIR",
        help="of downloaded models and compiled programs (default: the user's cache folder)")  # fmt: skip
    add("--record", type=Path, metavar="FILE", help="write every step's inputs there, for jaxserve replay")
    _add_transfer(parser)


def _add_transfer(parser: argparse.ArgumentParser) -> None:
    defaults = EngineConfig(model=DEFAULT_MODEL)
    add = parser.add_argument_group("KV transfer").add_argument
    add("--kv-transfer-config", metavar="JSON",
        help='what moves KV pages, as in vLLM: {"kv_connector": ..., "kv_role": ...}')  # fmt: skip
    add("--kv-offloading-size", type=float, metavar="GIB",
        help="host memory for KV pages, in GiB: short for OffloadingConnector")  # fmt: skip
    add("--kv-offloading-backend", choices=("native",), help="of --kv-offloading-size (default native)")
    add("--nixl-side-channel-host", metavar="HOST", help="this machine's address on which NIXL peers ask "
        f"(default: ${SIDE_CHANNEL_HOST}, else {defaults.side_channel_host})")  # fmt: skip
    add("--nixl-side-channel-port", type=int, metavar="PORT", help="0: any free one "
        f"(default: ${SIDE_CHANNEL_PORT}, else {defaults.side_channel_port})")  # fmt: skip
    add("--kv-auth-key-file", type=Path, metavar="FILE",
        help="key that NIXL peers share (default: one in the user's cache folder)")  # fmt: skip


def engine_config(
    args: argparse.Namespace, model: str, environ: Mapping[str, str] = os.environ, **more: Any
) -> EngineConfig:
    """The flags as a configuration.

    Raises:
        ConfigError: a value out of range, or a contradiction.
    """
    return EngineConfig(
        model=model,
        dtype="float32" if args.dtype == "float" else args.dtype,
        max_model_len=args.max_model_len,
        page_size=args.page_size,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        num_pages=args.num_pages,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_queued_reqs=args.max_num_queued_reqs,
        enable_prefix_caching=args.enable_prefix_caching,
        scheduling_policy=args.scheduling_policy,
        attention_backend=args.attention_backend,
        enforce_eager=args.enforce_eager,
        deterministic=args.deterministic,
        seed=args.seed,
        generation_config=args.generation_config,
        chat_template=args.chat_template,
        cache_dir=args.cache_dir or default_cache_dir(environ),
        record=args.record,
        kv_transfer=kv_transfer(args),
        side_channel_host=_side_channel_host(args, environ),
        side_channel_port=_side_channel_port(args, environ),
        kv_auth_key_file=args.kv_auth_key_file,
        **more,
    )


def kv_transfer(args: argparse.Namespace) -> ConnectorConfig | None:
    """The connectors that were asked for; None: none.

    Raises:
        ConfigError: JSON that makes no sense, or a contradiction.
    """
    size = args.kv_offloading_size
    if size is None:
        if args.kv_offloading_backend is not None:
            raise ConfigError("--kv-offloading-backend needs --kv-offloading-size")
        if args.kv_transfer_config is None:
            return None
        try:
            return parse(args.kv_transfer_config)
        except TransferConfigError as error:
            raise ConfigError(f"--kv-transfer-config: {error}") from error
    if args.kv_transfer_config is not None:
        raise ConfigError(
            "--kv-offloading-size and --kv-transfer-config contradict each other: name OffloadingConnector "
            "as a child of MultiConnector instead"
        )
    if not (math.isfinite(size) and 1 <= size * 2**30 < 2**53):
        raise ConfigError(f"--kv-offloading-size must be a positive number of GiB, got {size:g}")
    return ConnectorConfig(kind=OFFLOADING, role=BOTH, cpu_bytes=int(size * 2**30), digest=False)


def _side_channel_host(args: argparse.Namespace, environ: Mapping[str, str]) -> str:
    if args.nixl_side_channel_host is not None:
        return args.nixl_side_channel_host
    return environ.get(SIDE_CHANNEL_HOST) or EngineConfig(model=DEFAULT_MODEL).side_channel_host


def _side_channel_port(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    if args.nixl_side_channel_port is not None:
        return args.nixl_side_channel_port
    port = environ.get(SIDE_CHANNEL_PORT)
    if not port:
        return EngineConfig(model=DEFAULT_MODEL).side_channel_port
    if not (port.isascii() and port.isdecimal() and len(port) <= 5):
        raise ConfigError(f"{SIDE_CHANNEL_PORT} must be a port, got {port!r}")
    return int(port)
