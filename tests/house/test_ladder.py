"""Imports go one way only; the contracts are in pyproject.toml."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts in a folder, in a process that has not imported our packages from elsewhere."""
    command = [sys.executable, "-c", LINT, "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_imports_keep_the_contracts() -> None:
    linted = lint_imports(ROOT)
    assert linted.returncode == 0, linted.stdout + linted.stderr


@pytest.mark.parametrize(
    ("path", "line", "broken"),
    [
        ("metrics/bad.py", "import kv.types", "The ladder"),
        ("kv/bad.py", "import scheduler.types", "The ladder"),
        ("kv/bad.py", "from kv import pool", "The pure half of kv"),
        ("kv/bad.py", "import jax", "Deciding and counting are pure"),
        ("scheduler/bad.py", "import time", "Deciding and counting are pure"),
        ("scheduler/bad.py", "import pallas_kernels", "The scheduler takes the pure half of kv"),
        ("metrics/bad.py", "def f() -> None:\n    import logging", "Deciding and counting are pure"),
        ("jaxserve/core.py", "import time", "Cores and the simulator"),
        ("jaxserve/sim/bad.py", "from asyncio import sleep", "Cores and the simulator"),
        ("jaxserve/sim/bad.py", "import threading", "Cores and the simulator"),
        ("jaxserve/drain.py", "import time", "Cores and the simulator"),
        ("jaxserve/transfer.py", "import secrets", "Cores and the simulator"),
        ("jaxserve/server/prepare.py", "import time", "Cores and the simulator"),
        ("jaxserve/api/bad.py", "from datetime import datetime", "Cores and the simulator"),
        ("jaxserve/inbox.py", "import queue", "Cores and the simulator"),
        ("jaxserve/router/route.py", "import asyncio", "Cores and the simulator"),
        ("jaxserve/router/fleet.py", "import random", "Cores and the simulator"),
        ("jaxserve/bad.py", "import starlette", "HTTP has one door"),
        ("jaxserve/bad.py", "import nixl", "NIXL has one door"),
        ("kv/bad.py", "from nixl._api import nixl_agent", "NIXL has one door"),
    ],
)
def test_a_broken_contract_is_noticed(tmp_path: Path, path: str, line: str, broken: str) -> None:
    """All contracts hold in a small copy of the tree's shape, and each is broken by one line."""
    text = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text)
    for package in tomllib.loads(text)["tool"]["importlinter"]["root_packages"]:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    named = {"kv.types", "scheduler.types", "metrics.stats", "jaxserve.sim.clockwork", "jaxserve.api.errors"}
    named |= set(re.findall(r'"((?:kv|scheduler|metrics|jaxserve)(?:\.\w+)+)[" ]', text))
    for module in named:
        place = tmp_path / f"{module.replace('.', '/')}.py"
        place.parent.mkdir(exist_ok=True)
        (place.parent / "__init__.py").touch()
        if not any(other.startswith(f"{module}.") for other in named):
            place.touch()
    assert lint_imports(tmp_path).returncode == 0
    (tmp_path / path).write_text(line + "\n")
    linted = lint_imports(tmp_path)
    assert linted.returncode == 1
    assert any(broken in shown and "BROKEN" in shown for shown in linted.stdout.splitlines()), linted.stdout
