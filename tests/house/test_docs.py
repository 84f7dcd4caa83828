"""Commands, flags, files, links, series and fields in the documents are real. For make, see test_make."""

import argparse
import ast
import contextlib
import io
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import jaxserve
from jaxserve.api.chat import CHAT_FIELDS
from jaxserve.api.known import COMMON
from jaxserve.api.replies import usage
from jaxserve.cli import parser
from jaxserve.cli.flags import engine_config
from jaxserve.server import ServerOptions, create_app
from kv.config import CONSUMER, PRODUCER, nixl_leaf
from metrics.engine import EngineStats
from metrics.exposition import EngineSeries, Exposition, families
from metrics.stats import PrefillStats
from tests.jaxserve.server.fake_engine import FakeEngine

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")])
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
OUR_PATH = re.compile(
    r"(?:jaxserve|kv|scheduler|metrics|pallas_kernels|tests|docs|notebooks|benchmarks|scripts)/[\w./-]*"
)
FLAG = re.compile(r"--[a-z][a-z-]*")
OTHERS_FLAGS = {"--nbmake"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def document(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Fenced code of one language."""
    return [body for kind, body in FENCE.findall(text) if kind == language]


def spans(text: str) -> list[str]:
    """Code within a line."""
    return SPAN.findall(FENCE.sub("", text))


def commands(text: str) -> list[list[str]]:
    """The arguments of every `jaxserve ...` command in shell blocks."""
    lines = "\n".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    return [words[1:] for words in shell_words(lines) if words[:1] == ["jaxserve"]]


def shell_words(lines: list[str]) -> Iterator[list[str]]:
    """The words of each command; one with an open quotation goes on in the next line."""
    begun = ""
    for line in lines:
        begun += line
        try:
            yield shlex.split(begun, comments=True)
        except ValueError:
            begun += "\n"
        else:
            begun = ""
    if begun:
        raise ValueError(f"a quotation is not closed: {begun}")


def complaint(arguments: list[str]) -> str:
    """What the command line says against the arguments; nothing where it takes them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser().parse_args(arguments)
    except SystemExit:
        return said.getvalue().strip().splitlines()[-1]
    return ""


def subcommands(
    of: argparse.ArgumentParser, name: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """Every command with its flags."""
    yield name, {flag for action in of._actions for flag in action.option_strings}
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, sub in action.choices.items():
                yield from subcommands(sub, (*name, word))


def slug(heading: str) -> str:
    """The anchor that code hosts give a heading."""
    plain = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
    return plain.strip().replace(" ", "-")


def first_cells(text: str) -> list[tuple[str, ...]]:
    """The cells of every table row."""
    rows = [line.strip("|").split("|") for line in FENCE.sub("", text).splitlines() if line.startswith("| ")]
    return [tuple(cell.strip() for cell in row) for row in rows]


def tree_paths(text: str) -> list[str]:
    """The paths that an annotated tree names: two spaces per level, folders end with a slash."""
    found: list[str] = []
    above: list[str] = []
    for line in text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        entry = line.split()[0]
        above = [*above[:depth], entry]
        found.append("".join(above))
    return found


def test_documents_are_there() -> None:
    names = {name_of(path) for path in DOCUMENTS}
    assert {
        "README.md",
        "CHANGELOG.md",
        "docs/ARCHITECTURE.md",
        "docs/accounting.md",
        "docs/metrics.md",
    } <= names


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_parse(path: Path) -> None:
    wrong = {
        shlex.join(words): said for words in commands(path.read_text("utf-8")) if (said := complaint(words))
    }
    assert not wrong


def test_wrong_commands_do_not_parse() -> None:
    text = (
        "```sh\njaxserve serve smollm2 \\\n  --no-such-flag  # why\n\njaxserve bench serve --rounds 2\n```\n"
    )
    assert [bool(complaint(words)) for words in commands(text)] == [True, False]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_servers_would_start_with_what_is_configured(path: Path) -> None:
    for words in commands(path.read_text("utf-8")):
        args = parser().parse_args(words)
        if words[0] == "serve" and not args.disaggregated:
            config = engine_config(args, "smollm2", {})
            leaf = None if config.kv_transfer is None else nixl_leaf(config.kv_transfer)
            assert leaf is None or leaf.role in (PRODUCER, CONSUMER)


def test_side_channel_variables_are_read() -> None:
    text = document("docs/features/nixl_connector_usage.md")
    exported = dict(re.findall(r"^export (\w+)=(\S+)$", "\n".join(blocks(text, "sh")), re.MULTILINE))
    args = parser().parse_args(["serve", "smollm2"])
    assert engine_config(args, "smollm2", exported).side_channel_port == 5601
    assert engine_config(args, "smollm2", {}).side_channel_port == 5600


def test_commands_go_on_while_a_quotation_is_open() -> None:
    text = "```sh\njaxserve serve m --kv-transfer-config '{\n  \"a\": 1}'\ncurl x\njaxserve router\n```\n"
    assert commands(text) == [["serve", "m", "--kv-transfer-config", '{\n  "a": 1}'], ["router"]]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_and_flags_within_lines_exist(path: Path) -> None:
    known = dict(subcommands(parser()))
    flags = set().union(*known.values()) | OTHERS_FLAGS
    for span in spans(path.read_text("utf-8")):
        words = span.split()
        assert set(FLAG.findall(span)) <= flags, f"unknown flag in `{span}`"
        if words[0] == "jaxserve" and len(words) > 1:
            depth = 2 if tuple(words[1:3]) in known else 1
            command = tuple(words[1 : 1 + depth])
            assert command in known, f"unknown command in `{span}`"
            assert set(FLAG.findall(span)) <= known[command], f"unknown flag in `{span}`"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_files_that_are_named_exist(path: Path) -> None:
    named = {span for span in spans(path.read_text("utf-8")) if OUR_PATH.fullmatch(span)}
    assert not {name for name in named if not (ROOT / name).exists()}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_within_the_project_resolve(path: Path) -> None:
    broken = []
    for target in LINK.findall(FENCE.sub("", path.read_text("utf-8"))):
        if "://" in target or target.startswith("mailto:"):
            continue
        place, _, anchor = target.partition("#")
        file = (path.parent / place).resolve() if place else path
        headings = HEADING.findall(file.read_text("utf-8")) if file.suffix == ".md" and file.is_file() else []
        if not file.exists() or (anchor and anchor not in map(slug, headings)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_python_examples_are_python_and_import_what_is_public(path: Path) -> None:
    public = set(jaxserve.__all__)
    for block in blocks(path.read_text("utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "jaxserve":
                assert {alias.name for alias in node.names} <= public


def test_the_tree_is_the_tree() -> None:
    [tree] = [block for block in blocks(document("README.md"), "") if block.startswith("jaxserve/")]
    paths = tree_paths(tree)
    assert not [path for path in paths if not (ROOT / path).exists()]
    packages = tomllib.loads(document("pyproject.toml"))["tool"]["importlinter"]["root_packages"]
    assert {f"{package}/" for package in packages} <= set(paths)


def test_a_tree_is_read() -> None:
    assert tree_paths("a/   folder\n  b/\n    c.py  it\n  d.py\ne/f.py\n") == [
        *("a/", "a/b/", "a/b/c.py", "a/d.py", "e/f.py")
    ]


def test_the_life_of_a_request_has_at_most_nine_hops() -> None:
    life = document("README.md").partition("## The life of a request")[2].partition("\n## ")[0]
    assert 1 <= len(re.findall(r"^\d+\. ", life, re.MULTILINE)) <= 9


def test_every_series_is_explained_and_no_other() -> None:
    series = EngineSeries(stats=EngineStats.empty(8), cache_config={"block_size": 16})
    shown = {
        family.name: family.kind for family in families(Exposition(model_name="m", engines=(series,)))
    } | {"kv_pool_moves": "counter"}
    table = document("docs/metrics.md").partition("## Series")[2].partition("\n## ")[0]
    explained = {row[0].strip("`"): row[1] for row in first_cells(table) if row[0].startswith("`")}
    assert explained == shown


def test_every_request_field_flag_and_route_has_its_place() -> None:
    text = document("docs/compatibility.md")
    named = set(re.findall(r"\w+", " ".join(spans(text))))
    assert not (COMMON | CHAT_FIELDS) - named
    flags = dict(subcommands(parser()))["serve",] - {"-h", "--help"}
    assert flags == set(FLAG.findall(text)) & flags
    routes = {route.path for route in create_app(FakeEngine(), ServerOptions()).routes}
    assert {path.replace("{name:path}", "{name}") for path in routes} <= set(spans(text))


def test_the_usage_keys_are_those_of_answers() -> None:
    stats = PrefillStats(num_prompt_tokens=4, local_cache_hit=2, external_kv_transfer=1)
    details = usage(4, 1, [stats])["prompt_tokens_details"]
    table = document("docs/accounting.md").partition("## In answers")[2]
    assert isinstance(details, dict)
    assert [row[0].strip("`") for row in first_cells(table) if row[0].startswith("`")] == list(details)


def test_every_dependency_has_a_reason() -> None:
    wanted = {
        Requirement(text).name
        for text in tomllib.loads(document("pyproject.toml"))["project"]["dependencies"]
    }
    table = document("docs/ARCHITECTURE.md").partition("## Dependencies")[2].partition("\n## ")[0]
    rows = first_cells(table)
    explained = {name for row in rows[1:] for name in row[0].split(", ")}
    assert explained == wanted
    assert all(len(row) == 2 and row[1] for row in rows)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text("utf-8"))
    assert notebook["nbformat"] == 4
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)
