"""`jaxserve bench latency`: seconds for one batch from prompt to last token, in process."""

import argparse
import sys
import time

from tqdm import tqdm

from jaxserve.bench.datasets import random_prompts
from jaxserve.bench.engine import (
    MakeEngine,
    add_engine_arguments,
    count_output_tokens,
    engine_options,
    write_report,
)
from jaxserve.bench.options import at_least
from jaxserve.bench.stats import as_json, spread
from jaxserve.bench.tables import grid, number
from scheduler.types import SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags, with the names of `vllm bench latency`."""
    add_engine_arguments(parser)
    add = parser.add_argument
    add(
        "--batch-size",
        type=at_least(1),
        default=8,
        metavar="N",
        help="prompts at once (default: %(default)s)",
    )
    add(
        "--input-len",
        type=at_least(1),
        default=32,
        metavar="N",
        help="tokens per prompt (default: %(default)s)",
    )
    add(
        "--output-len",
        type=at_least(1),
        default=128,
        metavar="N",
        help="tokens to make (default: %(default)s)",
    )
    add(
        "--num-iters-warmup",
        type=at_least(0),
        default=2,
        metavar="N",
        help="not counted (default: %(default)s)",
    )
    add("--num-iters", type=at_least(1), default=10, metavar="N", help="counted (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")


def run(args: argparse.Namespace, make_engine: MakeEngine) -> int:
    """Measure and print; 0, or 2 if the arguments will not do. Every iteration has new prompts."""
    try:
        options = engine_options(args.engine)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sampling = SamplingParams(temperature=0.0, max_tokens=args.output_len, ignore_eos=True)
    iterations = args.num_iters_warmup + args.num_iters
    prompts = random_prompts(iterations * args.batch_size, args.input_len, seed=args.seed)
    seconds: list[float] = []
    output_tokens = 0
    engine = make_engine(args.model, **options)
    try:
        for i in tqdm(range(iterations), unit="batch", disable=args.disable_tqdm, dynamic_ncols=True):
            batch = [
                list(prompt.token_ids or ()) for prompt in prompts[i * args.batch_size :][: args.batch_size]
            ]
            began = time.perf_counter()
            outputs = engine.generate(batch, sampling, progress=False)
            if i >= args.num_iters_warmup:
                seconds.append(time.perf_counter() - began)
                output_tokens += count_output_tokens(outputs)
    finally:
        engine.close()
    measured = spread(seconds)
    heading = ["seconds per batch", "mean", "min", *(f"p{p}" for p, _ in measured.percentiles), "max"]
    values = (measured.mean, measured.min, *dict(measured.percentiles).values(), measured.max)
    batch_of = f"{args.batch_size} x ({args.input_len} -> {args.output_len} tokens)"
    rate = output_tokens / sum(seconds)
    print(f"\n{grid([heading, [batch_of, *map(number, values)]])}\n{number(rate)} output tokens/s")
    write_report(args, {"latency": as_json(measured), "seconds": seconds, "output_throughput": rate})
    return 0
