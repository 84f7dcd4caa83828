"""Rules about the text of the project that no linter knows."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("jaxserve", "kv", "scheduler", "metrics", "pallas_kernels")
SHIPPED = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
BANNED_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "torch", "transformers"}
# A pickle that never leaves the process that made it can be trusted.
ALLOWED_IMPORTS = {"jaxserve/sim/snapshot.py": {"pickle"}}
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
# Catching a library's NotImplementedError is fine; raising one is a promise that nobody keeps.
UNFINISHED = re.compile(r"raise NotImplemented(?:Error)?|\bTODO\b|\bFIXME\b|\bXXX\b")
# A home directory, or a folder that only exists where somebody wrote this.
MACHINE_PATH = re.compile(r"(?<![\w./$}~])/(?:root|home|work|Users|mnt)/[\w.-]+")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".ipynb", ".sh", ".cfg", ""}


def tracked_texts() -> list[Path]:
    """Text files under version control; without git, those of the five packages."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        return SHIPPED
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.suffix in TEXT_SUFFIXES and path.is_file()]


def imported_modules(tree: ast.AST) -> set[str]:
    """Top-level names of all modules that a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_packages_are_found() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SHIPPED} == set(PACKAGES)


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_nothing_is_left_unfinished(path: Path) -> None:
    assert not UNFINISHED.findall(path.read_text())


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_no_foreign_code_is_run_and_no_torch_imported(path: Path) -> None:
    tree = ast.parse(path.read_text())
    calls = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not imported_modules(tree) & BANNED_IMPORTS - ALLOWED_IMPORTS.get(name_of(path), set())
    assert not calls & BANNED_CALLS


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_imports_stand_at_the_top(path: Path) -> None:
    """Not in functions, and not for types only; `try: import x` is how an absent module is noticed."""
    nests = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.If | ast.With
    local = [
        inner.lineno
        for nest in ast.walk(ast.parse(path.read_text()))
        if isinstance(nest, nests)
        for inner in ast.walk(nest)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    ]
    assert not local, f"imports inside functions or conditions at lines {local}"


def test_no_paths_of_one_machine() -> None:
    this = Path(__file__).resolve()
    found = {
        name_of(path): MACHINE_PATH.findall(path.read_text(errors="replace"))
        for path in tracked_texts()
        if path.resolve() != this
    }
    assert not {name: hits for name, hits in found.items() if hits}


def test_the_path_rule_sees_what_it_should() -> None:
    assert MACHINE_PATH.search("open('/home/ann/model.gguf')")
    assert not MACHINE_PATH.search("GET /v1/models, ~/work/model, https://example.org/home/page")


def test_typed_markers() -> None:
    assert all((ROOT / package / "py.typed").is_file() for package in PACKAGES)
