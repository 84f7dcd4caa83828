"""GGUF files: sound ones give the golden logits, damaged ones one typed error."""

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.weights.errors import WeightsError
from jaxserve.weights.gguf_checkpoint import gguf_checkpoint, half_split
from jaxserve.weights.gguf_file import open_gguf
from jaxserve.weights.load import load_model
from jaxserve.weights.source import ModelSource
from tests.goldens import tiny
from tests.goldens.compare import distance, goldens
from tests.jaxserve.weights.tiny_gguf import interleaved, write_gguf

SETTINGS = settings(deadline=None, max_examples=300)


def dequantisable() -> list[GGMLQuantizationType]:
    """Every type for which the `gguf` package has code, found by asking it."""
    found = []
    for kind in GGMLQuantizationType:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            continue
        found.append(kind)
    return found


def source(path: Path) -> ModelSource:
    return ModelSource(kind="gguf", path=path, name=path.name)


@pytest.mark.parametrize("name", ["llama", "llama-linear", "qwen2", "qwen3"])
def test_a_gguf_holds_the_same_model_as_its_folder(
    tmp_path: Path, tiny_folder: Callable[[str], Path], name: str
) -> None:
    file = load_model(source(write_gguf(name, tmp_path / "tiny.gguf")), dtype="float32")
    found = distance(file, goldens("tiny_models")[name])
    assert found.logits < 3e-4 and not found.wrong
    folder = load_model(ModelSource(kind="hf", path=tiny_folder(name), name=name), dtype="float32")
    # Llama 3's scaling is written as numbers in one and as a tensor in the other.
    assert (file.weights_digest == folder.weights_digest) == (name != "llama")


def test_mistral_comes_as_llama_without_its_window(tmp_path: Path) -> None:
    file = load_model(source(write_gguf("mistral", tmp_path / "tiny.gguf")), dtype="float32")
    assert file.config.architecture == "LlamaForCausalLM"
    assert file.config.sliding_window is None
    tiny.write_folder("mistral", tmp_path / "hf")
    values = tiny.CONFIGS["mistral"] | {"sliding_window": None}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(values))
    folder = load_model(ModelSource(kind="hf", path=tmp_path / "hf", name="hf"), dtype="float32")
    assert file.weights_digest == folder.weights_digest


@pytest.mark.parametrize("heads", [1, 3])
def test_half_split_undoes_the_interleaving(heads: int) -> None:
    rows = np.arange(heads * 8 * 5, dtype=np.float32).reshape(heads * 8, 5)
    assert not np.array_equal(interleaved(rows, heads), rows)
    np.testing.assert_array_equal(half_split(interleaved(rows, heads), heads), rows)
    np.testing.assert_array_equal(half_split(interleaved(rows[:, 0], heads), heads), rows[:, 0])


def test_every_dequantisable_type_is_known() -> None:
    names = {kind.name for kind in dequantisable()}
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS"} <= names


def tiny_file(tensors: dict[str, tuple[tuple[int, ...], int, bytes]]) -> bytes:
    """A GGUF file with these tensors (shape, type, bytes) and no metadata, put together by hand."""
    table, data = b"", b""
    for name, (shape, kind, raw) in tensors.items():
        table += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
        table += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", kind, len(data))
        data += raw + b"\0" * (-len(raw) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0) + table
    return head + b"\0" * (-len(head) % 32) + data


