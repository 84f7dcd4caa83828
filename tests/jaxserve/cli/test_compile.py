"""`jaxserve compile` with a tiny model: the plan, what it costs, and that a server's programs are these."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxserve.assemble import draft
from jaxserve.cli import main
from jaxserve.compiling import abstract
from jaxserve.config import EngineConfig
from jaxserve.device import Device
from jaxserve.weights.load import load_model
from jaxserve.weights.source import resolve
from kv.types import KvSpec, PageGroup
from tests.jaxserve.weights.conftest import tiny_folder

__all__ = ["tiny_folder"]

FLAGS = ["--dtype", "float32", "--max-num-seqs", "2", "--max-num-batched-tokens", "8",
         "--max-model-len", "64", "--num-gpu-blocks-override", "40"]  # fmt: skip
SHAPES = [
    ("decode", 2, 2), ("mixed", 2, 8), ("slot", 1, 1), ("slot", 1, 64), ("rows", 64, 2), ("rows", 64, 8),
    ("logprobs", 64, 64),
]  # fmt: skip


@pytest.fixture
def model(tiny_folder: Callable[[str], Path]) -> str:
    return str(tiny_folder("llama"))


def test_the_plan_is_printed_without_compiling(model, capsys):
    assert main(["compile", model, "--list", "--dry-run", *FLAGS]) == 0
    heading, _, *lines, total = capsys.readouterr().out.splitlines()
    assert heading.split()[:4] == ["kind", "rows", "tokens", "pages"] and "compile" not in heading
    cells = [line.split() for line in lines]
    assert [(row[0], int(row[1]), int(row[2])) for row in cells] == SHAPES
    assert cells[0][3:] == ["4", "50%", "25%"], "64 tokens are 4 pages; two rows may hold one token"
    assert total.startswith("7 shapes; weights ")


def test_what_each_shape_costs_is_written(model, tmp_path, capsys, monkeypatch):
    """The cache of the tests stays what it is: JAX has one for the whole process."""
    report, folders = tmp_path / "plan.json", []
    monkeypatch.setattr("jaxserve.cli.compile.enable_compilation_cache", folders.append)
    cache = ["--cache-dir", str(tmp_path / "cache")]
    assert main(["compile", model, "--list", "--json", str(report), *cache, *FLAGS]) == 0
    said = capsys.readouterr()
    assert "compiled 7 of 7 shapes" in said.err, "no terminal: lines, no bar"
    assert "every step updates pages and slots in place" in said.out
    found = json.loads(report.read_text())
    total, shapes = found["totals"], found["shapes"]
    assert [(each["kind"], each["rows"], each["tokens"]) for each in shapes] == SHAPES
    assert total["shapes"] == len(shapes) and total["in_place"]
    # 40 pages of 16 tokens, 3 layers, K and V, 2 heads of 8 elements of 4 bytes.
    assert total["page_buffer_bytes"] == 40 * 16 * 3 * 2 * 2 * 8 * 4
    for each in shapes:
        assert each["lower_s"] > 0 and each["compile_s"] > 0 and each["argument_bytes"] > 0
        if each["kind"] in ("decode", "mixed"):
            assert each["alias_bytes"] == total["page_buffer_bytes"] + total["slot_bytes"]
            assert each["argument_bytes"] > total["weight_bytes"] + each["alias_bytes"]
            assert 0 <= each["padding_mean"] <= each["padding_worst"] < 1
    assert folders == [tmp_path / "cache" / "compiled"]
    assert main(["compile", model, "--json", str(report), *cache, *FLAGS]) == 0
    again = json.loads(report.read_text())["shapes"]
    assert all(each["cached"] for each in again if each["kind"] in ("decode", "mixed"))


def test_the_programs_are_those_of_a_server(model):
    """Lowered from the configuration alone and from a device's arrays: the same text, so one cache entry."""
    config = EngineConfig(
        model=model, dtype="float32", max_num_seqs=2, max_num_batched_tokens=8, max_model_len=64, num_pages=40
    )
    planned = draft(config, Path(model), lambda line: None)
    loaded = load_model(resolve(model, cache_dir=Path(model)), dtype="float32")
    spec = spec_of(planned.blueprint.pages.shape)
    device = Device(
        loaded,
        spec,
        num_pages=40,
        max_num_seqs=2,
        max_num_batched_tokens=8,
        max_model_len=64,
        backend="auto",
    )
    assert device.plan == planned.plan
    mine, drawn = device.blueprint, planned.blueprint
    assert abstract(device.pages) == mine.pages == drawn.pages
    assert abstract(device._slots) == mine.slots == drawn.slots
    for shape in planned.plan:
        assert mine.lower(shape).as_text() == drawn.lower(shape).as_text(), shape


def spec_of(shape: tuple[int, ...]) -> KvSpec:
    _, layers, _, heads, page_size, head_dim = shape
    group = PageGroup(name="full", layers=tuple(range(layers)), kv_heads=heads, head_dim=head_dim)
    return KvSpec(groups=(group,), page_size=page_size, dtype="float32")


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["MODEL", "--dry-run"], "--dry-run does nothing without --list or --json"),
        (["MODEL", "--json", "no/such/plan.json"], "--json: there is no folder no/such"),
        (["MODEL", "--max-model-len", "9999"], "--max-model-len 9999 exceeds the model's context"),
        (["MODEL", "--kv-cache-memory-bytes", "10"], "holds less than 2 pages"),
    ],
)
def test_mistakes_are_one_line(given, complaint, model, capsys):
    assert main(["compile", *(model if word == "MODEL" else word for word in given)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("jaxserve: error: ") and complaint in said.err and not said.out
    assert len(said.err.splitlines()) == 1
