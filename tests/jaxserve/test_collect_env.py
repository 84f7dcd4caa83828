"""The report names versions and devices, on any machine, and gives nothing away."""

import platform
from pathlib import Path

import jax
import pytest

from jaxserve.collect_env import DISTRIBUTIONS, VARIABLES, report


def fields(text: str) -> dict[str, str]:
    return {
        name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())
    }


def test_versions_and_devices() -> None:
    said = fields(report({}))
    assert said["python"].endswith(platform.python_version())
    assert said["jax"] == jax.__version__ and said["backend"].startswith(jax.default_backend())
    assert said["device 0"].startswith(jax.devices()[0].platform)
    assert said["numpy"].count(".") == 2 and said["torch"] == "-"
    assert set(DISTRIBUTIONS) <= set(said)
    assert "GiB" in said["memory"] and "usable" in said["cores"]


def test_only_named_variables_are_shown_and_no_home() -> None:
    environ = {
        "HOME": "/somewhere/zq-user",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": "/somewhere/zq-user/cache",
        "HF_TOKEN": "hf_secret",
        "JAXSERVE_API_KEY": "key_secret",
    }
    text = report(environ)
    assert fields(text)["JAX_PLATFORMS"] == "cpu"
    assert fields(text)["JAX_COMPILATION_CACHE_DIR"] == "~/cache"
    assert "secret" not in text and "zq-user" not in text
    assert not any(word in name for name in VARIABLES for word in ("TOKEN", "KEY", "SECRET"))


def test_the_processor_is_read(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: Some CPU @ 3 GHz\nflags\t\t: fpu avx2 amx_bf16 xyz\n")
    said = fields(report({}, cpuinfo=cpuinfo))
    assert said["cpu"] == "Some CPU @ 3 GHz" and said["cpu features"] == "avx2 amx_bf16"


def test_a_machine_that_says_nothing(tmp_path: Path) -> None:
    said = fields(report({}, cpuinfo=tmp_path / "absent", nvidia_smi="no-such-program"))
    assert said["cpu"] and said["cpu features"] == "unknown"
    assert said["gpu driver"] == "none (no nvidia-smi)"


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        (
            "echo 'GPU X, 1.2.3, 80 MiB'\necho 'GPU Y, 1.2.3, 80 MiB'",
            "GPU X, 1.2.3, 80 MiB; GPU Y, 1.2.3, 80 MiB",
        ),
        ("exit 9", "unknown (CalledProcessError)"),
    ],
)
def test_the_driver(tmp_path: Path, script: str, shown: str) -> None:
    program = tmp_path / "smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    assert fields(report({}, nvidia_smi=str(program)))["gpu driver"] == shown


def test_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[object]:
        raise RuntimeError("no such platform")

    monkeypatch.setattr(jax, "devices", fail)
    assert fields(report({}))["backend"] == "none: no such platform"
