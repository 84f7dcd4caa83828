"""The Makefile and what the documents say about it."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):(?!=)", MAKEFILE, flags=re.MULTILINE))
FENCE = re.compile(r"^```.*?\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
MAKE_WORDS = re.compile(
    r"(?:^|[;&|(]\s*|\$ )make((?:[ ]+(?:[A-Z_0-9]+=(?:\"[^\"]*\"|'[^']*'|\S+)|[a-z][a-z-]*))+)", re.MULTILINE
)


def made_targets(document: str) -> set[str]:
    """Targets of all `make ...` commands in a document: in fenced code, and in `make x` spans."""
    code = "\n".join(FENCE.findall(document))
    spans = "\n".join(re.findall(r"`(make [^`\n]+)`", FENCE.sub("", document)))
    words = " ".join(MAKE_WORDS.findall(code + "\n" + spans))
    words = re.sub(r"[A-Z_0-9]+=(?:\"[^\"]*\"|'[^']*'|\S+)", "", words)
    return set(words.split())


def test_targets_are_read() -> None:
    assert {"setup", "serve", "test", "test-fast", "test-matrix", "check"} <= TARGETS


def test_documents_are_read() -> None:
    code = '$ make test-fast ARGS="a b"\nmake setup check  # both\n'
    text = f"Run `make serve MODEL=x`:\n```sh\n{code}```\nmake believe\n"
    assert made_targets(text) == {"serve", "test-fast", "setup", "check"}


def test_documents_name_only_targets_that_exist() -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    assert documents
    unknown = {str(path.relative_to(ROOT)): made_targets(path.read_text()) - TARGETS for path in documents}
    assert not {name: targets for name, targets in unknown.items() if targets}


def test_every_target_is_explained_and_phony() -> None:
    explained = set(re.findall(r"^([a-z-]+):.*?## ", MAKEFILE, flags=re.MULTILINE))
    phony = set(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)[0].split())
    assert explained == TARGETS == phony


def test_setup_installs_the_nixl_that_pyproject_names() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["nixl"]
    assert all(f"'{requirement}'" in MAKEFILE for requirement in extra)
