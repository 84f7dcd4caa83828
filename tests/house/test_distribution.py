"""What is installed, what is imported, and what a wheel of ours would bring."""

import importlib
import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("jaxserve", "kv", "scheduler", "metrics", "pallas_kernels")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FORBIDDEN = ("torch", "transformers", "tensorflow")


def required(requirements: list[str], extras: frozenset[str] = frozenset()) -> set[str]:
    """Names of all distributions that these requirements bring, as installed here."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(text, extras) for text in requirements]
    while waiting:
        text, wanted = waiting.pop()
        requirement = Requirement(text)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in (wanted or {""})):
            continue
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        waiting += [(text, key[1]) for text in metadata.requires(key[0]) or []]
    return {name for name, _ in seen}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_packages_imported_are_ours(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__file__ and Path(module.__file__).resolve().parent == ROOT / package


@pytest.mark.parametrize("name", FORBIDDEN)
def test_no_other_framework_can_be_imported(name: str) -> None:
    assert importlib.util.find_spec(name) is None


def test_no_other_framework_is_required() -> None:
    needed = required(PROJECT["dependencies"])
    assert {"jax", "jaxlib", "numpy", "ml-dtypes"} <= needed, "the walk over requirements is broken"
    assert not needed & set(FORBIDDEN)


def test_the_walk_finds_what_hides_behind_markers() -> None:
    assert "jaxlib" in required(["jax"])
    assert "jaxlib" not in required(["jax ; python_version < '3'"])


def test_every_direct_dependency_is_installed_in_a_version_that_we_allow() -> None:
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True), text


def test_a_wheel_holds_exactly_the_five_packages(tmp_path: Path) -> None:
    # Built from a copy: setuptools keeps files of earlier builds in ./build, and would ship them.
    source, out = tmp_path / "source", tmp_path / "wheels"
    source.mkdir()
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("tests", "docs", "scripts", "benchmarks", "notebooks"):
        (source / folder).mkdir()
        (source / folder / "__init__.py").touch()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), str(source)], check=True)
    (wheel,) = out.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    info = f"jaxserve-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {*PACKAGES, info}
    sources = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert f"{info}/licenses/LICENSE" in names