@pytest.mark.parametrize("kind", dequantisable(), ids=lambda kind: kind.name)
def test_every_dequantisable_type_is_read(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    group, group_bytes = GGML_QUANT_SIZES[kind]
    shape = (3, 2 * group * (64 // group or 1))
    count = math.prod(shape)
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    try:
        raw = quantize(values, kind).tobytes()
    except NotImplementedError:
        # Any bytes are a sound group of these types, as long as their float16 scales are finite.
        raw = np.random.default_rng(1).integers(0, 0x3C, count // group * group_bytes, np.uint8).tobytes()
    path = tmp_path / "one.gguf"
    path.write_bytes(tiny_file({"t": (shape, int(kind), raw)}))
    found = open_gguf(path).read("t")
    assert (found.shape, found.dtype) == (shape, np.float32)
    reference = GGUFReader(path).tensors[0]
    expected = dequantize(np.asarray(reference.data), reference.tensor_type).reshape(shape)
    np.testing.assert_array_equal(found, expected)


def test_types_without_code_are_named(tmp_path: Path) -> None:
    path = tmp_path / "ints.gguf"
    path.write_bytes(tiny_file({"t": ((2, 8), int(GGMLQuantizationType.I32), bytes(64))}))
    with pytest.raises(WeightsError, match="I32 is not supported"):
        open_gguf(path).read("t")


def test_metadata_of_every_kind(default_source: ModelSource) -> None:
    ours = open_gguf(default_source.path)
    reader = GGUFReader(default_source.path)
    theirs = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(ours.metadata) == list(theirs)
    for key, field in theirs.items():
        found = ours.metadata[key]
        assert (list(found) if isinstance(found, tuple | np.ndarray) else found) == field.contents(), key
    assert ours.metadata["llama.block_count"] == 30
    assert list(ours.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        place = ours.tensors[tensor.name]
        assert (place.offset, place.size_bytes) == (tensor.data_offset, tensor.n_bytes)


def test_default_models_config(default_source: ModelSource) -> None:
    config = gguf_checkpoint(open_gguf(default_source.path)).config
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert config.tie_word_embeddings and config.rope_theta == 1e5 and config.rms_norm_eps == 1e-5
    assert config.eos_token_ids == (2,)


def head(*, version: int = 3, tensors: int = 0, entries: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "empty"),
        (b"GGU", "not a GGUF"),
        (b"PK\3\4" + bytes(60), "not a GGUF"),
        (head(version=1), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version"),
        (head()[:12], "past the end"),
        (head(tensors=2**63), "tensor count"),
        (head(entries=2**64 - 1), "metadata count"),
        (head(entries=1) + text(b"k", 2**63), "metadata key"),
        (head(entries=1) + text(b"k") + struct.pack("<IQ", 8, 2**63), "past the end"),
        (head(entries=1) + text(b"k") + struct.pack("<IQ", 8, 2**63 - 1), "past the end"),
        (head(entries=1) + text(b"k") + struct.pack("<I", 99), "unknown type 99"),
        (head(entries=1) + text(b"k") + struct.pack("<IIQ", 9, 4, 2**62), "length of k"),
        (head(entries=1) + text(b"k") + struct.pack("<IIQ", 9, 12, 4) + bytes(8), "past the end"),
        (head(entries=1) + text(b"k") + struct.pack("<IIQ", 9, 8, 3) + bytes(8), "past the end"),
        (head(entries=1) + text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64), "unknown type 9"),
        (head(entries=1) + text(b"\xff") + struct.pack("<IB", 0, 1), "UTF-8"),
        (head(entries=2) + (text(b"k") + struct.pack("<IB", 0, 1)) * 2, "twice"),
        (head(entries=1) + text(b"general.alignment") + struct.pack("<II", 4, 2**31), "alignment"),
        (head(entries=1) + text(b"general.alignment") + struct.pack("<II", 4, 0), "alignment"),
        (head(entries=1) + text(b"general.alignment") + struct.pack("<II", 4, 24), "alignment"),
        (head(entries=1) + text(b"general.alignment") + struct.pack("<If", 6, 32.0), "alignment"),
        (head(tensors=1) + text(b"t") + struct.pack("<I", 2**32 - 1), "4294967295 dimensions"),
        (head(tensors=1) + text(b"t") + struct.pack("<I", 0) + bytes(99), "0 dimensions"),
        (head(tensors=1) + text(b"t") + struct.pack("<IQQIQ", 2, 2**63, 2**63, 0, 0), "past the end"),
        (head(tensors=1) + text(b"t") + struct.pack("<IQIQ", 1, 2**40, 0, 0), "past the end"),
        (head(tensors=1) + text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 2**63), "past the end"),
        (head(tensors=1) + text(b"t") + struct.pack("<IQIQ", 1, 0, 0, 0), "shape"),
        (head(tensors=1) + text(b"t") + struct.pack("<IQIQ", 1, 33, 2, 0), "shape"),
        (head(tensors=1) + text(b"t") + struct.pack("<IQIQ", 1, 32, 4, 0), "unknown type 4"),
        (head(tensors=2) + (text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 0)) * 2 + bytes(64), "twice"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, raw: bytes, said: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(WeightsError, match=said) as refused:
        open_gguf(path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


def test_pipes_and_folders_are_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, tmp_path / "missing.gguf"):
        with pytest.raises(WeightsError, match=r"regular file|No such file"):
            open_gguf(path)


def rewritten(path: Path, old: bytes, new: bytes) -> Path:
    raw = path.read_bytes()
    assert raw.count(old) == 1
    path.write_bytes(raw.replace(old, new))
    return path


def test_what_the_config_needs_and_the_file_lacks(tmp_path: Path) -> None:
    path = write_gguf("llama", tmp_path / "tiny.gguf")
    rewritten(path, b"blk.1.attn_k.weight", b"blk.1.attn_x.weight")
    with pytest.raises(WeightsError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight is missing"):
        load_model(source(path), dtype="float32")


def test_zero_heads_and_nan_are_named(tmp_path: Path) -> None:
    key = b"llama.attention.head_count" + struct.pack("<I", 4)
    path = rewritten(write_gguf("llama", tmp_path / "a.gguf"), key + b"\x08\0\0\0", key + bytes(4))
    with pytest.raises(WeightsError, match=r"head_count must be between"):
        load_model(source(path), dtype="float32")
    key = b"llama.rope.freq_base" + struct.pack("<I", 6)
    old, new = struct.pack("<f", 10000.0), struct.pack("<f", math.nan)
    path = rewritten(write_gguf("llama", tmp_path / "b.gguf"), key + old, key + new)
    with pytest.raises(WeightsError, match=r"freq_base must be a finite number"):
        load_model(source(path), dtype="float32")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf("llama", tmp_path_factory.mktemp("sound") / "tiny.gguf").read_bytes()


@SETTINGS
@given(data=st.data())
def test_mutated_files_load_or_raise_weights_error(
    sound: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = bytearray(sound)
    table = raw.index(b"blk.0.attn_norm.weight") + 4000
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, table))
        change = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, bytes(8)]))
        raw[at : at + len(change)] = change
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    path = tmp_path_factory.mktemp("mutated") / "tiny.gguf"
    path.write_bytes(raw)
    try:
        checkpoint = gguf_checkpoint(open_gguf(path))
        assert set(checkpoint.shapes)
        for name in list(checkpoint.shapes)[:3]:
            assert checkpoint.read(name).shape == checkpoint.shapes[name]
    except WeightsError as error:
        assert "\n" not in str(error)


def test_the_seed_of_the_mutations_is_sound(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(sound)
    assert gguf_checkpoint(open_gguf(path)).config.vocab_size == tiny.CONFIGS["llama"]["vocab_size"]
