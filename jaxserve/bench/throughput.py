"""`jaxserve bench throughput`: tokens per second of the engine, in process, with all prompts at once."""

import argparse
import sys
import time
from dataclasses import replace

from jaxserve.bench.datasets import Prompt, random_prompts
from jaxserve.bench.engine import (
    MakeEngine,
    add_engine_arguments,
    count_output_tokens,
    engine_options,
    write_report,
)
from jaxserve.bench.options import add_dataset_arguments, at_least, prompts_of
from jaxserve.bench.tables import number
from scheduler.types import SamplingParams

WARMUP_SEED = 1_000_003


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags, with the names of `vllm bench throughput` where the meaning is the same."""
    add_engine_arguments(parser)
    add_dataset_arguments(parser, num_prompts=256)
    parser.add_argument(
        "--warmup", type=at_least(0), default=4, metavar="N", help="prompts before, not counted (default: 4)"
    )


def run(args: argparse.Namespace, make_engine: MakeEngine) -> int:
    """Measure and print; 0, or 2 if the arguments will not do."""
    try:
        options = engine_options(args.engine)
        prompts = prompts_of(args)
        batch = [_words(prompt) for prompt in prompts]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sampling = SamplingParams(temperature=0.0, max_tokens=args.output_len, ignore_eos=args.ignore_eos)
    each = [replace(sampling, max_tokens=prompt.output_len or args.output_len) for prompt in prompts]
    engine = make_engine(args.model, **options)
    try:
        if args.warmup:
            warmup = random_prompts(args.warmup, args.input_len, seed=args.seed + WARMUP_SEED)
            engine.generate([_words(prompt) for prompt in warmup], sampling, progress=False)
        began = time.perf_counter()
        outputs = engine.generate(batch, each, progress=False if args.disable_tqdm else None)
        seconds = time.perf_counter() - began
    finally:
        engine.close()
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    output_tokens = count_output_tokens(outputs)
    results = {
        "duration": seconds,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "request_throughput": len(outputs) / seconds,
        "output_throughput": output_tokens / seconds,
        "total_throughput": (prompt_tokens + output_tokens) / seconds,
    }
    print(f"\n{len(outputs)} requests in {number(seconds)} s", end="; ")
    print(f"{prompt_tokens:,} prompt tokens, {output_tokens:,} output tokens")
    print(f"{number(results['request_throughput'])} requests/s", end=", ")
    print(f"{number(results['output_throughput'])} output tokens/s", end=", ")
    print(f"{number(results['total_throughput'])} tokens/s")
    write_report(args, results)
    return 0


def _words(prompt: Prompt) -> str | list[int]:
    """The prompt as the engine takes it.

    Raises:
        ValueError: it is a chat.
    """
    if prompt.messages is not None:
        raise ValueError("throughput takes no messages; give prompts")
    return prompt.text if prompt.text is not None else list(prompt.token_ids or ())
