"""Renders chat templates, in a process of its own that may be killed at any moment.

Run by path; the arguments are the memory limit in bytes and the deadline in seconds. One JSON object per
line comes in on standard input and one goes out on standard output: `{"ready": true}` once, then for each
request `{"text": ...}` or `{"error": ..., "spent": ...}`, where spent means that this process should be
replaced. It imports nothing of ours: the package around it may import JAX.

Templates see what they see in Hugging Face's transformers: the same whitespace rules, `raise_exception`,
`strftime_now`, `tojson` without HTML escapes, `break` and `continue`, and the `generation` tag.
"""

import contextlib
import functools
import json
import math
import os
import secrets
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # not a Unix: the parent's deadline still holds
    resource = None

_LONGEST_MESSAGE = 300


class _Raised(TemplateError):
    """The template itself refused its input."""


class _GenerationTag(Extension):
    """`{% generation %}` marks the model's own words for training; rendering it is rendering its body."""

    tags = {"generation"}  # noqa: RUF012 (as jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise _Raised(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    variables: dict[str, Any] = environment.globals
    variables |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


ENVIRONMENT = _environment()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compiled:
    """A template and what it expects of a message's content.

    Attributes:
        template: ready to render.
        takes_parts: it iterates over the content.
        takes_strings: it asks whether the content is a string, or never iterates over it.
    """

    template: Template
    takes_parts: bool
    takes_strings: bool


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> _Compiled:
    tree = ENVIRONMENT.parse(source)
    takes_parts = iterates_over_content(tree)
    asks = any(test.name == "string" for test in tree.find_all(nodes.Test))
    return _Compiled(
        template=ENVIRONMENT.from_string(source),
        takes_parts=takes_parts,
        takes_strings=asks or not takes_parts,
    )


def iterates_over_content(tree: nodes.Template) -> bool:
    """Whether a loop runs over a message's content, directly, through a variable or as a macro's argument."""
    macros = {macro.name: [arg.name for arg in macro.args] for macro in tree.find_all(nodes.Macro)}
    names: set[str] = set()
    known = -1
    while known < len(names):
        known = len(names)
        for assign in tree.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
                names.add(assign.target.name)
        for call in tree.find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and call.node.name in macros:
                pairs = zip(macros[call.node.name], call.args, strict=False)
                names.update(name for name, value in pairs if _is_content(value, names))
    return any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    match node:
        case nodes.Name(name=name):
            return name in names
        case nodes.Getattr(attr="content") | nodes.Getitem(arg=nodes.Const(value="content")):
            return True
        case nodes.Call(node=nodes.Getattr(attr="get"), args=[nodes.Const(value="content"), *_]):
            return True
        case nodes.Filter(node=inner) | nodes.Getitem(node=inner, arg=nodes.Slice()):
            return _is_content(inner, names)
        case nodes.CondExpr(expr1=one, expr2=two) | nodes.Or(left=one, right=two):
            return _is_content(one, names) or _is_content(two, names)
        case _:
            return False


def _fitted(content: Any, compiled: _Compiled) -> Any:
    """The content as the template expects it: vLLM's `--chat-template-content-format auto`."""
    if isinstance(content, list):
        if compiled.takes_parts:
            return content
        return "\n".join(part["text"] for part in content)
    text = content or ""
    return text if compiled.takes_strings else [{"type": "text", "text": text}]


def _marked(content: Any, mark: str) -> Any:
    """The content with `mark` after its last text."""
    if isinstance(content, str):
        return content + mark
    if not content:
        raise _Raised("continue_final_message needs text in the final message")
    return [*content[:-1], content[-1] | {"text": content[-1]["text"] + mark}]


def _pieces(template: Template, variables: Mapping[str, Any], max_chars: int) -> Iterator[str]:
    total = 0
    for piece in template.generate(variables):
        total += len(piece)
        if total > max_chars:
            raise _Raised(f"chat template wrote more than {max_chars} characters")
        yield piece


def render(request: Mapping[str, Any]) -> str:
    """The text of a conversation.

    Args:
        request: `template`, `variables`, `messages`, `continue_final_message` and `max_chars`; content is a
            string, null, or a list of text parts.

    Raises:
        jinja2.TemplateError: the template is invalid or refuses the messages.
        Exception: whatever the template's expressions raise.
    """
    compiled = _compiled(request["template"])
    messages = [
        message | {"content": _fitted(message.get("content"), compiled)} for message in request["messages"]
    ]
    mark = ""
    if request["continue_final_message"]:
        # The space tells whether the template trims the content; the digits cannot be in anybody's text.
        mark = f"{secrets.token_hex(16)} "
        messages[-1]["content"] = _marked(messages[-1]["content"], mark)
    variables = request["variables"] | {"messages": messages}
    text = "".join(_pieces(compiled.template, variables, request["max_chars"] + len(mark)))
    if not mark:
        return text
    before, found, after = text.rpartition(mark.strip())
    if not found:
        raise _Raised("continue_final_message is not possible: the template leaves out the final message")
    return before if after.startswith(" ") else before.rstrip()


def answer(line: bytes) -> dict[str, Any]:
    """Render one request; failures become an `error` that may be shown to the client."""
    try:
        return {"text": render(json.loads(line))}
    except (MemoryError, RecursionError) as spent:
        what = "memory" if isinstance(spent, MemoryError) else "recursion"
        return {"error": f"chat template needs too much {what}", "spent": True}
    except _Raised as refusal:
        error = str(refusal)
    except TemplateSyntaxError as broken:
        error = f"chat template is invalid at line {broken.lineno}: {broken}"
    except Exception as raised:  # a template can raise anything
        error = f"chat template failed: {type(raised).__name__}: {raised}"
    return {"error": " ".join(error.split())[:_LONGEST_MESSAGE], "spent": False}


def _confine(memory_bytes: int) -> None:
    """Give up what a template must not reach: memory, files to write, processes to start, secrets."""
    for name in os.environ.keys() - {"TZ"}:
        del os.environ[name]
    if resource is None:
        return
    limits = {"RLIMIT_AS": memory_bytes, "RLIMIT_FSIZE": 0, "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0}
    for name, value in limits.items():
        with contextlib.suppress(AttributeError, OSError, ValueError):  # not every system has every limit
            resource.setrlimit(getattr(resource, name), (value, value))


def main() -> None:
    """Serve requests until standard input ends."""
    _confine(int(sys.argv[1]))
    grace_s = math.ceil(float(sys.argv[2])) + 1
    # The parent kills an overrunning worker; the alarm does it when the parent is gone.
    alarm = getattr(signal, "alarm", lambda _: 0)
    write = sys.stdout.buffer
    write.write(b'{"ready": true}\n')
    write.flush()
    while line := sys.stdin.buffer.readline():
        alarm(grace_s)
        result = answer(line)
        alarm(0)
        write.write(json.dumps(result).encode() + b"\n")
        write.flush()


if __name__ == "__main__":
    main()
