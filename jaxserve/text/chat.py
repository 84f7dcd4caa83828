"""Chat messages to one text, by the model's template.

A template is a program that came with the model. It runs in a sandbox, and the sandbox in a process with
little memory that is killed when it takes too long, because Jinja's sandbox bounds neither time nor memory.
"""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

_WORKER_FILE = Path(__file__).with_name("template_worker.py")
_START_LIMIT_S = 30.0
_BYTES_PER_CHARACTER = 12
"""JSON writes a character outside the basic plane as two escapes of six bytes."""

_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class TemplateError(ValueError):
    """The messages cannot be rendered. The message is one line and may be shown to the client."""


class TemplateBusyError(TemplateError):
    """No worker became free in time; the same request may succeed later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateLimits:
    """What one rendering may take.

    Attributes:
        workers: processes; one stuck template leaves the others.
        deadline_s: seconds to render one conversation.
        wait_s: seconds to wait for a free worker.
        memory_bytes: address space of a worker.
        max_chars: characters of output.
    """

    workers: int = 2
    deadline_s: float = 2.0
    wait_s: float = 10.0
    memory_bytes: int = 256 << 20
    max_chars: int = 1 << 20


class _Worker:
    """One process, owned by one thread at a time."""

    def __init__(self, limits: TemplateLimits) -> None:
        self._limits = limits
        arguments = [str(limits.memory_bytes), str(limits.deadline_s)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER_FILE), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt from the terminal is for the server, which drains
        )
        assert self._process.stdin is not None and self._process.stdout is not None  # both are pipes
        self._requests, self._replies = self._process.stdin, self._process.stdout

    def wait_ready(self) -> bool:
        """Whether the process came up."""
        return self._exchange(b"", _START_LIMIT_S)[0] is not None

    def ask(self, request: bytes) -> tuple[dict[str, Any] | None, bool]:
        """The answer (None if the process died) and whether the deadline passed."""
        return self._exchange(request, self._limits.deadline_s)

    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process, from any thread; whoever waits for an answer gets None."""
        self._process.kill()

    def end(self) -> None:
        """End the process and collect it; no thread may be waiting for an answer."""
        self._process.kill()
        self._process.wait()
        self._replies.close()
        with contextlib.suppress(OSError):  # closing flushes what a dead reader no longer takes
            self._requests.close()

    def _exchange(self, request: bytes, limit_s: float) -> tuple[dict[str, Any] | None, bool]:
        overran = threading.Event()

        def stop() -> None:
            overran.set()
            self._process.kill()

        timer = threading.Timer(limit_s, stop)
        timer.daemon = True
        timer.start()
        try:
            self._requests.write(request)
            self._requests.flush()
            line = self._replies.readline(self._limits.max_chars * _BYTES_PER_CHARACTER + 4096)
            return (json.loads(line) if line.endswith(b"\n") else None), overran.is_set()
        except OSError:
            return None, overran.is_set()
        finally:
            timer.cancel()
            timer.join()


