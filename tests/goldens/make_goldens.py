"""Make the goldens again: ask transformers on PyTorch for what our model must compute.

    pip install '.[goldens]'
    python tests/goldens/make_goldens.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf

An independent implementation throughout: transformers reads, un-permutes and dequantises the GGUF file,
tokenizes, and runs in float32 with plain (eager) attention. Nothing of ours is imported but the recipe of the
tiny models and the texts. Writes default_model.json and tiny_models.json beside this file.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import prompts
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
NEW_TOKENS = 40
SAMPLED_IDS = 64
TOP = 20


@torch.no_grad()
def golden(model: Any, ids: list[int], new_tokens: int) -> dict[str, Any]:
    """Greedy continuation of `ids`, and what the logits were on the way.

    `rows` describes some positions of prompt + continuation in full; `top2_gaps` is, for each new token, by
    how much its logit led, so that a test knows which choices are near ties.
    """
    text = list(ids)
    cache = None
    feed = torch.tensor([ids])
    gaps = []
    for _ in range(new_tokens):
        out = model(feed, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        best = torch.topk(out.logits[0, -1], 2)
        gaps.append(round(float(best.values[0] - best.values[1]), 5))
        text.append(int(best.indices[0]))
        feed = torch.tensor([text[-1:]])
    # Once more without a cache, all positions together.
    logits = model(torch.tensor([text[:-1]]), use_cache=False).logits[0]
    last = len(ids) - 1
    chosen = sorted({0, last // 3, 2 * last // 3, last, last + new_tokens // 2})
    for step in range(new_tokens):
        if gaps[step] > 1e-3 and int(logits[last + step].argmax()) != text[last + step + 1]:
            raise RuntimeError("with and without a cache the model chose different tokens")
    rows = [row(logits[position], position) for position in chosen]
    return {"prompt": ids, "continuation": text[len(ids) :], "top2_gaps": gaps, "rows": rows}


def row(logits: torch.Tensor, position: int) -> dict[str, Any]:
    """What is kept of one position's logits: a sample over the vocabulary, the top, and log sum exp."""
    step = len(logits) // SAMPLED_IDS
    top = torch.topk(logits, TOP)
    return {
        "position": position,
        "sampled": [round(float(value), 5) for value in logits[::step][:SAMPLED_IDS]],
        "top_ids": top.indices.tolist(),
        "top_values": [round(float(value), 5) for value in top.values],
        "logsumexp": round(float(torch.logsumexp(logits.double(), 0)), 5),
    }


def default_model(gguf: Path) -> dict[str, Any]:
    """Goldens of the default model, by name of the prompt."""
    folder, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = {key: tokenizer(text, add_special_tokens=False).input_ids for key, text in prompts.TEXTS.items()}
    ids["single"] = tokenizer(prompts.SINGLE_TOKEN, add_special_tokens=False).input_ids
    chat = tokenizer.apply_chat_template(list(prompts.CHAT), add_generation_prompt=True, tokenize=False)
    ids["chat"] = tokenizer(chat, add_special_tokens=False).input_ids
    if len(ids["single"]) != 1 or len(ids["long"]) <= 1000:
        raise RuntimeError("the single prompt must have one token and the long one more than 1,000")
    return {key: golden(model, value, NEW_TOKENS) for key, value in ids.items()}


def tiny_models() -> dict[str, Any]:
    """Goldens of the tiny models, by name."""
    found = {}
    for name in tiny.CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            tiny.write_folder(name, Path(folder))
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            ).eval()
            found[name] = golden(model, tiny.prompt(name), tiny.NEW_TOKENS)
    return found


def write(path: Path, goldens: dict[str, Any]) -> None:
    """One golden per line."""
    lines = ",\n".join(
        f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in goldens.items()
    )
    path.write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(HERE / "tiny_models.json", tiny_models())
    write(HERE / "default_model.json", default_model(Path(sys.argv[1])))
