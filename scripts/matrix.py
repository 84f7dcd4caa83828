"""Run the suite on the other interpreters: each found one gets its own environment and the newest JAX.

Needs the standard library only. `python scripts/matrix.py -- PYTEST ARGUMENTS` exits 0 only if every
interpreter that was found also ran and passed. Not finding one is said, and is no failure. Two run side by
side, since most of a suite keeps one core busy; every line says which of them has written it.
"""

import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One environment of the matrix.

    Attributes:
        version: of Python, "3.12".
        venv: folder of its environment, below the root.
        pins: requirements beside the package's own.
    """

    version: str
    venv: str
    pins: tuple[str, ...] = ()


CASES = (
    Case(version="3.12", venv=".venv312"),
    Case(version="3.13", venv=".venv313"),
    Case(version="3.12", venv=".venv312-jax0112", pins=("jax==0.11.2", "jaxlib==0.11.2")),
)


AT_ONCE = 2
INSTALLING = threading.Lock()
"""Held while an environment is made: installing writes beside the sources, which all of them share."""


def candidates(version: str, env: Mapping[str, str]) -> list[str]:
    """Where `version` of Python may be, best first: $PYTHON312, PATH, pyenv's versions."""
    named = env.get("PYTHON" + version.replace(".", ""))
    if named:
        return [named]  # Whoever names one wants that one: a wrong name fails instead of being replaced.
    found = [shutil.which(f"python{version}", path=env.get("PATH"))]
    for root in pyenv_roots(env):
        newest_first = sorted(root.glob(f"versions/{version}.*"), key=lambda path: _numbers(path.name))[::-1]
        found += [str(path / "bin" / "python") for path in newest_first]
    return [path for path in found if path]


def pyenv_roots(env: Mapping[str, str]) -> list[Path]:
    """Folders in which pyenv may keep interpreters."""
    roots = [env.get("PYENV_ROOT"), str(Path(env.get("HOME", "/")) / ".pyenv")]
    pyenv = shutil.which("pyenv", path=env.get("PATH"))
    if pyenv:
        asked = subprocess.run([pyenv, "root"], capture_output=True, text=True, env=dict(env), check=False)
        roots.insert(0, asked.stdout.strip())
    return [Path(root) for root in dict.fromkeys(roots) if root]


def find(version: str, env: Mapping[str, str]) -> str | None:
    """The first candidate that runs and is that version; a pyenv shim may exist and yet not run."""
    for path in candidates(version, env):
        try:
            said = subprocess.run(
                [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
                capture_output=True,
                text=True,
                env=dict(env),
                check=False,
            )
        except OSError:
            continue
        if said.stdout.strip() == version:
            return path
    return None


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in name.split("."))


def execute(case: Case, command: Sequence[str]) -> int:
    """Runs a command at the root, each line of its output behind the case's name; returns its exit status."""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            print(f"[{case.venv}] {line}", end="", flush=True)
    return running.returncode


def prepare(case: Case, python: str) -> int:
    """Make or renew the case's environment; 0 if it is ready. Renewed only when pyproject.toml changed."""
    venv, pyproject = ROOT / case.venv, ROOT / "pyproject.toml"
    done = venv / ".setup-done"
    if done.exists() and done.stat().st_mtime >= pyproject.stat().st_mtime:
        return 0
    if not (venv / "bin" / "python").exists():
        made = execute(case, [python, "-m", "venv", str(venv)])
        if made:
            return made
    # eager: an environment that is made anew over an old one must get the newest JAX.
    install = [
        str(venv / "bin" / "python"),
        "-m",
        "pip",
        "install",
        *shlex.split(os.environ.get("PIP_ARGS", "")),
    ]
    install += ["--upgrade", "--upgrade-strategy", "eager", "--editable", ".[test]", *case.pins]
    installed = execute(case, install)
    if not installed:
        done.touch()
    return installed


def versions(case: Case) -> str:
    """What the environment holds, for people."""
    code = "import platform, jax; print('Python', platform.python_version(), 'JAX', jax.__version__)"
    python = str(ROOT / case.venv / "bin" / "python")
    said = subprocess.run([python, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    return said.stdout.strip() or said.stderr.strip().splitlines()[-1]


def run(case: Case, python: str, tests: Sequence[str]) -> tuple[int, str]:
    """Prepare one environment and run the tests in it: (exit status, a line about it)."""
    began = time.monotonic()
    print(f"=== matrix: Python {case.version} {' '.join(case.pins)} ({python})", flush=True)
    with INSTALLING:
        status = prepare(case, python)
    ready = time.monotonic()
    if status:
        return status, f"{case.venv}: environment could not be made"
    about = versions(case)
    print(f"=== matrix: {about}; environment {ready - began:.0f} s", flush=True)
    status = execute(case, [str(ROOT / case.venv / "bin" / "python"), "-m", "pytest", *tests])
    verdict = "passed" if status == 0 else f"FAILED (exit {status})"
    return (
        status,
        f"{about}: {verdict}, environment {ready - began:.0f} s, tests {time.monotonic() - ready:.0f} s",
    )


def main(arguments: Sequence[str]) -> int:
    """Run all cases; see the top of the file."""
    tests = list(arguments[1:] if arguments[:1] == ["--"] else arguments)
    pythons = {
        version: find(version, os.environ) for version in dict.fromkeys(case.version for case in CASES)
    }
    named = [
        v for v, path in pythons.items() if path is None and os.environ.get("PYTHON" + v.replace(".", ""))
    ]
    found = [(case, path) for case in CASES if (path := pythons[case.version])]
    with ThreadPoolExecutor(AT_ONCE) as at_once:
        results = list(at_once.map(lambda each: run(each[0], each[1], tests), found))
    print("\n=== matrix: summary")
    for _, line in results:
        print(f"  {line}")
    for version, path in pythons.items():
        if path is None:
            print(f"  Python {version}: not found ($PYTHON{version.replace('.', '')}, PATH, pyenv)")
    for version in named:
        print(f"  error: $PYTHON{version.replace('.', '')} is not a Python {version}")
    return 1 if named or any(status for status, _ in results) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
