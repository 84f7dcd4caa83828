"""`jaxserve pull` and `jaxserve convert`: models on disk."""

import argparse
import os
import shutil
from pathlib import Path

from jaxserve.assemble import load_tokenizer, resolve_dtype
from jaxserve.weights.convert import convert
from jaxserve.weights.smollm2 import default_cache_dir
from jaxserve.weights.source import DEFAULT_MODEL, ModelSource, resolve


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Mounts both commands."""
    pull = commands.add_parser(
        "pull", help="fetch a model and say where it is", description="Fetch a model into the cache."
    )
    pull.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help=f"default {DEFAULT_MODEL}"
    )
    pull.add_argument("--cache-dir", "--download-dir", dest="cache_dir", type=Path, metavar="DIR")
    pull.set_defaults(run=_pull)
    change = commands.add_parser(
        "convert",
        help="write a model as an Orbax checkpoint",
        description="Write a model, with its tokenizer, as an Orbax folder that `jaxserve serve` takes.",
    )
    change.add_argument("model", metavar="MODEL", help="what `jaxserve serve` takes")
    change.add_argument("--to", choices=("orbax",), required=True, help="the format")
    change.add_argument("folder", type=Path, metavar="DIR", help="must not exist, or be empty")
    change.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="stored as")
    change.add_argument("--cache-dir", "--download-dir", dest="cache_dir", type=Path, metavar="DIR")
    change.set_defaults(run=_convert)


def _resolve(args: argparse.Namespace) -> ModelSource:
    return resolve(args.model, cache_dir=args.cache_dir or default_cache_dir(os.environ))


def _pull(args: argparse.Namespace) -> int:
    print(_resolve(args).path)
    return 0


def _convert(args: argparse.Namespace) -> int:
    source = _resolve(args)

    def add_text(folder: Path) -> None:
        load_tokenizer(source).save(folder)
        defaults = source.path / "generation_config.json"
        if source.kind != "gguf" and defaults.is_file():
            shutil.copyfile(defaults, folder / defaults.name)

    convert(source, args.folder, to=args.to, dtype=resolve_dtype(args.dtype), extra=add_text)
    print(args.folder)
    return 0
