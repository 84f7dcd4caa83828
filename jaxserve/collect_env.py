"""What a bug report needs to say about a machine: versions, devices, processor, memory. No secrets."""

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import jax

DISTRIBUTIONS = (
    "jaxserve",
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "flax",
    "orbax-checkpoint",
    "numpy",
    "ml_dtypes",
    "tokenizers",
    "safetensors",
    "gguf",
    "huggingface_hub",
    "starlette",
    "uvicorn",
    "prometheus_client",
    "nixl",
    "nixl-cu13",
    "torch",
)
"""Torch is listed because it should be absent: an environment that has it was not made by `make setup`."""

VARIABLES = (
    "JAX_PLATFORMS",
    "JAX_COMPILATION_CACHE_DIR",
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)
"""Only these are shown: any other variable may hold a secret."""

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def report(
    environ: Mapping[str, str] = os.environ,
    *,
    cpuinfo: Path = Path("/proc/cpuinfo"),
    nvidia_smi: str = "nvidia-smi",
) -> str:
    """Lines of "name: value" in four sections. What cannot be found out is called unknown; nothing raises.

    Args:
        environ: of which the named VARIABLES are shown.
        cpuinfo: the kernel's description of the processor, where there is one.
        nvidia_smi: the program that knows the GPU driver, where there is one.
    """
    sections = {
        "system": _system(cpuinfo),
        "devices": _devices(nvidia_smi),
        "packages": {name: _version(name) for name in DISTRIBUTIONS},
        "environment": {name: _homeless(environ[name], environ) for name in VARIABLES if name in environ},
    }
    width = max(len(name) for section in sections.values() for name in section) + 1
    lines = [
        line
        for title, section in sections.items()
        for line in (f"[{title}]", *(f"{name + ':':{width}} {value}" for name, value in section.items()), "")
    ]
    return "\n".join(lines).rstrip() + "\n"


def _system(cpuinfo: Path) -> dict[str, str]:
    try:
        text = cpuinfo.read_text()
    except OSError:
        text = ""
    parts = (line.partition(":") for line in text.splitlines())
    fields = {name.strip(): value.strip() for name, _, value in parts}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    features = [feature for feature in CPU_FEATURES if feature in flags]
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "os": platform.platform(),
        "cpu": fields.get("model name") or platform.processor() or platform.machine() or "unknown",
        "cpu features": " ".join(features) or "unknown",
        "cores": _cores(),
        "memory": _memory(),
    }


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} usable of {os.cpu_count()}"


def _memory() -> str:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return "unknown"
    return f"{total * page / 2**30:.1f} GiB, {free * page / 2**30:.1f} GiB free"


def _devices(nvidia_smi: str) -> dict[str, str]:
    try:
        found = jax.devices()
    except RuntimeError as error:
        return {"backend": f"none: {error}", "gpu driver": _gpu_driver(nvidia_smi)}
    devices = {"backend": f"{jax.default_backend()}, devices: {len(found)}"}
    devices |= {f"device {device.id}": f"{device.platform} {device.device_kind}" for device in found}
    return devices | {"gpu driver": _gpu_driver(nvidia_smi)}


def _gpu_driver(nvidia_smi: str) -> str:
    """Name, driver and memory of each GPU in the words of nvidia-smi."""
    program = shutil.which(nvidia_smi)
    if program is None:
        return "none (no nvidia-smi)"
    query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
    return "; ".join(said.split("\n")).strip("; ")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "-"


def _homeless(value: str, environ: Mapping[str, str]) -> str:
    """The value without the user's name in paths."""
    home = environ.get("HOME", "")
    return value.replace(home, "~") if len(home) > 1 else value
