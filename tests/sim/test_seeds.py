"""Random worlds under faults: the laws hold, a seed always gives the same run, and a broken law is told."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.cli import main
from jaxserve.sim.cover import IMPOSSIBLE, STATES, table, thin
from jaxserve.sim.draw import draw
from jaxserve.sim.faults import NAMES
from jaxserve.sim.hash_model import HashModel
from jaxserve.sim.law_names import LAWS, law_name
from jaxserve.sim.seeds import Failure, run_seed, run_seeds, summary_text
from jaxserve.sim.world import Ran, World

SEEDS, EVENTS = 200, 500
PAGE = Path(__file__).parents[2] / "docs" / "testing.md"

RUNS = """
import json, sys
from jaxserve.sim.seeds import run_seed
print(json.dumps([run_seed(seed, 400).trace for seed in range(12)]))
"""


@pytest.mark.worlds
@pytest.mark.timeout(900)
def test_two_hundred_worlds_break_no_law(capsys):
    """Their number and speed are printed; what a bad seed needs to be run again is in the report."""
    summary = run_seeds(range(SEEDS), events=EVENTS)
    report = summary_text(summary, least=0)
    with capsys.disabled():
        print(f"\n{report.splitlines()[0]}")
    assert not summary.failures, report
    assert summary.seeds == SEEDS and summary.events >= SEEDS * EVENTS
    counts, tokens = summary.counts, summary.tokens
    assert counts["right"] > counts["asked"] // 2, "most requests are answered rightly in spite of all"
    assert min(tokens["local_compute"], tokens["local_cache_hit"], tokens["external_kv_transfer"]) > 1000
    assert counts["split"] > 1000
    assert min(counts["not served"], counts["broken off"], counts["parameters refused"]) > 10
    for fault in NAMES:
        assert sum(summary.met[fault, state] for state in STATES), f"{fault} has met no request"


def test_a_seed_gives_the_same_trace_in_another_process_whatever_its_hashes():
    here = [run_seed(seed, 400).trace for seed in range(12)]
    for hash_seed in ("1", "77"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", RUNS],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
        )
        assert json.loads(done.stdout) == here
    assert len(set(here)) == len(here)


def test_engines_of_several_ranks_and_page_groups_are_among_the_worlds():
    worlds = [World(seed, draw).setup for seed in range(60)]
    assert {setup.model.ranks for setup in worlds} == {1, 2, 4}
    assert len({setup.model.windows for setup in worlds}) == 3
    sizes = [{node.scheduler.page_size for node in setup.nodes} for setup in worlds]
    assert any(len(several) == 2 for several in sizes), "pages of the two sides may differ"
    kinds = {
        leaf.kind
        for setup in worlds
        for node in setup.nodes
        if node.scheduler.transfer is not None
        for leaf in node.scheduler.transfer.leaves
    }
    assert kinds == {"NixlConnector", "OffloadingConnector", "SimpleCPUOffloadConnector"}


def test_one_wrong_byte_of_one_page_changes_what_follows():
    """The model sees all that it attends to, and nothing that its window hides."""
    for window in (None, 4):
        model = HashModel(windows=(window,), ranks=1)
        tokens = tuple(range(1, 10))
        cells = model.cells(tokens)[0]
        chosen = {model.choose([cells], seed) for seed in range(30)}
        assert len(chosen) > 10, "the seed counts"
        for place in range(len(cells)):
            wrong = bytearray(cells)
            wrong[place] ^= 1
            seeds = range(12)
            right = [model.choose([cells], seed) for seed in seeds]
            assert [model.choose([bytes(wrong)], seed) for seed in seeds] != right
    far = HashModel(windows=(4,), ranks=1)
    before = far.extend(0, 0, 4, 8, bytes(range(64)), [5])
    hidden = bytes(40) + bytes(range(40, 64))
    assert far.extend(0, 0, 4, 8, hidden, [5]) == before, "a window hides what lies before it"


def test_a_broken_law_is_reported_with_what_it_takes_to_see_it_again(monkeypatch, capsys):
    """A pool that loses a page: told by number, seed and event, and the exit code says so."""
    from kv.pages import Pages

    release = Pages.release

    def leak(self: Pages, page: int) -> None:
        if page != 7 or self.refs[page] != 1:
            release(self, page)

    monkeypatch.setattr(Pages, "release", leak)
    ran = run_seed(1, 400)
    assert isinstance(ran, Failure) and ran.law in ("I1-I3", "I2", "I12")
    assert main(["simulate", "--seeds", "1", "--first-seed", "1", "--events", "400", "--disable-tqdm"]) == 1
    told = capsys.readouterr().out
    assert "1 of 1 seed broke a law" in told and f"{ran.law}: {law_name(ran.law)}" in told
    assert ran.message in told and "--first-seed 1 --events 400" in told
    assert re.search(r"trace [0-9a-f]{32}", told) and ran.trace in told
    again = run_seed(1, 400)
    assert isinstance(again, Failure) and (again.trace, again.events) == (ran.trace, ran.events)


def test_the_table_of_faults_names_what_was_met_too_rarely():
    ran = run_seed(2, 300)
    assert isinstance(ran, Ran)
    lines = table(ran.met, NAMES)
    assert len(lines) == 1 + len(NAMES)
    rare = thin(ran.met, NAMES, 10**9)
    assert len(rare) == len(NAMES) * len(STATES) - len(IMPOSSIBLE)
    assert not IMPOSSIBLE.keys() & ran.met.keys()
    assert main(["simulate", "--seeds", "1", "--events", "100", "--least", "1000000", "--disable-tqdm"]) == 1


def test_laws_are_called_as_in_the_documents():
    rows = re.findall(r"^\| ([IR]\d+) \| ([^|]+) \|", PAGE.read_text(), re.MULTILINE)
    assert {number: name.strip() for number, name in rows} == LAWS
