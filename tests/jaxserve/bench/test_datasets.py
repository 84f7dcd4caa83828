"""Prompts: exact lengths, the same for the same seed, and clear words about a bad file."""

from pathlib import Path

import pytest

from jaxserve.bench.datasets import Prompt, random_prompts, read_prompts, shared_prefix_prompts


def lengths(prompts: list[Prompt]) -> list[int]:
    return [len(prompt.token_ids or ()) for prompt in prompts]


def test_random_prompts_have_the_length_and_the_range_asked_for() -> None:
    prompts = random_prompts(20, 33, seed=1, vocabulary=(5, 9))
    assert lengths(prompts) == [33] * 20
    assert {token for prompt in prompts for token in prompt.token_ids or ()} == {5, 6, 7, 8}


def test_the_seed_decides() -> None:
    assert random_prompts(3, 8, seed=1) == random_prompts(3, 8, seed=1) != random_prompts(3, 8, seed=2)


def test_lengths_vary_within_the_ratio() -> None:
    varied = lengths(random_prompts(300, 100, seed=0, range_ratio=0.1))
    assert min(varied) == 90 and max(varied) == 110


def test_prefixes_are_shared_in_turn() -> None:
    prompts = [p.token_ids or () for p in shared_prefix_prompts(6, 20, prefix_len=12, num_prefixes=2, seed=0)]
    assert {len(prompt) for prompt in prompts} == {20}
    assert prompts[0][:12] == prompts[2][:12] == prompts[4][:12] != prompts[1][:12]
    assert len({prompt[12:] for prompt in prompts}) == 6


def test_lengths_that_make_no_sense() -> None:
    for prefix_len, num_prefixes in ((20, 1), (0, 1), (5, 0)):
        with pytest.raises(ValueError, match="shared prefix"):
            shared_prefix_prompts(1, 20, prefix_len=prefix_len, num_prefixes=num_prefixes, seed=0)
    with pytest.raises(ValueError, match="random prompts"):
        random_prompts(1, 0, seed=0)
    with pytest.raises(ValueError, match="exactly one"):
        Prompt(text="a", token_ids=(1,))


def test_text_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo {not json}\n")
    prompts = read_prompts(path, 5, seed=3)
    assert len(prompts) == 5 and {prompt.text for prompt in prompts} == {"one", "two {not json}"}


def test_jsonl_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '"plain"\n{"prompt": "text", "output_len": 3}\n{"prompt": [1, 2]}\n'
        '{"messages": [{"role": "user", "content": "hi"}], "output_tokens": 4}\n'
    )
    prompts = read_prompts(path, 4, seed=0)
    assert {(p.text, p.token_ids, p.messages is not None, p.output_len) for p in prompts} == {
        ("plain", None, False, None),
        ("text", None, False, 3),
        (None, (1, 2), False, None),
        (None, None, True, 4),
    }


@pytest.mark.parametrize(
    "line", ["{", "3", "{}", '{"prompt": []}', '{"prompt": "a", "output_len": 0}', '{"messages": ["x"]}']
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('"fine"\n' + line + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl:2"):
        read_prompts(path, 1, seed=0)


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("\n")
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts(path, 1, seed=0)
