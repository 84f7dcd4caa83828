"""A `tokenizers.Tokenizer` from the vocabulary in a GGUF file.

GGUF keeps pieces, token types, and merges or scores, but only the name of the pre-tokenizer; what each name
stands for is written down here, from the models' own tokenizer.json files. A name that is not listed is an
error: a wrong split gives almost the right ids, which nobody notices.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxserve.text.pieces import SPACE_MARK
from jaxserve.text.vocab import Vocab

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Split:
    """What a pre-tokenizer name stands for.

    Attributes:
        pattern: regular expression of the words; None: GPT-2's own, inside the byte-level step.
        digits: each digit is cut out before the pattern sees the text.
        whole_words: a word that is a piece is taken whole, whatever the merges say.
        nfc: text is NFC-normalised first.
        add_bos: default where the file does not say.
    """

    pattern: str | None = None
    digits: bool = False
    whole_words: bool = False
    nfc: bool = False
    add_bos: bool = False


_GPT2_SPLIT = _Split()
_DIGITS_SPLIT = _Split(digits=True)
_LLAMA3_SPLIT = _Split(pattern=_LLAMA3, whole_words=True, add_bos=True)
_SPLITS: Mapping[str, _Split] = {
    "default": _GPT2_SPLIT,
    "gpt-2": _GPT2_SPLIT,
    "phi-2": _GPT2_SPLIT,
    "smollm": _DIGITS_SPLIT,
    "starcoder": _DIGITS_SPLIT,
    "refact": _DIGITS_SPLIT,
    "llama-bpe": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "qwen2": _Split(pattern=_QWEN2, nfc=True),
    "tekken": _Split(pattern=_TEKKEN, whole_words=True, add_bos=True),
}


def read_gguf_vocab(reader: GGUFReader) -> Vocab:
    """Build the tokenizer that the file's `tokenizer.ggml.*` keys describe.

    Raises:
        ValueError: keys are missing or contradict each other, or the model or pre-tokenizer is unknown.
    """
    keys = {
        name.removeprefix("tokenizer."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith("tokenizer.")
    }
    pieces, kinds = _pieces(keys)
    model = keys.get("ggml.model")
    if model == "gpt2":
        backend, add_bos = _byte_level(keys, pieces, kinds)
    elif model == "llama":
        backend, add_bos = _sentencepiece(keys, pieces, kinds)
    else:
        raise ValueError(f"GGUF tokenizer model {model!r} is not supported: gpt2 or llama only")
    for kind in (TokenType.UNKNOWN, TokenType.CONTROL):
        backend.add_special_tokens(_added(pieces, kinds, kind, special=True))
    backend.add_tokens(_added(pieces, kinds, TokenType.USER_DEFINED, special=False))
    ids = _token_ids(keys, len(pieces))
    before = ids.get("bos") if keys.get("ggml.add_bos_token", add_bos) else None
    after = ids.get("eos") if keys.get("ggml.add_eos_token", False) else None
    _wrap(backend, pieces, before, after)
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return Vocab(
        backend=backend,
        bos_token_id=ids.get("bos"),
        eos_token_ids=tuple(dict.fromkeys(ids[end] for end in ("eos", "eot", "eom") if end in ids)),
        chat_template=keys.get("chat_template"),
        special_tokens={role: pieces[ids[name]] for role, name in roles.items() if name in ids},
    )


def _pieces(keys: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    pieces: list[str] | None = keys.get("ggml.tokens")
    if not pieces:
        raise ValueError("the GGUF file has no vocabulary (tokenizer.ggml.tokens)")
    kinds: list[int] = keys.get("ggml.token_type") or [int(TokenType.NORMAL)] * len(pieces)
    if len(kinds) != len(pieces):
        raise ValueError(f"the GGUF file has {len(pieces)} tokens but {len(kinds)} token types")
    if len(set(pieces)) != len(pieces):
        raise ValueError("the GGUF file lists the same token twice")
    return pieces, kinds


def _token_ids(keys: Mapping[str, Any], vocab_size: int) -> dict[str, int]:
    """The ids of the roles that the file names."""
    names = ("bos", "eos", "unknown", "padding", "eot", "eom")
    ids = {name: int(keys[key]) for name in names if (key := f"ggml.{name}_token_id") in keys}
    for name, token_id in ids.items():
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"tokenizer.ggml.{name}_token_id is {token_id}, the vocabulary has {vocab_size}")
    return ids


def _added(
    pieces: Sequence[str], kinds: Sequence[int], kind: TokenType, *, special: bool
) -> list[AddedToken]:
    matching = (piece for piece, its_kind in zip(pieces, kinds, strict=True) if its_kind == kind)
    return [AddedToken(piece, special=special, normalized=False) for piece in matching]


def _byte_level(keys: Mapping[str, Any], pieces: list[str], kinds: list[int]) -> tuple[Tokenizer, bool]:
    name = keys.get("ggml.pre", "default")
    split = _SPLITS.get(name)
    if split is None:
        raise ValueError(f"GGUF pre-tokenizer {name!r} is not supported; known: {', '.join(sorted(_SPLITS))}")
    merges = [tuple(merge.split(" ", 1)) for merge in keys.get("ggml.merges", [])]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    broken = next(
        (m for m in merges if len(m) != 2 or m[0] + m[1] not in vocab or not set(m) <= vocab.keys()), None
    )
    if broken is not None:
        raise ValueError(f"GGUF merge {' '.join(broken)!r} names pieces outside the vocabulary")
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=split.whole_words))
    steps: list[pre_tokenizers.PreTokenizer] = []
    if split.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend, split.add_bos


def _sentencepiece(keys: Mapping[str, Any], pieces: list[str], kinds: list[int]) -> tuple[Tokenizer, bool]:
    scores = keys.get("ggml.scores")
    if scores is None or len(scores) != len(pieces):
        raise ValueError("a GGUF llama vocabulary needs one score per token (tokenizer.ggml.scores)")
    vocab = {piece: i for i, piece in enumerate(pieces)}
    unknown = _token_ids(keys, len(pieces)).get("unknown")
    prefix = bool(keys.get("ggml.add_space_prefix", True))
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges_from_scores(pieces, kinds, scores),
            unk_token=None if unknown is None else pieces[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    to_mark = normalizers.Replace(" ", SPACE_MARK)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE_MARK), to_mark]) if prefix else to_mark
    )
    steps: list[decoders.Decoder] = [
        decoders.Replace(SPACE_MARK, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    backend.decoder = decoders.Sequence(steps)
    return backend, True


def _merges_from_scores(
    pieces: Sequence[str], kinds: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """SentencePiece merges the adjacent pair whose union scores best; as ranked pairs, best first.

    Among pairs with the same union the longer left part comes first, as in transformers' conversion.
    """
    plain = {
        piece: score
        for piece, kind, score in zip(pieces, kinds, scores, strict=True)
        if kind in (TokenType.NORMAL, TokenType.USER_DEFINED)
    }
    pairs = [
        (score, cut, len(piece) - cut, piece)
        for piece, score in plain.items()
        for cut in range(1, len(piece))
        if piece[:cut] in plain and piece[cut:] in plain
    ]
    pairs.sort(key=lambda pair: pair[:3], reverse=True)
    return [(piece[:cut], piece[cut:]) for _, cut, _, piece in pairs]


def _wrap(backend: Tokenizer, pieces: Sequence[str], before: int | None, after: int | None) -> None:
    """Have `encode` put a token before or after the text."""
    if before is None and after is None:
        return
    template = [f"{pieces[before]}:0"] if before is not None else []
    template.append("$A:0")
    if after is not None:
        template.append(f"{pieces[after]}:0")
    special = [(pieces[i], i) for i in dict.fromkeys([before, after]) if i is not None]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
