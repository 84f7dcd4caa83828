"""`--deterministic`: the same request, the same bits, whatever its company; and a record that runs again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxserve import Engine, RequestOutput, SamplingParams
from jaxserve.cli import main
from jaxserve.rerun import Rerun
from kv.config import ConnectorConfig, parse
from scheduler.record import encode_header
from scheduler.types import Inputs, Limits, Plan, SchedulerConfig
from tests.goldens.compare import goldens

GOLDENS = goldens("default_model")
NIXL = '{"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}'
NAMES = ("code", "chat", "long", "single")
OPTIONS: dict[str, Any] = {
    "deterministic": True,
    "enforce_eager": True,
    "progress": False,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
    "num_pages": 120,
}


def asked(number: int) -> tuple[list[int], SamplingParams]:
    """Greedy and drawn, with a seed and without, long and short."""
    sampling = SamplingParams(
        max_tokens=12,
        temperature=0.8 * (number % 2),
        seed=5 if number == 1 else None,
        logprobs=3,
        prompt_logprobs=2 if number == 0 else None,  # such a prompt is never looked up in the cache
        ignore_eos=True,
    )
    return GOLDENS[NAMES[number]]["prompt"][:150], sampling


def told(output: RequestOutput) -> tuple[object, ...]:
    """Everything about an answer that could differ by a bit."""
    return output.prompt_logprobs, *((one.token_ids, one.logprobs) for one in output.outputs)


def answers(engine: Engine, numbers: list[int], strangers: int = 0) -> dict[int, tuple[object, ...]]:
    prompts, params = (list(column) for column in zip(*map(asked, numbers), strict=True))
    prompts += [[7 + number] * (3 * number + 1) for number in range(strangers)]
    params += [SamplingParams(max_tokens=30 + number, temperature=1.0) for number in range(strangers)]
    outputs = engine.generate(prompts[::-1], params[::-1])[::-1]
    return dict(zip(numbers, map(told, outputs[: len(numbers)]), strict=True))


@pytest.mark.engine
@pytest.mark.parametrize("backend", ["xla", pytest.param("pallas", marks=pytest.mark.slow)])
def test_a_request_has_the_same_bits_alone_cached_in_a_crowd_and_after_a_restart(
    backend: str,
) -> None:
    numbers = list(range(len(NAMES)))
    with Engine("smollm2", attention_backend=backend, **OPTIONS) as engine:
        alone: dict[int, tuple[object, ...]] = {}
        for number in numbers:
            alone |= answers(engine, [number])
        hits = engine.stats.prompts.local_cache_hit
        assert answers(engine, numbers) == alone
        assert engine.stats.prompts.local_cache_hit > hits, "cached"
    # Strangers take tokens of every step and pages of a small pool: other chunks, and some are preempted.
    with Engine("smollm2", attention_backend=backend, **{**OPTIONS, "num_pages": 14}) as engine:
        assert answers(engine, numbers, strangers=8) == alone
        assert engine.stats.steps.num_preemptions > 0


@pytest.mark.engine
def test_a_record_gives_its_tokens_again_and_one_that_differs_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "record"
    with Engine("smollm2", record=record, **OPTIONS) as engine:
        answers(engine, [0, 1, 3], strangers=10)
        sampled = engine.stats.steps.generation_tokens
    assert main(["replay", str(record), "--tokens"]) == 0
    said = capsys.readouterr().out
    assert "every plan is the same" in said and "were sampled again: every one is the same" in said
    assert int(said.splitlines()[-1].split()[0]) >= sampled
    assert main(["replay", str(record), "--tokens", "--model", str(tmp_path)]) == 2, "no model lies there"
    draw = Rerun.take

    def another(self: Rerun, inputs: Inputs, plan: Plan) -> None:
        """As if the device had sampled something else in step 9."""
        outcome = inputs.outcome
        if outcome is not None and outcome.step_id == 9:
            inputs = replace(inputs, outcome=replace(outcome, tokens=outcome.tokens + 1))
        draw(self, inputs, plan)

    monkeypatch.setattr(Rerun, "take", another)
    capsys.readouterr()
    assert main(["replay", str(record), "--tokens"]) == 2
    assert "step 9: output token" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("engine", "transfer", "message"),
    [({}, None, "without --deterministic"), ({"deterministic": True}, parse(NIXL), "connectors")],
)
def test_tokens_that_need_not_come_again_are_not_compared(
    engine: dict[str, bool],
    transfer: ConnectorConfig | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = SchedulerConfig(num_pages=9, max_num_seqs=2, max_model_len=64, transfer=transfer)
    data, _ = encode_header(config, Limits(max_num_batched_tokens=8, max_num_seqs=2), engine)
    (tmp_path / "record").write_bytes(data)
    assert main(["replay", str(tmp_path / "record")]) == 0
    assert main(["replay", str(tmp_path / "record"), "--tokens"]) == 2
    assert message in capsys.readouterr().err
