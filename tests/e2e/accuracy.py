"""Asks the same questions of a prefill server alone and of a pair: same greedy text, same score.

Exit status 0 only if every text is the same and the decode server computed no prompt token itself.
"""

import argparse
import concurrent.futures
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, it is not in the package

from tests.e2e.connectors.fleet import ask, at_rest, sources, text_of

CAPITALS = """France Paris|Italy Rome|Spain Madrid|Germany Berlin|Japan Tokyo|China Beijing|Russia Moscow|
Egypt Cairo|Greece Athens|Portugal Lisbon|Austria Vienna|Poland Warsaw|Norway Oslo|Sweden Stockholm|
Denmark Copenhagen|Finland Helsinki|Ireland Dublin|Hungary Budapest|Cuba Havana|Peru Lima|Chile Santiago|
Kenya Nairobi|Iran Tehran|Iraq Baghdad|Turkey Ankara|Thailand Bangkok|Vietnam Hanoi|Canada Ottawa|
Australia Canberra|Belgium Brussels"""
OPPOSITES = """hot cold|big small|up down|left right|day night|black white|good bad|fast slow|high low|
old young|happy sad|open closed|rich poor|strong weak|light dark|wet dry|early late|full empty|hard soft|
long short|near far|loud quiet|clean dirty|true false|first last|win lose|buy sell|push pull|love hate|
start end"""
SUCCESSORS = """Monday Tuesday|Tuesday Wednesday|Wednesday Thursday|Thursday Friday|Friday Saturday|
Saturday Sunday|Sunday Monday|January February|February March|March April|April May|May June|June July|
July August|August September|September October|October November|November December|one two|two three|
three four|four five|five six|six seven|seven eight|eight nine|nine ten|ten eleven|eleven twelve|
twelve thirteen"""
WIDTH = 16


def questions() -> list[tuple[str, str]]:
    """Prompts and the word that each answer should begin with."""
    kinds = (
        ("What is the capital of {}?", CAPITALS, "Romania", "Bucharest"),
        ("What is the opposite of {}?", OPPOSITES, "inside", "outside"),
        ("What comes right after {}?", SUCCESSORS, "spring", "summer"),
    )
    asked = [
        (
            f"Question: {ask_for.format(known)}\nAnswer: {answer}\nQuestion: {ask_for.format(word)}\nAnswer:",
            wanted,
        )
        for ask_for, table, known, answer in kinds
        for word, wanted in (pair.split() for pair in table.replace("\n", "").split("|"))
    ]
    sums = [
        (f"Question: What is {a} plus {b}?\nAnswer:", str(a + b)) for a in range(1, 7) for b in range(1, 8)
    ]
    return asked + sums


def answers(url: str, prompts: list[str]) -> list[str]:
    """The greedy texts of a server."""
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        return list(threads.map(lambda prompt: text_of(ask(url, prompt, max_tokens=WIDTH)), prompts))


def score(texts: list[str], wanted: list[str]) -> float:
    """Fraction of the texts that begin with the wanted word."""
    right = [text.strip().lower().startswith(word.lower()) for text, word in zip(texts, wanted, strict=True)]
    return sum(right) / len(right)


def main() -> int:
    """Asks, compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alone", required=True, metavar="URL", help="the prefill server")
    parser.add_argument("--pair", required=True, metavar="URL", help="the router")
    parser.add_argument("--decode", required=True, metavar="URL", help="the decode server")
    parser.add_argument("--prompts", type=int, default=120, metavar="N", help="at least 100")
    args = parser.parse_args()
    asked = questions()[: args.prompts]
    if len(asked) < max(100, args.prompts):
        parser.error(f"--prompts must be 100 to {len(questions())}")
    prompts, wanted = [prompt for prompt, _ in asked], [word for _, word in asked]
    began = time.monotonic()
    before = at_rest(args.decode)
    paired = answers(args.pair, prompts)
    compute, hit, external = sources(at_rest(args.decode) - before)
    alone = answers(args.alone, prompts)
    print(f"{len(prompts)} prompts, {time.monotonic() - began:.0f} s")
    print(f"score alone {score(alone, wanted):.4f}, of the pair {score(paired, wanted):.4f}")
    print(f"prompt tokens on the decode server: {compute} computed, {hit} cached, {external} from the peer")
    different = [number for number, (a, b) in enumerate(zip(alone, paired, strict=True)) if a != b]
    for number in different:
        print(f"prompt {number}: alone {alone[number]!r}, pair {paired[number]!r}", file=sys.stderr)
    if compute or not external:
        print("error: the decode server did not get its prompts from the peer", file=sys.stderr)
    return 1 if different or compute or not external else 0


if __name__ == "__main__":
    sys.exit(main())
