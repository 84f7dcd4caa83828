"""Hugging Face folders: whole and in parts, and every way in which one can be bad."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxserve.weights.errors import WeightsError
from jaxserve.weights.hf_folder import hf_checkpoint, read_config
from jaxserve.weights.load import Loaded, load_model
from jaxserve.weights.parts import transpose_into
from jaxserve.weights.source import ModelSource
from tests.goldens import tiny

SETTINGS = settings(deadline=None, max_examples=200)
EMBEDDING = "model.embed_tokens.weight"


def load(folder: Path, dtype: str = "float32") -> Loaded:
    return load_model(ModelSource(kind="hf", path=folder, name="tiny"), dtype=dtype)


def write(folder: Path, tensors: dict[str, np.ndarray], name: str = "qwen2", file: str = "model") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tiny.CONFIGS[name]))
    save_file(tensors, folder / f"{file}.safetensors")
    return folder


def write_parts(folder: Path, *, index: bool) -> dict[str, str]:
    """The tiny qwen2 in two files; gives the index's weight map."""
    tensors = tiny.tensors("qwen2")
    names = sorted(tensors)
    places = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(names)}
    for file in sorted(set(places.values())):
        part = {name: tensors[name] for name in names if places[name] == file}
        write(folder, part, file=file.removesuffix(".safetensors"))
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return places


@pytest.mark.parametrize("index", [True, False])
def test_parts_give_the_same_model(tmp_path: Path, tiny_folder: Callable[[str], Path], index: bool) -> None:
    write_parts(tmp_path, index=index)
    save_file({"other": np.zeros(3, np.float32)}, tmp_path / "consolidated.safetensors")
    assert load(tmp_path).weights_digest == load(tiny_folder("qwen2")).weights_digest


@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", "float32"), ("float16", "bfloat16")])
def test_dtypes_are_cast(tmp_path: Path, stored: str, dtype: str) -> None:
    tensors = tiny.tensors("qwen2")
    kind = ml_dtypes.bfloat16 if stored == "bfloat16" else np.float16
    narrow = {name: values.astype(kind) for name, values in tensors.items()}
    wide = {name: values.astype(np.float32) for name, values in narrow.items()}
    one = load(write(tmp_path / "narrow", narrow), dtype)
    two = load(write(tmp_path / "wide", wide), dtype)
    assert one.weights_digest == two.weights_digest
    assert str(one.state["embedding"].get_value().dtype) == dtype


def test_old_extras_are_ignored(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    extras = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
        "lm_head.weight": np.zeros((320, 64), np.float32),
    }
    folder = write(tmp_path, tiny.tensors("qwen2") | extras)
    assert load(folder).weights_digest == load(tiny_folder("qwen2")).weights_digest


def without(name: str) -> dict[str, np.ndarray]:
    return {key: values for key, values in tiny.tensors("qwen2").items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (without(EMBEDDING), f"{EMBEDDING} is missing"),
        (without("model.layers.2.self_attn.v_proj.bias"), r"layers\.2\.self_attn\.v_proj\.bias is missing"),
        (without(EMBEDDING) | {EMBEDDING: np.zeros((320, 65), np.float32)}, r"shape \(320, 65\)"),
        (without("model.norm.weight") | {"model.norm.weight": np.zeros((64, 1), np.float32)}, "shape"),
        (tiny.tensors("qwen2") | {"model.extra": np.zeros(1, np.float32)}, r"model\.extra is not part"),
        (without(EMBEDDING) | {EMBEDDING: np.zeros((320, 64), np.int32)}, "dtype I32"),
        (without(EMBEDDING) | {EMBEDDING: np.zeros((320, 64), np.float64)}, "dtype F64"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, tensors: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(WeightsError, match=said) as refused:
        load(write(tmp_path, tensors))
    assert "\n" not in str(refused.value)


def safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0" * 7,
        safetensors({}, length=2**63),
        safetensors({}, length=2**64 - 1),
        safetensors({}, length=99),
        safetensors(b"not json"),
        safetensors(b"[" * 100_000),
        safetensors({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
        safetensors({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)),
        safetensors({"a": entry(0, 2**62, [2**60])}, bytes(8)),
        safetensors({"a": entry(0, 8, [2**32, 2**32])}, bytes(8)),
        safetensors({"a": entry(8, 0, [2])}, bytes(8)),
        safetensors({"a": entry(0, 8, [2])}, bytes(4)),
        safetensors({"a": entry(0, 8, [2])}, bytes(80)),
        safetensors({"a": {"dtype": "X7", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        safetensors({"a": entry(0, 8, [-2])}, bytes(8)),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, raw: bytes) -> None:
    folder = write(tmp_path, tiny.tensors("qwen2"))
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(WeightsError, match=r"model\.safetensors") as refused:
        load(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("[]", "JSON object"),
        ("{", "no valid JSON"),
        ('{"weight_map": 3}', "weight_map"),
        ('{"weight_map": {"a": 3}}', "weight_map"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "plain"),
        ('{"weight_map": {"a": "sub/one.safetensors"}}', "plain"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "plain"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "absent"),
        ('{"weight_map": ' + "[" * 100_000, "no valid JSON"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, index: str, said: str) -> None:
    write_parts(tmp_path, index=True)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match=said):
        load(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path, tiny.tensors("qwen2"), file="model-1")
    write(tmp_path, {EMBEDDING: tiny.tensors("qwen2")[EMBEDDING]}, file="model-2")
    with pytest.raises(WeightsError, match="in another file too"):
        load(tmp_path)


def test_pipes_and_folders_in_place_of_files(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    (tmp_path / "config.json").write_text((tiny_folder("qwen2") / "config.json").read_text())
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="not a regular file"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(WeightsError, match="not a regular file"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(WeightsError, match="not a regular file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("", "no valid JSON"),
        ("[1]", "JSON object"),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "no valid JSON"),
        ('{"a": NaN', "no valid JSON"),
        (json.dumps(tiny.CONFIGS["llama"] | {"vocab_size": 10**12}), "vocab_size"),
        (json.dumps(tiny.CONFIGS["llama"] | {"rope_theta": float("nan")}), "rope_theta"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "no valid JSON|architectures"),
    ],
)
def test_bad_configs_are_refused_in_one_line(tmp_path: Path, config: str, said: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(WeightsError, match=said) as refused:
        read_config(tmp_path)
    assert "\n" not in str(refused.value) and "config.json" in str(refused.value)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = write(tmp_path_factory.mktemp("sound"), tiny.tensors("qwen2"))
    return (folder / "model.safetensors").read_bytes()


@SETTINGS
@given(data=st.data())
def test_mutated_files_open_or_raise_weights_error(
    sound: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = bytearray(sound)
    header = 8 + struct.unpack("<Q", sound[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header))
        change = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"9" * 8, b'"', b"-"]))
        raw[at : at + len(change)] = change
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    folder = tmp_path_factory.mktemp("mutated")
    (folder / "model.safetensors").write_bytes(raw)
    try:
        checkpoint = hf_checkpoint(folder)
        for name in checkpoint.shapes:
            assert checkpoint.read(name).shape == checkpoint.shapes[name]
    except WeightsError as error:
        assert "\n" not in str(error)


@SETTINGS
@given(rows=st.integers(1, 200), columns=st.integers(1, 200), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_transposing_by_tiles(rows: int, columns: int, dtype: str) -> None:
    values = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    whole = np.full((columns, 2, rows), -1, ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    transpose_into(whole[:, 1], values)
    np.testing.assert_array_equal(whole[:, 1], values.T.astype(whole.dtype))
    assert (whole[:, 0] == -1).all()
