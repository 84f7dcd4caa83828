"""Command-line words become values, or a clear refusal."""

import argparse
from pathlib import Path

import pytest

from jaxserve.bench import latency, serve, throughput
from jaxserve.bench.engine import engine_options
from jaxserve.bench.options import add_dataset_arguments, prompts_of, slo_of
from jaxserve.bench.stats import Slo


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_dataset_arguments(parser, num_prompts=3)
    return parser.parse_args(words)


def test_slo_words() -> None:
    assert slo_of(None) is None
    assert slo_of(["ttft:200", "e2el:3000"]) == Slo(ttft=0.2, e2el=3.0)


@pytest.mark.parametrize("word", ["itl:3", "ttft", "ttft:", "ttft:-1", "ttft:nan", "ttft:x"])
def test_bad_slo_words(word: str) -> None:
    with pytest.raises(ValueError, match="--goodput"):
        slo_of([word])


def test_the_dataset_follows_the_arguments(tmp_path: Path) -> None:
    assert [len(p.token_ids or ()) for p in prompts_of(parse("--input-len", "7"))] == [7, 7, 7]
    shared = prompts_of(parse("--dataset-name", "shared-prefix", "--input-len", "8", "--num-prompts", "2"))
    assert (shared[0].token_ids or ())[:4] == (shared[1].token_ids or ())[:4]
    path = tmp_path / "p.txt"
    path.write_text("hello\n")
    assert prompts_of(parse("--dataset-path", str(path)))[0].text == "hello"


def test_contradictions() -> None:
    for words in (["--dataset-name", "file"], ["--dataset-name", "random", "--dataset-path", "x"]):
        with pytest.raises(ValueError, match="--dataset-path"):
            prompts_of(parse(*words))


@pytest.mark.parametrize("words", [["--num-prompts", "0"], ["--input-len", "x"], ["--vocab-range", "1"]])
def test_bad_numbers(words: list[str]) -> None:
    with pytest.raises(argparse.ArgumentError):
        parse(*words)


def test_engine_options() -> None:
    words = ["max-num-seqs=64", "dtype=float32", "enforce_eager=true", "x=null"]
    assert engine_options(words) == {
        "max_num_seqs": 64,
        "dtype": "float32",
        "enforce_eager": True,
        "x": None,
    }
    for word in ("a", "=3", "1a=3"):
        with pytest.raises(ValueError, match="NAME=VALUE"):
            engine_options([word])


@pytest.mark.parametrize("benchmark", [serve, latency, throughput])
def test_help_can_be_shown(benchmark: object, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench")
    benchmark.add_arguments(parser)  # type: ignore[attr-defined]
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help"])
    assert ended.value.code == 0
    assert "--output-len" in capsys.readouterr().out