class TemplatePool:
    """Worker processes that render templates, started when first needed. Usable from any thread."""

    def __init__(self, limits: TemplateLimits = TemplateLimits()) -> None:
        self._limits = limits
        self._free = threading.Semaphore(limits.workers)
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._closed = False

    def __enter__(self) -> "TemplatePool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def render(self, request: Mapping[str, Any]) -> str:
        """Render one request of `template_worker.render`, less `max_chars`. Blocks; call it in a thread.

        Raises:
            TemplateBusyError: no worker became free within `wait_s`.
            TemplateError: the template failed, ran past a limit, or the pool is closed.
        """
        try:
            line = json.dumps({**request, "max_chars": self._limits.max_chars}).encode() + b"\n"
        except (RecursionError, TypeError, ValueError):
            raise TemplateError(
                "messages and template arguments must be plain JSON, not deeply nested"
            ) from None
        if not self._free.acquire(timeout=self._limits.wait_s):
            raise TemplateBusyError("too many chat templates are being rendered; try again")
        try:
            worker = self._take()
            healthy = False
            try:
                reply, overran = worker.ask(line)
                healthy = reply is not None and not overran and not reply.get("spent", False)
            finally:
                self._give(worker, healthy)
        finally:
            self._free.release()
        if reply is None:
            limit = f"took longer than {self._limits.deadline_s:g} s" if overran else "ended its process"
            raise TemplateError(f"chat template {limit}")
        if "error" in reply:
            raise TemplateError(reply["error"])
        return reply["text"]

    def close(self) -> None:
        """End all workers; renderings under way fail. Further calls do nothing."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for worker in self._busy:
                worker.kill()
        for worker in idle:
            worker.end()

    def _take(self) -> _Worker:
        with self._lock:
            self._refuse_if_closed()
            worker = self._idle.pop() if self._idle else None
            if worker is not None:
                self._busy.add(worker)
        if worker is not None and worker.alive():
            return worker
        if worker is not None:
            self._give(worker, healthy=False)
        return self._start()

    def _start(self) -> _Worker:
        worker = _Worker(self._limits)
        with self._lock:
            self._busy.add(worker)
            closed = self._closed
        if not closed and worker.wait_ready():
            return worker
        self._give(worker, healthy=False)
        self._refuse_if_closed()
        raise TemplateBusyError("the chat template worker did not start; try again")

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise TemplateError("the server is shutting down")

    def _give(self, worker: _Worker, healthy: bool) -> None:
        with self._lock:
            self._busy.discard(worker)
            keep = healthy and not self._closed
            if keep:
                self._idle.append(worker)
        if not keep:
            worker.end()


class ChatTemplate:
    """One model's template. Usable from any thread."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, str], pool: TemplatePool) -> None:
        """Use the Jinja `source`; `special_tokens` (`bos_token`, `eos_token`, ...) are its variables."""
        self._source = source
        self._special_tokens = MappingProxyType(dict(special_tokens))
        self._pool = pool

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The text of a conversation. Blocks while a worker renders; call it in a thread.

        Args:
            messages: each with a `role` and a `content`: a string, None or a list of text parts. Parts are
                joined by newlines for a template that expects strings, and a string becomes one part for a
                template that expects parts.
            add_generation_prompt: end with the beginning of an answer.
            continue_final_message: end inside the last message, for the model to go on with it.
            template_kwargs: further variables for the template.

        Raises:
            TemplateBusyError: no worker became free in time.
            TemplateError: the arguments contradict each other, or the template fails or passes a limit.
        """
        if add_generation_prompt and continue_final_message:
            raise TemplateError("add_generation_prompt and continue_final_message exclude each other")
        if not messages:
            raise TemplateError("messages must not be empty")
        for index, message in enumerate(messages):
            _check_message(index, message)
        reserved = sorted(_RESERVED & template_kwargs.keys())
        if reserved:
            raise TemplateError(f"chat_template_kwargs must not set {', '.join(reserved)}")
        variables = {
            **self._special_tokens,
            **template_kwargs,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        request = {
            "template": self._source,
            "variables": variables,
            "messages": [_plain(message) for message in messages],
            "continue_final_message": continue_final_message,
        }
        return self._pool.render(request)


def _check_message(index: int, message: Mapping[str, Any]) -> None:
    where = f"messages[{index}]"
    if not isinstance(message.get("role"), str):
        raise TemplateError(f"{where}.role must be a string")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, (list, tuple)):
        raise TemplateError(f"{where}.content must be a string or a list of parts")
    for number, part in enumerate(content):
        if isinstance(part, str):
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise TemplateError(f"{where}.content[{number}].type must be text, not {kind!r}"[:200])
        if not isinstance(part.get("text"), str):
            raise TemplateError(f"{where}.content[{number}].text must be a string")


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message as JSON types, with every part of the content an object."""
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return dict(message)
    parts = [{"type": "text", "text": part} if isinstance(part, str) else dict(part) for part in content]
    return {**message, "content": parts}
