"""Prompts to measure with. Pure but for `read_prompts`: the same seed gives the same prompts.

Made prompts are token ids, so that their length is exact whatever the model. Ids are drawn from a range that
every usual vocabulary has and that holds no control tokens.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = (1_000, 16_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt: token ids, text, or chat messages; exactly one of them.

    Attributes:
        output_len: tokens to ask for; None: as the run says.
    """

    token_ids: tuple[int, ...] | None = None
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    output_len: int | None = None

    def __post_init__(self) -> None:
        if sum(part is not None for part in (self.token_ids, self.text, self.messages)) != 1:
            raise ValueError("a prompt is token ids, text or messages, and exactly one of them")


def random_prompts(
    count: int,
    input_len: int,
    *,
    seed: int,
    range_ratio: float = 0.0,
    vocabulary: tuple[int, int] = VOCABULARY,
) -> list[Prompt]:
    """Random token ids.

    Args:
        count: prompts to make.
        input_len: tokens of each; with a range ratio r, drawn evenly from input_len * [1 - r, 1 + r].
        seed: of the draw.
        range_ratio: in [0, 1).
        vocabulary: ids are in [low, high).

    Raises:
        ValueError: a length or a range that makes no sense.
    """
    if input_len < 1 or not 0 <= range_ratio < 1 or not 0 <= vocabulary[0] < vocabulary[1]:
        raise ValueError(f"bad random prompts: {input_len=}, {range_ratio=}, {vocabulary=}")
    rng = np.random.default_rng(seed)
    low = max(1, round(input_len * (1 - range_ratio)))
    lengths = rng.integers(low, round(input_len * (1 + range_ratio)), size=count, endpoint=True)
    return [_ids(rng.integers(*vocabulary, size=length)) for length in lengths]


def shared_prefix_prompts(
    count: int,
    input_len: int,
    *,
    prefix_len: int,
    num_prefixes: int,
    seed: int,
    vocabulary: tuple[int, int] = VOCABULARY,
) -> list[Prompt]:
    """Prompts of which every `num_prefixes`-th begins alike, as requests with the same system prompt do.

    Raises:
        ValueError: the prefix leaves no token of its own to a prompt, or there are no prefixes.
    """
    if not 0 < prefix_len < input_len or num_prefixes < 1:
        raise ValueError(f"bad shared prefix: {prefix_len=}, {input_len=}, {num_prefixes=}")
    rng = np.random.default_rng(seed)
    prefixes = rng.integers(*vocabulary, size=(num_prefixes, prefix_len))
    rests = rng.integers(*vocabulary, size=(count, input_len - prefix_len))
    return [_ids(np.concatenate([prefixes[i % num_prefixes], rest])) for i, rest in enumerate(rests)]


def _ids(array: np.ndarray) -> Prompt:
    return Prompt(token_ids=tuple(array.tolist()))


def read_prompts(path: Path, count: int, *, seed: int) -> list[Prompt]:
    """Prompts of a file: text with one per line, or JSONL (by its name) with an object or string per line.

    An object has "prompt" (text or token ids) or "messages", and may have "output_len" (or "output_tokens").
    They are shuffled, and repeated where the file has fewer than `count`.

    Raises:
        ValueError: a line that is none of these, or no prompt at all.
    """
    lines = [(i, line) for i, line in enumerate(path.read_text().splitlines(), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompts")
    if path.suffix == ".jsonl":
        prompts = [_from_json(line, f"{path}:{i}") for i, line in lines]
    else:
        prompts = [Prompt(text=line) for _, line in lines]
    order = np.random.default_rng(seed).permutation(len(prompts))
    return [prompts[order[i % len(prompts)]] for i in range(count)]


def _from_json(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {error}") from error
    if isinstance(value, str):
        return Prompt(text=value)
    if not isinstance(value, dict):
        raise ValueError(f"{where}: neither an object nor a string")
    output_len = value.get("output_len", value.get("output_tokens"))
    if output_len is not None and (not isinstance(output_len, int) or output_len < 1):
        raise ValueError(f"{where}: output_len must be a positive integer")
    prompt, messages = value.get("prompt"), value.get("messages")
    if isinstance(prompt, str):
        return Prompt(text=prompt, output_len=output_len)
    if isinstance(prompt, list) and prompt and all(isinstance(token, int) for token in prompt):
        return Prompt(token_ids=tuple(prompt), output_len=output_len)
    if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
        return Prompt(messages=tuple(messages), output_len=output_len)
    raise ValueError(f'{where}: needs "prompt" (text or token ids) or "messages"')
