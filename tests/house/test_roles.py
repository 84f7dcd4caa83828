"""NixlConnector is shipped with explicit roles only; `kv_both` with it is deprecated."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kv.config import BOTH, NIXL

ROOT = Path(__file__).resolve().parents[2]
OF_THE_DEPRECATION = {
    "tests/house/test_roles.py",
    "tests/jaxserve/test_warn_once.py",
    "tests/kv/test_config.py",
}
SOURCES = {".py", ".pyi"}
TEXTS = SOURCES | {".md", ".sh", ".ipynb", ".json", ".toml", ".yaml", ".yml", ".txt", ".service"}
INNERMOST = re.compile(r"\{[^{}]*\}")


def shipped() -> Iterator[Path]:
    """Every text file of the project; what tools leave behind is not."""
    for path in sorted(ROOT.rglob("*")):
        name = path.relative_to(ROOT)
        hidden = any(part.startswith(".") and part != ".ci" for part in name.parts[:-1])
        if hidden or str(name) in OF_THE_DEPRECATION or not path.is_file():
            continue
        if path.suffix in TEXTS or name.parts[0] == ".ci" or path.name == "Makefile":
            yield path


def objects(text: str) -> Iterator[str]:
    """What stands in braces, each without the braces within it."""
    while found := INNERMOST.findall(text):
        yield from found
        text = INNERMOST.sub(" ", text)


def calls(text: str) -> Iterator[set[str]]:
    """The values that each call in Python source gives by keyword, names and strings alike."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            values = (keyword.value for keyword in node.keywords)
            yield {ast.unparse(value).strip("'\"").rpartition(".")[2] for value in values}


def faults(text: str, *, python: bool = False) -> int:
    """How often the deprecated role is given to NixlConnector."""
    in_braces = sum(NIXL in entry and BOTH in entry for entry in objects(text))
    if not python:
        return in_braces
    kind, role = {"NIXL", NIXL}, {"BOTH", BOTH}
    return in_braces + sum(bool(values & kind) and bool(values & role) for values in calls(text))


def read(path: Path) -> str:
    return path.read_text("utf-8", errors="replace")


def test_nothing_that_we_ship_gives_nixl_the_deprecated_role() -> None:
    found = {
        str(path.relative_to(ROOT)): count
        for path in shipped()
        if (count := faults(read(path), python=path.suffix in SOURCES))
    }
    assert not found


def test_documents_explain_the_deprecation_in_one_place() -> None:
    text = read(ROOT / "docs/features/nixl_connector_usage.md")
    assert "## The end of `kv_both`" in text and "deprecated" in text


@pytest.mark.parametrize(
    "text",
    [
        '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}',
        '{\\"kv_role\\":\\"kv_both\\",\\n\\"kv_connector\\":\\"NixlConnector\\"}',
        '{"kv_connector": "NixlConnector", "kv_connector_extra_config": {"digest": 1}, "kv_role": "kv_both"}',
        '{"connectors": [{"kv_connector": "NixlConnector", "kv_role": "kv_both"}, {"kv_role": "kv_both"}]}',
    ],
)
def test_the_role_is_found_in_json(text: str) -> None:
    assert faults(f"serve --kv-transfer-config '{text}'") == 1


@pytest.mark.parametrize(
    "text",
    [
        '{"kv_connector": "NixlConnector", "kv_role": "kv_producer"}',
        '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}',
        '{"kv_role": "kv_both", "x": [{"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}]}',
        "`NixlConnector` with `kv_both` is deprecated.",
    ],
)
def test_other_uses_are_not_faults(text: str) -> None:
    assert faults(text) == 0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("ConnectorConfig(kind=NIXL, role=BOTH, lease_s=0.6)", 1),
        ("config.ConnectorConfig(kind='NixlConnector', role=config.BOTH)", 1),
        ("ConnectorConfig(kind=OFFLOADING, role=BOTH)", 0),
        ("ConnectorConfig(kind=NIXL, role=PRODUCER)", 0),
        ("any(leaf.kind == NIXL and leaf.role == BOTH for leaf in leaves)", 0),
    ],
)
def test_the_role_is_found_in_calls(text: str, count: int) -> None:
    assert faults(text, python=True) == count


def test_what_is_looked_at_holds_every_kind_of_file() -> None:
    names = {str(path.relative_to(ROOT)) for path in shipped()}
    assert {
        "README.md",
        ".ci/run",
        "jaxserve/cli/disaggregated.py",
        "docs/features/nixl_connector_usage.md",
        "notebooks/05_prefill_decode_split.ipynb",
        "tests/jaxserve/test_config.py",
    } <= names
