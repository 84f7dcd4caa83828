"""Orbax folders: a bitwise round trip, straight into shards, and nothing but local files."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve.weights.convert import convert
from jaxserve.weights.errors import WeightsError
from jaxserve.weights.load import Loaded, load_model
from jaxserve.weights.source import ModelSource, resolve
from tests.goldens import tiny

ROOT = Path(__file__).resolve().parents[3]


def bits(model: Loaded) -> list[tuple[str, bytes]]:
    leaves = jax.tree_util.tree_leaves_with_path(model.state)
    return [(jax.tree_util.keystr(path), np.asarray(leaf).tobytes()) for path, leaf in leaves]


def converted(source: Path, folder: Path, dtype: str) -> Loaded:
    named = ModelSource(kind="hf", path=source, name="tiny")
    return convert(named, folder, to="orbax", dtype=dtype, extra=lambda _: None)


def reloaded(folder: Path, dtype: str) -> Loaded:
    found = resolve(str(folder), cache_dir=folder)
    assert found.kind == "orbax"
    return load_model(found, dtype=dtype)


@pytest.mark.parametrize("name", tiny.CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bitwise(
    tmp_path: Path, tiny_folder: Callable[[str], Path], name: str, dtype: str
) -> None:
    before = converted(tiny_folder(name), tmp_path / "out", dtype)
    after = reloaded(tmp_path / "out", dtype)
    assert bits(after) == bits(before)
    assert after.config == before.config
    assert after.graphdef == before.graphdef
    assert after.weights_digest == before.weights_digest


def test_dtype_may_change_when_loading(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    converted(tiny_folder("qwen3"), tmp_path / "out", "float32")
    found = reloaded(tmp_path / "out", "bfloat16")
    source = ModelSource(kind="hf", path=tiny_folder("qwen3"), name="tiny")
    assert bits(found) == bits(load_model(source, dtype="bfloat16"))


def test_extra_files_and_a_taken_folder(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    source = ModelSource(kind="hf", path=tiny_folder("llama"), name="tiny")
    out = tmp_path / "deep" / "out"

    def extra(folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")

    convert(source, out, to="orbax", dtype="float32", extra=extra)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "tokenizer.json", "weights"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with pytest.raises(WeightsError, match="not an empty folder"):
        convert(source, out, to="orbax", dtype="float32", extra=extra)
    with pytest.raises(WeightsError, match="cannot convert to 'gguf'"):
        convert(source, tmp_path / "new", to="gguf", dtype="float32", extra=extra)


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    def extra(folder: Path) -> None:
        raise RuntimeError("no tokenizer")

    source = ModelSource(kind="hf", path=tiny_folder("llama"), name="tiny")
    with pytest.raises(RuntimeError, match="no tokenizer"):
        convert(source, tmp_path / "out", to="orbax", dtype="float32", extra=extra)
    assert not list(tmp_path.iterdir())


def edit(path: Path, change: Callable[[dict], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.fixture
def out(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Path:
    converted(tiny_folder("llama"), tmp_path / "out", "float32")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("custom", "said"),
    [
        ({"driver": "s3", "bucket": "b"}, "driver 's3'"),
        ({"kvstore": {"driver": "http", "base_url": "x"}}, "driver 'http'"),
        ({"kvstore": "gs://bucket/key"}, "address"),
        ({"deep": ['{"driver": "gcs"}']}, "driver 'gcs'"),
        ({"https://host/": 1}, "address"),
        ({"path": "file:///etc/passwd"}, "address"),
    ],
)
@pytest.mark.parametrize("file", ["_METADATA", "_CHECKPOINT_METADATA", "_sharding"])
def test_other_storage_is_refused(out: Path, file: str, custom: dict, said: str) -> None:
    edit(out / "weights" / file, lambda value: value.update(custom_metadata=custom))
    with pytest.raises(WeightsError, match=said):
        reloaded(out, "float32")


def test_links_are_refused(out: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"secret")
    os.symlink(tmp_path / "elsewhere", out / "weights" / "d" / "link")
    with pytest.raises(WeightsError, match="only plain files"):
        reloaded(out, "float32")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 128}, r"has shape .* the config needs"),
        ({"num_hidden_layers": 4}, r"layers\.3\.[\w.]+ is missing"),
        ({"num_hidden_layers": 2}, r"layers\.2\.[\w.]+ is not part"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"head_dim": 0}, "head_dim"),
    ],
)
def test_a_config_of_another_model(out: Path, change: dict, said: str) -> None:
    edit(out / "config.json", lambda value: value.update(change))
    with pytest.raises(WeightsError, match=said):
        reloaded(out, "float32")


LIES = (
    {"shape": [2**62, 64]},
    {"shape": [2**62, 2**62]},
    {"chunks": [2**40, 2**10]},
    {"chunks": [0, 0]},
    {"dtype": "|O"},
    {"compressor": {"id": "evil"}},
    {"filters": [{"id": "evil"}]},
)
LYING = """
import json, sys, tensorstore
from pathlib import Path
from jaxserve.weights.errors import WeightsError
from jaxserve.weights.load import load_model
from jaxserve.weights.source import resolve

