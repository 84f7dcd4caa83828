"""Chat templates: what they render, and what they cannot do to the server."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve.text import (
    ChatTemplate,
    TemplateBusyError,
    TemplateError,
    TemplateLimits,
    TemplatePool,
    Tokenizer,
)
from jaxserve.text import chat as chat_module

GOLDENS = json.loads(
    (Path(__file__).parent / "goldens" / "smollm2_tokenizer.json").read_text(encoding="utf-8")
)
HI = [{"role": "user", "content": "hi"}]
FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
PARTS = "{% for m in messages %}{% for part in m['content'] %}[{{ part.text }}]{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def pool() -> Iterator[TemplatePool]:
    with TemplatePool() as pool:
        yield pool


def render(pool: TemplatePool, source: str, messages: Any = HI, **options: Any) -> str:
    return ChatTemplate(source, special_tokens={"bos_token": "<s>"}, pool=pool).render(messages, **options)


@pytest.mark.golden
@pytest.mark.parametrize("name", GOLDENS["chats"])
def test_the_default_template_renders_as_in_transformers(
    pool: TemplatePool, smollm2: Tokenizer, name: str
) -> None:
    case = GOLDENS["chats"][name]
    template = ChatTemplate(smollm2.chat_template, special_tokens=smollm2.special_tokens, pool=pool)
    text = template.render(
        case["messages"],
        add_generation_prompt=case.get("add_generation_prompt", False),
        continue_final_message=case.get("continue_final_message", False),
    )
    assert text == case["text"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("  {% if true %}\nx\n  {% endif %}\ny\n", "x\ny"),
        ("{{ {'b': '<&\u4f60>', 'a': 1} | tojson }}", '{"b": "<&\u4f60>", "a": 1}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}\n{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        (
            "{{ bos_token }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}",
            "<s>TrueTrueTrue",
        ),
        ("{{ strftime_now('%Y') | length }}", "4"),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
            "{{ ns.n }}",
            "1",
        ),
        ("{{ 'a' if undefined_name is defined else 'b' }}{{ undefined_name }}", "b"),
        ("{{ messages[0].content | trim | upper }}", "HI"),
        ("{{ extra }}{{ bos_token }}", "more<s>"),
    ],
)
def test_the_language_of_templates(pool: TemplatePool, source: str, expected: str) -> None:
    assert render(pool, source, template_kwargs={"extra": "more"}) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}{{ m.content }}|{% endfor %}", "a\nb|c||"),
        (PARTS, "[a][b][c][]"),
        (PARTS.replace("m['content']", "m.content"), "[a][b][c][]"),
        (PARTS.replace("in m['content']", "in (m.get('content') or [])"), "[a][b][c][]"),
        (
            "{% for m in messages %}{% set c = m.content %}"
            "{% for p in c %}{{ p.text }}{% endfor %}{% endfor %}",
            "abc",
        ),
        (
            "{% macro show(c) %}{% if c is string %}s:{{ c }}{% else %}"
            "{% for p in c %}p:{{ p.text }}{% endfor %}"
            "{% endif %}{% endmacro %}{% for m in messages %}"
            "{{ show(m.content) }};{% endfor %}",
            "p:ap:b;s:c;s:;",
        ),
        (
            "{% for m in messages %}{% for w in m.content.split('\n') %}({{ w }}){% endfor %}{% endfor %}",
            "(a)(b)(c)()",
        ),
    ],
)
def test_content_takes_the_form_that_the_template_expects(
    pool: TemplatePool, source: str, expected: str
) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, "b"]},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": None},
    ]
    assert render(pool, source, messages) == expected


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        ("{% for m in messages %}<{{ m.content }}>{% endfor %}", "go on ", "<hi><go on "),
        ("{% for m in messages %}<{{ m.content | trim }}>{% endfor %}", "go on ", "<hi><go on"),
        (PARTS, [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}], "[hi][x][y"),
        ("{{ messages[1].content }}{{ messages[1].content }}", "hi", "hi"),
    ],
)
def test_continuing_the_final_message(pool: TemplatePool, source: str, content: Any, expected: str) -> None:
    messages = [*HI, {"role": "assistant", "content": content}]
    text = render(pool, source, messages, add_generation_prompt=False, continue_final_message=True)
    if source.startswith("{{ messages[1]"):
        assert text.endswith(expected) and ">" not in text
    else:
        assert text == expected


def test_there_must_be_something_to_continue(pool: TemplatePool) -> None:
    messages = [{"role": "assistant", "content": []}]
    with pytest.raises(TemplateError, match="needs text"):
        render(pool, PARTS, messages, add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(TemplateError, match="leaves out the final message"):
        render(pool, "x", HI, add_generation_prompt=False, continue_final_message=True)


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, "must not be empty"),
        ([{"content": "x"}], {}, r"messages\[0\]\.role"),
        ([*HI, {"role": "user", "content": 3}], {}, r"messages\[1\]\.content must be"),
        (
            [{"role": "u", "content": [{"type": "image_url"}]}],
            {},
            r"content\[0\]\.type must be text, not 'image_url'",
        ),
        ([{"role": "u", "content": [3]}], {}, r"content\[0\]\.type"),
        (
            [{"role": "u", "content": [{"type": "text", "text": 3}]}],
            {},
            r"content\[0\]\.text must be a string",
        ),
        (HI, {"continue_final_message": True}, "exclude each other"),
        (HI, {"template_kwargs": {"messages": []}}, "must not set messages"),
        ([{"role": "u", "content": "x", "more": object()}], {}, "plain JSON"),
    ],
)
def test_wrong_arguments(pool: TemplatePool, messages: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        render(pool, "{{ messages[0].content }}", messages, **options)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Roles must\n alternate') }}", "^Roles must alternate$"),
        ("{% if %}", "invalid at line 1"),
        ("{{ messages.nothing.more }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ raise_exception.__globals__['os'] }}", "SecurityError"),
        ("{% for i in range(10**6) %}{% endfor %}", "OverflowError"),
        ("{{ 'a' * 10**9 }}", "too much memory"),
        (
            "{% set ns = namespace(x=[0]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
            "memory",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "too much recursion"),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "more than 1048576 characters"),
        ("{{ raise_exception('x' * 5000) }}", "^x{300}$"),
    ],
)
def test_failing_templates_give_one_line_and_the_next_one_works(
    pool: TemplatePool, source: str, message: str
) -> None:
    with pytest.raises(TemplateError, match=message) as failure:
        render(pool, source)
    assert "\n" not in str(failure.value)
    assert render(pool, "{{ messages[0].content }}") == "hi"


@pytest.mark.parametrize("source", [FOREVER, "{{ 9 ** (9 ** 9) }}"])
def test_an_endless_template_is_killed_while_others_go_on(source: str) -> None:
    limits = TemplateLimits(deadline_s=1.0)
    with TemplatePool(limits) as pool:
        assert render(pool, "warm") == "warm"
        errors: list[str] = []

        def stuck() -> None:
            with pytest.raises(TemplateError) as failure:
                render(pool, source)
            errors.append(str(failure.value))

        thread = threading.Thread(target=stuck)
        thread.start()
        begin, served = time.perf_counter(), 0
        while thread.is_alive():
            assert render(pool, "{{ messages[0].content }}") == "hi"
            served += 1
        thread.join()
        assert errors == ["chat template took longer than 1 s"]
        assert time.perf_counter() - begin < 3.0
        assert served > 20


def test_when_all_workers_are_stuck_others_are_told_so() -> None:
    limits = TemplateLimits(workers=1, deadline_s=1.5, wait_s=0.1)
    with TemplatePool(limits) as pool:
        assert render(pool, "warm") == "warm"

        def stuck() -> None:
            with pytest.raises(TemplateError):
                render(pool, FOREVER)

        thread = threading.Thread(target=stuck)
        thread.start()
        time.sleep(0.2)
        with pytest.raises(TemplateBusyError):
            render(pool, "x")
        thread.join()
        assert render(pool, "x") == "x"


def test_closing_ends_every_process_and_every_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(chat_module.subprocess, "Popen", Recorded)
    pool = TemplatePool(TemplateLimits(deadline_s=60.0))
    assert render(pool, "x") == "x"
    outcomes: list[type[BaseException]] = []

    def stuck() -> None:
        with pytest.raises(TemplateError) as failure:
            render(pool, FOREVER)
        outcomes.append(failure.type)

    threads = [threading.Thread(target=stuck) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    pool.close()
    pool.close()
    for thread in threads:
        thread.join(timeout=10)
    assert outcomes == [TemplateError, TemplateError]
    assert len(started) == 2
    assert [process.returncode is None for process in started] == [False, False]
    with pytest.raises(TemplateError, match="shutting down"):
        render(pool, "x")


def test_a_worker_that_died_idle_is_replaced() -> None:
    with TemplatePool(TemplateLimits(workers=1)) as pool:
        assert render(pool, "x") == "x"
        worker = pool._idle[0]
        worker.kill()
        worker._process.wait()
        assert render(pool, "y") == "y"


def test_an_interrupt_from_the_terminal_does_not_reach_the_workers() -> None:
    with TemplatePool() as pool:
        assert render(pool, "x") == "x"
        assert os.getpgid(pool._idle[0]._process.pid) != os.getpgid(0)


def test_the_worker_imports_little_and_ends_with_its_input() -> None:
    probe = (
        "import runpy, sys; sys.argv = ['w', str(1 << 28), '2'];"
        f"runpy.run_path({str(chat_module._WORKER_FILE)!r}, run_name='__main__');"
        "print(sorted({'jax', 'numpy', 'tokenizers', 'jaxserve', 'gguf'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", probe], input=b"", capture_output=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == [b'{"ready": true}', b"[]"]
