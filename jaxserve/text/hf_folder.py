"""A vocabulary from, and to, the files of a Hugging Face model folder.

tokenizer.json is the authority on ids. The files beside it only add names: which token begins and ends a
text, which tokens are special, what the chat template is.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from jaxserve.text.vocab import Vocab

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_FILE_BYTES = 256 << 20
"""The largest tokenizer.json in use is about 35 MB; beyond this the file is not a tokenizer."""


def read_hf_folder(folder: Path) -> Vocab:
    """Read tokenizer.json and what tokenizer_config.json, special_tokens_map.json, chat_template.jinja,
    generation_config.json and config.json add to it; only the first is required.

    Raises:
        FileNotFoundError: no tokenizer.json.
        ValueError: a file is not what it should be.
    """
    try:
        return _read(folder)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"the tokenizer files in {folder} are malformed: {error!r}") from error


def _read(folder: Path) -> Vocab:
    backend = _backend(folder / "tokenizer.json")
    config = _object(folder / "special_tokens_map.json") | _object(folder / "tokenizer_config.json")
    _add_tokens(backend, config)
    special_tokens = {role: piece for role in _ROLES if (piece := _piece(config.get(role))) is not None}
    own_end = backend.token_to_id(special_tokens.get("eos_token", ""))
    generation = _object(folder / "generation_config.json") or _object(folder / "config.json")
    ends = [] if own_end is None else [own_end]
    for source in (config.get("eos_token_ids"), generation.get("eos_token_id")):
        ends.extend(_ids(source))
    return Vocab(
        backend=backend,
        bos_token_id=backend.token_to_id(special_tokens.get("bos_token", "")),
        eos_token_ids=tuple(dict.fromkeys(ends)),
        chat_template=_chat_template(folder, config),
        special_tokens=special_tokens,
    )


def write_hf_folder(vocab: Vocab, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which `read_hf_folder` and transformers read back.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **vocab.special_tokens,
        "eos_token_ids": list(vocab.eos_token_ids),
    }
    if vocab.chat_template is not None:
        config["chat_template"] = vocab.chat_template
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(vocab.backend.to_str(pretty=True), encoding="utf-8")


def _text(path: Path) -> str:
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_FILE_BYTES >> 20} MiB")
    return path.read_text(encoding="utf-8")


def _backend(path: Path) -> Tokenizer:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a SentencePiece tokenizer.model alone is not supported")
    try:
        backend = Tokenizer.from_str(_text(path))
    except ValueError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} is not a tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def _piece(value: Any) -> str | None:
    """A token is written as its text or as an object around it."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool) and i >= 0]


def _add_tokens(backend: Tokenizer, config: Mapping[str, Any]) -> None:
    """Make known the tokens that the configuration has beyond tokenizer.json, as transformers does.

    Raises:
        ValueError: such a token has an id that is already taken or leaves a gap.
    """
    declared = config.get("added_tokens_decoder") or {}
    for key, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        flags = {
            name: bool(entry.get(name, False)) for name in ("lstrip", "rstrip", "single_word", "special")
        }
        token = AddedToken(entry["content"], normalized=bool(entry.get("normalized", True)), **flags)
        if backend.token_to_id(token.content) is None:
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != int(key):
            raise ValueError(
                f"tokenizer_config.json gives {token.content!r} the id {key}, tokenizer.json another"
            )
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    named = dict.fromkeys(piece for piece in _named_special(config) if piece not in known)
    existing = [piece for piece in named if backend.token_to_id(piece) is not None]
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in existing])


def _named_special(config: Mapping[str, Any]) -> Iterator[str]:
    more = [config.get("additional_special_tokens"), config.get("extra_special_tokens")]
    lists = [value.values() if isinstance(value, Mapping) else value or [] for value in more]
    for value in [*(config.get(role) for role in _ROLES), *(item for values in lists for item in values)]:
        piece = _piece(value)
        if piece:
            yield piece


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _text(path)
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry["name"]: entry["template"] for entry in found}
        return named.get("default") or (next(iter(named.values())) if len(named) == 1 else None)
    return found
