"""The search for other interpreters, and what the matrix answers when one is missing, broken or red."""

import os
import sys
from pathlib import Path

import pytest

from scripts import matrix


def fake_python(path: Path, version: str) -> Path:
    """A program that says it is some version of Python, or fails where the version is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"#!/bin/sh\necho {version}\n" if version else "#!/bin/sh\necho no such command >&2\nexit 127\n"
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """An environment in which no real interpreter is found."""
    return {"PATH": f"{tmp_path / 'bin'}:/bin", "HOME": str(tmp_path / "home")}


def test_the_variable_comes_first(tmp_path: Path, env: dict[str, str]) -> None:
    fake_python(tmp_path / "bin" / "python3.12", "3.12")
    named = fake_python(tmp_path / "elsewhere" / "python", "3.12")
    assert matrix.find("3.12", {**env, "PYTHON312": str(named)}) == str(named)


def test_a_wrong_variable_finds_nothing(tmp_path: Path, env: dict[str, str]) -> None:
    fake_python(tmp_path / "bin" / "python3.12", "3.12")
    other = fake_python(tmp_path / "elsewhere" / "python", "3.11")
    assert matrix.find("3.12", {**env, "PYTHON312": str(other)}) is None
    assert matrix.find("3.12", {**env, "PYTHON312": str(tmp_path / "absent")}) is None


def test_path_then_pyenv(tmp_path: Path, env: dict[str, str]) -> None:
    versions = tmp_path / "home" / ".pyenv" / "versions"
    fake_python(versions / "3.13.2" / "bin" / "python", "3.13")
    newest = fake_python(versions / "3.13.10" / "bin" / "python", "3.13")
    assert matrix.find("3.13", env) == str(newest)
    on_path = fake_python(tmp_path / "bin" / "python3.13", "3.13")
    assert matrix.find("3.13", env) == str(on_path)
    assert matrix.find("3.12", env) is None


def test_a_shim_that_does_not_run_is_passed_over(tmp_path: Path, env: dict[str, str]) -> None:
    fake_python(tmp_path / "bin" / "python3.13", "")
    real = fake_python(tmp_path / "pyenv" / "versions" / "3.13.0" / "bin" / "python", "3.13")
    assert matrix.find("3.13", {**env, "PYENV_ROOT": str(tmp_path / "pyenv")}) == str(real)


def test_this_interpreter_is_found_where_it_is_named() -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    env = {**os.environ, f"PYTHON{version.replace('.', '')}": sys.executable}
    assert matrix.find(version, env) == sys.executable


@pytest.mark.parametrize(
    ("found", "statuses", "expected"),
    [
        ({"3.12": "a", "3.13": "b"}, [0, 0, 0], 0),
        ({"3.12": "a", "3.13": "b"}, [0, 0, 1], 1),
        ({"3.13": "b"}, [0], 0),
        ({}, [], 0),
    ],
)
def test_found_ones_run_and_one_failure_counts(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    found: dict[str, str],
    statuses: list[int],
    expected: int,
) -> None:
    ran: list[tuple[str, tuple[str, ...]]] = []
    waiting = list(statuses)

    def run(case: matrix.Case, python: str, tests: list[str]) -> tuple[int, str]:
        ran.append((python, tuple(tests)))
        return waiting.pop(0), case.venv

    monkeypatch.delenv("PYTHON312", raising=False)
    monkeypatch.delenv("PYTHON313", raising=False)
    monkeypatch.setattr(matrix, "find", lambda version, env: found.get(version))
    monkeypatch.setattr(matrix, "run", run)
    assert matrix.main(["--", "-m", "not slow"]) == expected
    wanted = [(found[case.version], ("-m", "not slow")) for case in matrix.CASES if case.version in found]
    assert sorted(ran) == sorted(wanted)
    printed = capsys.readouterr().out
    assert all(("not found" in printed) == (len(found) < 2) for _ in found)


def test_naming_a_python_that_is_none_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON312", "/nowhere/python")
    monkeypatch.setattr(matrix, "find", lambda version, env: None)
    assert matrix.main([]) == 1
