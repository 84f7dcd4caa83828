"""Texts that tokenizers get wrong: scripts, spaces, emoji, control tokens, source code in six languages."""

import json
from pathlib import Path

NASTY: dict[str, str] = json.loads(
    (Path(__file__).parent / "goldens" / "nasty_texts.json").read_text(encoding="ascii")
)
