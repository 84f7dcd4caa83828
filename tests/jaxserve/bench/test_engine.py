"""`latency` and `throughput` on an engine that only counts."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxserve.bench import latency, throughput
from jaxserve.outputs import CompletionOutput, RequestOutput
from scheduler.types import FinishReason, SamplingParams


class CountingEngine:
    """Gives `max_tokens` tokens for every prompt at once, and remembers what it was asked."""

    def __init__(self, model: str, **options: Any) -> None:
        self.made_with = (model, options)
        self.asked: list[tuple[list[str | Sequence[int]], list[SamplingParams]]] = []
        self.bars: set[bool | None] = set()
        self.closed = False

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        self.asked.append((list(prompts), each))
        self.bars.add(progress)
        pairs = zip(prompts, each, strict=True)
        return [self._output(prompt, (7,) * (params.max_tokens or 0)) for prompt, params in pairs]

    def _output(self, prompt: str | Sequence[int], tokens: tuple[int, ...]) -> RequestOutput:
        sequence = CompletionOutput(
            index=0,
            text="",
            token_ids=tokens,
            logprobs=None,
            finish_reason=FinishReason.LENGTH,
            stop_reason=None,
        )
        ids = (1, 2) if isinstance(prompt, str) else tuple(prompt)
        return RequestOutput(
            request_id="r", prompt=None, prompt_token_ids=ids, outputs=(sequence,), prefill=None
        )

    def close(self) -> None:
        self.closed = True


class Maker:
    """Makes one engine and keeps it for the test to look at."""

    engine: CountingEngine

    def __call__(self, model: str, **options: Any) -> CountingEngine:
        self.engine = CountingEngine(model, **options)
        return self.engine


def arguments(benchmark: Any, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    return parser.parse_args(["some-model", "--disable-tqdm", *words])


def test_latency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, path = Maker(), tmp_path / "report.json"
    words = ["--batch-size", "3", "--input-len", "5", "--output-len", "4", "--num-iters", "6"]
    args = arguments(latency, *words, "--num-iters-warmup", "1", "--json", str(path), "--engine", "seed=1")
    assert latency.run(args, make) == 0
    assert make.engine.made_with == ("some-model", {"seed": 1}) and make.engine.closed
    batches = [prompts for prompts, _ in make.engine.asked]
    assert [len(batch) for batch in batches] == [3] * 7
    assert len({tuple(prompt) for batch in batches for prompt in batch}) == 21, "no prompt comes twice"
    asked = {(params.max_tokens, params.ignore_eos) for _, each in make.engine.asked for params in each}
    assert asked == {(4, True)} and make.engine.bars == {False}
    report = json.loads(path.read_text())
    assert len(report["seconds"]) == 6 and report["latency"]["count"] == 6
    assert report["output_throughput"] == pytest.approx(6 * 12 / sum(report["seconds"]))
    assert "3 x (5 -> 4 tokens)" in capsys.readouterr().out


def test_throughput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, path = Maker(), tmp_path / "report.json"
    words = ["--num-prompts", "10", "--input-len", "5", "--output-len", "4", "--warmup", "2"]
    assert throughput.run(arguments(throughput, *words, "--json", str(path)), make) == 0
    assert [len(prompts) for prompts, _ in make.engine.asked] == [2, 10] and make.engine.closed
    report = json.loads(path.read_text())
    assert (report["prompt_tokens"], report["output_tokens"]) == (50, 40)
    assert report["total_throughput"] == pytest.approx(90 / report["duration"])
    assert report["arguments"]["num_prompts"] == 10
    assert "10 requests" in capsys.readouterr().out


def test_text_prompts_go_to_the_engine_as_text(tmp_path: Path) -> None:
    make, path = Maker(), tmp_path / "prompts.txt"
    path.write_text("hello\n")
    words = ["--num-prompts", "2", "--dataset-path", str(path), "--warmup", "0"]
    assert throughput.run(arguments(throughput, *words), make) == 0
    assert make.engine.asked[0][0] == ["hello", "hello"]


def test_a_prompt_may_have_an_output_length_of_its_own(tmp_path: Path) -> None:
    make, path = Maker(), tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "x", "output_len": 3}\n"y"\n')
    words = ["--num-prompts", "2", "--dataset-path", str(path), "--output-len", "9", "--warmup", "0"]
    assert throughput.run(arguments(throughput, *words), make) == 0
    (asked,) = make.engine.asked
    assert {(prompt, params.max_tokens) for prompt, params in zip(*asked, strict=True)} == {
        ("x", 3),
        ("y", 9),
    }


def test_throughput_takes_no_chats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "x"}]}')
    assert throughput.run(arguments(throughput, "--dataset-path", str(path)), Maker()) == 2
    assert capsys.readouterr().err.startswith("error: throughput")


@pytest.mark.parametrize("benchmark", [latency, throughput])
def test_bad_engine_options_are_refused_before_an_engine_is_made(
    benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.run(arguments(benchmark, "--engine", "x"), Maker()) == 2
    assert "NAME=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", [latency, throughput])
def test_the_engine_is_closed_when_it_fails(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: CountingEngine, prompts: object, sampling: object, **_: object) -> list[RequestOutput]:
        raise RuntimeError("out of pages")

    make = Maker()
    monkeypatch.setattr(CountingEngine, "generate", fail)
    with pytest.raises(RuntimeError, match="out of pages"):
        benchmark.run(arguments(benchmark), make)
    assert make.engine.closed
