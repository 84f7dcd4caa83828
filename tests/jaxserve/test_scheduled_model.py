"""Scheduler and device together, with tiny models: full and sliding-window attention, few pages, chunks.

A sliding window gives pages back while a sequence runs, so that page tables begin with the dummy page: what
is generated must still be what dense attention over the whole sequence gives.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.device import Device
from jaxserve.dispatch import SlotSetup
from jaxserve.model.transformer import dense_attend, random_model
from jaxserve.weights.load import Loaded
from kv.types import KvSpec, PageGroup
from scheduler.state import check, initial_state
from scheduler.step import step
from scheduler.types import Inputs, Limits, Request, SamplingParams, SchedulerConfig
from tests.jaxserve.test_forward import PAGE, VOCAB, config

MAX_LEN, NEW_TOKENS = 64, 14
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)


def dense_greedy(graphdef, weights, prompt: list[int], window: int | None) -> list[int]:
    """The model's continuation, the whole sequence computed anew for each token."""
    attend = functools.partial(dense_attend, sliding_window=window)

    @jax.jit
    def logits(tokens, last):
        model = nnx.merge(graphdef, weights)
        hidden, _ = model.hidden(tokens, jnp.arange(MAX_LEN), None, attend)
        return model.logits(hidden[last][None])[0]

    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        padded = np.zeros(MAX_LEN, np.int32)
        padded[: len(tokens)] = tokens
        tokens.append(int(np.asarray(logits(padded, len(tokens) - 1)).argmax()))
    return tokens[len(prompt) :]


class Served:
    """Turns of the real scheduler and the real device, without the engine's thread."""

    def __init__(self, window: int | None, num_pages: int, budget: int) -> None:
        model = config(window)
        self.graphdef, self.weights = random_model(model, seed=1, dtype="float32")
        group = PageGroup(name="all", layers=(0, 1, 2), kv_heads=2, head_dim=16, sliding_window=window)
        self.limits = Limits(max_num_batched_tokens=budget, max_num_seqs=3)
        self.device = Device(
            Loaded(config=model, graphdef=self.graphdef, state=self.weights, weights_digest="tiny"),
            KvSpec(groups=(group,), page_size=PAGE, dtype="float32"),
            num_pages=num_pages,
            max_num_seqs=3,
            max_num_batched_tokens=budget,
            max_model_len=MAX_LEN,
            backend="xla",
        )
        self.state = initial_state(
            SchedulerConfig(
                windows=(window,), page_size=PAGE, num_pages=num_pages, max_num_seqs=3, max_model_len=MAX_LEN
            )
        )
        self.outputs: dict[str, list[int]] = {}
        self.preempted = self.hits = 0
        self.most_pages = 0

    def run(self, requests: list[Request]) -> None:
        prompts = {request.request_id: request.prompt_token_ids for request in requests}
        inputs, owners = Inputs(arrivals=tuple(requests)), {}
        for _ in range(400):
            self.state, plan = step(self.state, inputs, self.limits)
            check(self.state)
            for slot, token in zip(plan.accepted.slots, plan.accepted.tokens, strict=True):
                self.outputs.setdefault(owners[int(slot)], []).append(int(token))
            owners.update({entry.slot: entry.request_id for entry in plan.admitted})
            self.preempted += len(plan.preempted)
            self.hits += sum(entry.hit_tokens for entry in plan.admitted)
            self.most_pages = max(self.most_pages, plan.gauges.pages_in_use)
            if not len(plan.rows):
                assert not plan.gauges.running and not plan.gauges.waiting
                return
            setups = [
                SlotSetup(
                    slot=entry.slot, sampling=GREEDY, seed=0, stop_token_ids=(),
                    tokens=np.asarray(prompts[entry.request_id], np.int32), num_prompt=1,
                )
                for entry in plan.admitted
            ]  # fmt: skip
            executed = self.device.wait(self.device.start(plan, setups, []))
            assert executed.outcome.error is None
            inputs = Inputs(outcome=executed.outcome)
        raise AssertionError("the requests did not end")


@pytest.mark.parametrize(("window", "num_pages"), [(None, 21), (7, 14), (7, 40), (1, 12)])
def test_what_is_served_is_what_dense_attention_gives(window, num_pages):
    rng = np.random.default_rng(2)
    shared = rng.integers(1, VOCAB, 18).tolist()
    prompts = [shared + rng.integers(1, VOCAB, tail).tolist() for tail in (1, 9, 13, 5)]
    served = Served(window, num_pages, budget=11)
    for round_number in range(2):
        served.run(
            [
                Request(request_id=f"{round_number}-{index}", prompt_token_ids=tuple(prompt), sampling=GREEDY)
                for index, prompt in enumerate(prompts)
            ]
        )
    for index, prompt in enumerate(prompts):
        wanted = dense_greedy(served.graphdef, served.weights, prompt, window)
        assert served.outputs[f"0-{index}"] == wanted
        assert served.outputs[f"1-{index}"] == wanted, "with whatever was still cached"
    assert served.device.pool_moves == 0
    if window is None:
        assert served.preempted > 0
    else:
        longest = -(-(max(len(prompt) for prompt in prompts) + NEW_TOKENS) // PAGE)
        assert served.most_pages < 3 * longest, "the window gives pages back"
    if num_pages == 40:
        assert served.hits > 0