out = Path(sys.argv[1])
base = {"driver": "file", "path": f"{out.resolve()}/weights/"}
store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
honest = store.read(b"embedding/.zarray").result().value


def refused():
    try:
        load_model(resolve(str(out), cache_dir=out), dtype="float32")
    except WeightsError as error:
        return len(str(error).splitlines()) == 1
    return False


results = [refused()]
for lie in json.loads(sys.argv[2]):
    store.write(b"embedding/.zarray", json.dumps(json.loads(honest) | lie).encode()).result()
    results.append(refused())
store.write(b"embedding/.zarray", honest).result()
results.append(refused())
files = [path for path in (out / "weights").rglob("*") if path.parent.name == "d" or "ocdbt" in path.name]
for keep in (0.9, 0.5, 0):
    for path in filter(Path.is_file, files):
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    results.append(refused())
print(results)
"""


def test_arrays_that_lie_and_files_that_are_cut(out: Path) -> None:
    """In a process of its own: where one array is bad, Orbax leaves the others' reads behind, which complain
    on stderr about the event loop that is gone."""
    done = subprocess.run(
        [sys.executable, "-c", LYING, str(out), json.dumps(LIES)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    expected = [False, *[True] * len(LIES), False, True, True, True]
    assert (done.returncode, done.stdout.strip()) == (0, str(expected)), done.stderr


@pytest.mark.parametrize("file", ["_METADATA", "_CHECKPOINT_METADATA", "_sharding"])
def test_metadata_that_is_no_json(out: Path, file: str) -> None:
    (out / "weights" / file).write_text("{")
    with pytest.raises(WeightsError, match="no valid JSON"):
        reloaded(out, "float32")


SHARDED = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import Mesh
from jaxserve.weights.load import load_model
from jaxserve.weights.source import resolve
from tests.goldens.compare import distance, goldens

mesh = Mesh(np.array(jax.devices()), ("tensor",))
for folder in sys.argv[1:]:
    source = resolve(folder, cache_dir=Path(folder))
    model = load_model(source, dtype="float32", mesh=mesh)
    wqkv = model.state["layers"][0]["attention"]["wqkv"].get_value()
    embedding = model.state["embedding"].get_value()
    found = distance(model, goldens("tiny_models")["llama"])
    shards = [shard.data.shape for shard in wqkv.addressable_shards]
    spec = tuple(embedding.sharding.spec)
    print(source.kind, model.weights_digest, wqkv.shape, shards, spec, not found.wrong)
    assert found.logits < 3e-4
"""


def test_shards_are_read_where_they_belong(out: Path, tiny_folder: Callable[[str], Path]) -> None:
    """On two CPU devices, in a process of its own, since the number of devices is fixed at the start."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    folder = tiny_folder("llama")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SHARDED, str(folder), str(out)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    digest = load_model(ModelSource(kind="hf", path=folder, name="x"), dtype="float32").weights_digest
    rest = f"{digest} (64, 2, 6, 8) [(64, 1, 6, 8), (64, 1, 6, 8)] ('tensor',) True"
    assert done.stdout.splitlines() == [f"hf {rest}", f"orbax {rest}"]
