"""`jaxserve simulate` from files to files."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from jaxserve.cli import main
from jaxserve.sim.costs import write_table
from tests.sim.tables import table


@pytest.fixture
def files(tmp_path):
    lines = [
        json.dumps({"timestamp": 500 * i, "input_length": 60, "output_length": 3, "hash_ids": [7, i]})
        for i in range(4)
    ]
    (tmp_path / "trace.jsonl").write_text("\n".join(lines))
    write_table(tmp_path / "table.json", table())
    return tmp_path


def simulate(folder, *more: str) -> int:
    given = ["--trace", str(folder / "trace.jsonl"), "--step-cost", str(folder / "table.json")]
    return main(["simulate", *given, "--trace-block-size", "32", "--disable-tqdm", *more])


def test_a_run_prints_what_came_of_it(files, capsys):
    assert simulate(files) == 0
    printed = capsys.readouterr().out
    assert "4 requests in 1.5 s, 240 prompt tokens, 12 output tokens" in printed
    assert "1P + 1D" in printed and "TTFT" in printed and "goodput" not in printed
    assert "144 (60%)" in printed and "96 (40%)" in printed, "32 of 60 tokens are common"


def test_numbers_in_a_row_are_compared_and_drawn(files, capsys):
    report, plot = files / "report.json", files / "plot.svg"
    wanted = ["--prefill", "0", "1", "--decode", "1", "2", "--ttft-slo", "4000", "--itl-slo", "2000"]
    assert simulate(files, *wanted, "--json", str(report), "--plot", str(plot)) == 0
    labels = ["1 alone", "2 alone", "1P + 1D", "1P + 2D"]
    comparison = capsys.readouterr().out.split("TTFT p50")[1]
    assert [label for label in labels if label in comparison] == labels and "goodput" in comparison
    runs = json.loads(report.read_text())
    assert [run["label"] for run in runs] == labels and runs[0]["slo"] == {"ttft": 4.0, "tpot": 2.0}
    texts = [text.text for text in ElementTree.parse(plot).iter("{http://www.w3.org/2000/svg}text")]
    assert "1P + 2D: decode" in texts


def test_traffic_can_be_cut_and_hurried(files, capsys):
    assert simulate(files, "--num-prompts", "2", "--speed", "5") == 0
    assert "2 requests in 0.1 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ([], "--trace and --step-cost"),
        (["--trace", "nowhere", "--step-cost", "table.json"], "nowhere: No such file"),
        (["--trace", "table.json", "--step-cost", "table.json"], "table.json: line 1: "),
        (
            ["--trace", "trace.jsonl", "--trace-block-size", "32", "--step-cost", "trace.jsonl"],
            "trace.jsonl is no table of step costs",
        ),
        (["--trace", "trace.jsonl", "--step-cost", "table.json"], "line 1: 60 tokens are 1 blocks of 512"),
    ],
)
def test_bad_files_are_named_in_one_line(files, capsys, monkeypatch, given, complaint):
    monkeypatch.chdir(files)
    assert main(["simulate", *given]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


def test_a_file_that_cannot_be_written_is_named(files, capsys):
    assert simulate(files, "--plot", str(files / "nowhere" / "plot.svg")) == 2
    assert "plot.svg: No such file" in capsys.readouterr().err
