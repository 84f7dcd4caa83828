"""After readiness nothing is compiled, whatever is asked for: by our count and by JAX's own."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree

import jax
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxserve import Engine, SamplingParams
from scheduler.types import Request
from tests.jaxserve.weights.conftest import tiny_folder

__all__ = ["tiny_folder"]

pytestmark = pytest.mark.slow

COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX tells of every program that it compiles or reads from its cache, in whatever thread."""

MAX_LEN = 400


@pytest.fixture
def engine(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Iterator[Engine]:
    """A tiny model, ready: 8 sequences at once, chunks of up to 40 tokens, too few pages for all of them."""
    folder = copytree(tiny_folder("llama"), tmp_path / "model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    with Engine(
        str(folder),
        dtype="float32",
        max_model_len=MAX_LEN,
        max_num_seqs=8,
        max_num_batched_tokens=40,
        num_pages=27,
        progress=False,
    ) as running:
        yield running


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """What JAX compiles from now on."""
    names: list[str] = []

    def heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED:
            names.append(str(kwargs))

    jax.monitoring.register_event_duration_secs_listener(heard)
    yield names
    jax.monitoring.unregister_event_duration_listener(heard)


def asked(**more: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, "temperature": 0.8, "seed": 5, "ignore_eos": True} | more)  # type: ignore[arg-type]


def traffic(engine: Engine) -> list[Request]:
    """Prompts from one token to nearly all that fit, with everything that a request may ask for."""
    text = "All happy families are alike; each unhappy family is unhappy in its own way. "
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5}
    kinds = [
        ("a", asked(max_tokens=200)),
        (text, asked(n=3)),
        (text, asked(temperature=0.0, logprobs=5)),
        (text * 4, asked(**penalties)),
        ("b", asked(max_tokens=300, **penalties)),
        (text * 2, asked(prompt_logprobs=3, max_tokens=1)),
        ("c", asked(prompt_logprobs=0, logprobs=20, max_tokens=200)),
        (text, asked(top_k=5, top_p=0.7, min_p=0.05)),
        (text * 3, asked(logit_bias={7: 5.0, 9: -100.0}, min_tokens=4, stop=("z", "!!"))),
        (text[:30], asked(stop_token_ids=(3, 4), n=2)),
        (text * 4, asked(prompt_logprobs=1, repetition_penalty=1.1)),
    ]
    return [engine.request(prompt, sampling) for prompt, sampling in kinds]


async def serve(engine: Engine, request: Request, abort_after: int | None) -> int:
    """Tokens of one request; aborted after some, where asked."""
    seen = 0
    async for delta in engine.stream(request):
        seen += len(delta.token_ids)
        if abort_after is not None and seen >= abort_after:
            break
    return seen


async def serve_all(engine: Engine) -> list[int]:
    served = []
    for round_ in range(2):
        waiting = [
            serve(engine, request, 2 if number % 4 == 3 else None)
            for number, request in enumerate(traffic(engine))
        ]
        served += await asyncio.gather(*waiting)
        if not round_:
            await engine.reset_prefix_cache()
    return served


def test_nothing_is_compiled_after_readiness(engine: Engine, compiled: list[str]) -> None:
    served = asyncio.run(serve_all(engine))
    assert len(served) == 22 and all(served)
    steps = engine.stats.steps
    assert steps.num_preemptions > 0, "the pool was meant to be too small"
    assert compiled == [], "programs that were compiled while serving"
    assert steps.compile_misses == 0
    text = engine.metrics_text()[0].decode()
    assert 'vllm:compile_misses_total{engine="0"' in text
    assert 0 < steps.padding_tokens < steps.dispatched_tokens
    assert steps.dispatched_tokens - steps.padding_tokens >= steps.computed_prompt_tokens
    assert [line for line in text.splitlines() if line.startswith("vllm:padding_waste_ratio{")]


def test_nothing_is_compiled_after_a_step_has_failed(
    engine: Engine, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages and slots are made anew."""
    device = engine._parts.device
    real, failures = device._program, [True]

    def program(shape):
        if shape.bucket is not None and failures:
            failures.pop()
            raise RuntimeError("this step fails")
        return real(shape)

    monkeypatch.setattr(device, "_program", program)
    request, after = (engine.request("hello", asked()) for _ in range(2))

    async def both() -> tuple[str | None, int]:
        ends = [delta.finish_reason async for delta in engine.stream(request)]
        return ends[-1], await serve(engine, after, None)

    assert asyncio.run(both()) == ("error", 12)
    assert compiled == [] and engine.stats.steps.compile_misses == 0
