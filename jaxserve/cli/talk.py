"""`jaxserve generate` and `jaxserve chat`: a model in the terminal, without a server."""

import argparse
import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

from jaxserve.cli.flags import add_engine, add_model, engine_config, model_of
from jaxserve.config import ConfigError
from jaxserve.engine import Engine
from scheduler.types import FinishReason, SamplingParams

QUIT = ("/quit", "/exit")


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Mounts both commands."""
    generate = commands.add_parser(
        "generate",
        help="continue prompts in the terminal",
        description="Continue prompts and print the text.",
    )
    add_model(generate)
    generate.add_argument("-p", "--prompt", action="append", default=[], help="a prompt; repeat it for more")
    generate.add_argument("--file", type=Path, help="one prompt per line")
    _add_sampling(generate, max_tokens=128, temperature=0.0)
    add_engine(generate)
    generate.set_defaults(run=lambda args: _generate(args, generate))

    chat = commands.add_parser(
        "chat",
        help="talk to a model in the terminal",
        description="Talk to a model; an empty line or /quit ends.",
    )
    add_model(chat)
    chat.add_argument("--system-prompt", metavar="TEXT", help="what the model is told first")
    chat.add_argument("-q", "--quick", metavar="TEXT", help="say this, print the answer, and end")
    _add_sampling(chat, max_tokens=512, temperature=0.7)
    add_engine(chat)
    chat.set_defaults(run=lambda args: _chat(args, chat))


def _add_sampling(parser: argparse.ArgumentParser, *, max_tokens: int, temperature: float) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=max_tokens, help="default %(default)s")
    group.add_argument(
        "--temperature", type=float, default=temperature, help="0: greedy (default %(default)g)"
    )
    group.add_argument("--top-p", type=float, default=1.0, help="default %(default)g")
    group.add_argument("--top-k", type=int, default=0, help="0: all (the default)")
    group.add_argument("--stop", action="append", default=[], help="a string that ends the text")


def _sampling(args: argparse.Namespace) -> SamplingParams:
    if args.max_tokens < 1 or args.temperature < 0 or not 0 < args.top_p <= 1 or args.top_k < 0:
        raise ConfigError(
            "--max-tokens must be at least 1, --temperature and --top-k not negative, --top-p in (0, 1]"
        )
    if "" in args.stop:
        raise ConfigError("--stop must not be empty")
    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        stop=tuple(args.stop),
    )


def _generate(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    prompts, sampling = list(args.prompt), _sampling(args)
    if args.file is not None:
        try:
            prompts += args.file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--file {args.file}: {error}") from error
    if not prompts and not sys.stdin.isatty():
        prompts = [sys.stdin.read().rstrip("\n")]
    if not prompts or "" in prompts:
        parser.error("give a prompt with -p, --file or standard input; it must not be empty")
    with Engine(engine_config(args, model_of(args, parser), log_stats=False)) as engine:
        for output in engine.generate(prompts, sampling):
            print(f"{output.prompt}{output.outputs[0].text}")
    return 0


def _chat(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    sampling = _sampling(args)
    messages = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    with Engine(engine_config(args, model_of(args, parser), log_stats=False)) as engine:
        if engine.chat is None:
            raise ConfigError("the model has no chat template; give one with --chat-template")
        for said in _lines(args.quick):
            messages.append({"role": "user", "content": said})
            prompt = engine.tokenizer.encode(engine.chat.render(messages), add_special_tokens=False)
            answer = asyncio.run(
                _answer(engine, prompt, sampling, lambda text: print(text, end="", flush=True))
            )
            print()
            messages.append({"role": "assistant", "content": answer})
    return 0


def _lines(quick: str | None):
    if quick is not None:
        yield quick
        return
    while True:
        try:
            said = input("> ")
        except EOFError:
            return
        if not said.strip() or said.strip() in QUIT:
            return
        yield said


async def _answer(
    engine: Engine, prompt: list[int], sampling: SamplingParams, show: Callable[[str], None]
) -> str:
    parts = []
    async for delta in engine.generate_stream(prompt, sampling):
        show(delta.text)
        parts.append(delta.text)
        if delta.finish_reason is FinishReason.ERROR:
            raise ConfigError(delta.message or "the request failed")
    return "".join(parts)
