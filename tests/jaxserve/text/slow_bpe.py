"""The slow twins of tokenization: no regular expressions, no queues, nothing shared with the fast path."""

import itertools
import unicodedata
from collections.abc import Mapping, Sequence

WHITE_SPACE = frozenset(
    map(
        chr,
        [
            *range(9, 14),
            0x20,
            0x85,
            0xA0,
            0x1680,
            *range(0x2000, 0x200B),
            0x2028,
            0x2029,
            0x202F,
            0x205F,
            0x3000,
        ],
    )
)
SUFFIXES = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def kind(character: str) -> str:
    """Letter, number, space or other, as GPT-2's pattern divides characters."""
    if character in WHITE_SPACE:
        return "space"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(character)[0], "other")


def run_end(text: str, start: int, wanted: str) -> int:
    end = start
    while end < len(text) and kind(text[end]) == wanted:
        end += 1
    return end


def gpt2_words(text: str) -> list[str]:
    """GPT-2's words (Radford et al., 2019): suffixes, then runs of one kind with at most one space before."""
    words, i = [], 0
    while i < len(text):
        suffix = next((s for s in SUFFIXES if text.startswith(s, i)), None)
        first = i + 1 if text[i] == " " and i + 1 < len(text) and kind(text[i + 1]) != "space" else i
        if suffix is not None:
            end = i + len(suffix)
        elif kind(text[first]) != "space":
            end = run_end(text, first, kind(text[first]))
        else:
            end = run_end(text, i, "space")
            if end < len(text) and end - i > 1:
                end -= 1  # the last space belongs to the word after it
        words.append(text[i:end])
        i = end
    return words


def smollm_words(text: str) -> list[str]:
    """Every digit alone; GPT-2's words in the stretches between digits."""
    stretches = itertools.groupby(text, key=lambda character: kind(character) == "number")
    return [
        word
        for is_digits, stretch in stretches
        for word in (list(stretch) if is_digits else gpt2_words("".join(stretch)))
    ]


def byte_characters() -> dict[int, str]:
    """GPT-2's printable name of each byte."""
    table, spare = {}, 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            table[byte] = chr(byte)
        else:
            table[byte] = chr(spare)
            spare += 1
    return table


def merge_by_rank(word: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Join the best-ranked adjacent pair, leftmost first, until no pair has a rank."""
    parts = list(word)
    while True:
        ranked = [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]
        if not ranked:
            return parts
        _, i = min(ranked)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def split_special(text: str, special: Sequence[str]) -> list[str]:
    """Text and special tokens in turn: leftmost first, longest first."""
    parts, begin, i = [], 0, 0
    while i < len(text):
        found = max((s for s in special if text.startswith(s, i)), key=len, default=None)
        if found is None:
            i += 1
            continue
        parts += [text[begin:i], found]
        i += len(found)
        begin = i
    return [*parts, text[begin:]]


class SlowByteBpe:
    """Byte-level BPE with SmolLM's words. Bytes without a piece vanish, as they do in the original."""

    def __init__(self, pieces: Sequence[str], merges: Sequence[str], special: Sequence[str]) -> None:
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        self.ranks = {tuple(merge.split(" ", 1)): rank for rank, merge in enumerate(merges)}
        self.special = special
        self.names = byte_characters()

    def encode(self, text: str) -> list[int]:
        ids = []
        for n, part in enumerate(split_special(text, self.special)):
            if n % 2:
                ids.append(self.ids[part])
                continue
            for word in smollm_words(part):
                named = "".join(self.names[byte] for byte in word.encode() if self.names[byte] in self.ids)
                ids += [self.ids[piece] for piece in merge_by_rank(named, self.ranks)]
        return ids


class SlowSentencePiece:
    """SentencePiece's BPE: join the adjacent pair whose union scores best; spell the rest in bytes."""

    def __init__(
        self, pieces: Sequence[str], scores: Sequence[float], special: Sequence[str], prefix: bool
    ) -> None:
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        self.scores = dict(zip(pieces, scores, strict=True))
        self.special = special
        self.prefix = "\u2581" if prefix else ""

    def encode(self, text: str) -> list[int]:
        ids = []
        for n, part in enumerate(split_special(text, self.special)):
            if n % 2:
                ids.append(self.ids[part])
            elif part:
                ids += self._words(self.prefix + part.replace(" ", "\u2581"))
        return ids

    def _words(self, text: str) -> list[int]:
        parts = list(text)
        while True:
            unions = [(self.scores.get(a + b), -i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
            scored = [(score, at) for score, at in unions if score is not None]
            if not scored:
                break
            at = -max(scored)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids = []
        for part in parts:
            known = self.ids.get(part)
            ids += [self.ids[f"<0x{byte:02X}>"] for byte in part.encode()] if known is None else [known]
        return ids
