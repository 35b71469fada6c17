"""Chat templates, rendered in the sandbox, in a process of their own and with a deadline."""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunekit.errors import ConfigError, DataError

SECONDS = 10.0
"""How long the renderings of one row may take; they take less than a millisecond."""

START = 60.0
"""How long the process may take to start."""
IDLE = 60.0
"""After so many seconds without a request the process ends: there is none while a model trains."""
TICK = 0.1
"""Seconds between two looks at the clock."""

Job = tuple[int, bool]
"""What to render: so many of the messages, and whether the heading of an answer comes after them."""


class Template:
    """A chat template with a tokenizer's special tokens.

    Args:
        text: the Jinja template.
        tokens: the special tokens it may name (`bos_token`, `eos_token`, ...), by name.
        seconds: how long the renderings of one conversation may take.
    """

    def __init__(self, text: str, tokens: Mapping[str, Any], seconds: float = SECONDS) -> None:
        self.text = text
        self.tokens = dict(tokens)
        self.seconds = seconds
        self._ahead: dict[str, list[list[Any]]] = {}
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Any, jobs: Sequence[Job]) -> list[str | DataError]:
        """The text of each job, or the error (returned, not raised) with which the template refuses it.

        Raises:
            ConfigError: the template was stopped, because it took too long or too much memory.
        """
        row = _row(messages, tools, jobs)
        texts = self._ahead.pop(row, None)
        if texts is None:
            texts = self._ask([row])[0]
        return [
            DataError(f"the chat template refuses this conversation: {why} (messages)") if text is None else text
            for text, why in texts
        ]

    def render_ahead(self, rows: Iterable[tuple[Sequence[Mapping[str, Any]], Any, Sequence[Job]]]) -> None:
        """Render conversations that `render` will soon be asked for: many at once cost much less than one by one."""
        requests = list(dict.fromkeys(_row(*row) for row in rows))
        try:
            self._ahead = dict(zip(requests, self._ask(requests), strict=True))
        except ConfigError:  # raised again by the one row that it is about
            self._ahead = {}

    def _ask(self, rows: Sequence[str]) -> list[list[list[Any]]]:
        answer = _helper().ask(rows, self)
        if "stopped" in answer:
            begin = self.text[:60] + ("..." if len(self.text) > 60 else "")
            raise ConfigError(f"the chat template {begin!r} was stopped: it {answer['stopped']}", "Pipeline.template")
        texts: list[list[list[Any]]] = answer["texts"]
        return texts


class Helper:
    """The process that renders, started when it is first asked, and again after it was stopped or long idle."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._asking = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._known: set[str] = set()
        self._clock = threading.Lock()
        self._due = math.inf
        self._late = False

    def ask(self, rows: Sequence[str], template: Template) -> dict[str, Any]:
        """Its answer about some conversations; `{"stopped": why}` if there is none in time."""
        with self._asking:
            self._set_clock(START)
            process = self._running(template.seconds)
            new = {} if template.sha256 in self._known else {"template": {template.sha256: template.text}}
            about = json.dumps({"key": template.sha256, "tokens": template.tokens, **new}, default=str)
            line = f'{about[:-1]}, "rows": [{", ".join(rows)}]}}\n'.encode("ascii")
            answer = b""
            assert process.stdin
            assert process.stdout
            self._set_clock(template.seconds)
            try:
                process.stdin.write(line)
                process.stdin.flush()
                answer = process.stdout.readline()
            except OSError:  # it is gone; why is told below
                pass
            finally:
                self._set_clock(IDLE)
                # Whatever interrupted us, control-C included: an answer to come would be taken for that of the next.
                if not answer.endswith(b"\n"):
                    self._end(process)
            if not answer.endswith(b"\n"):
                late = f"took more than {template.seconds:g} s for one conversation"
                ended = f"ended the process that renders it (exit code {process.returncode})"
                return {"stopped": late if self._late else ended}
            self._known.add(template.sha256)
            found: dict[str, Any] = json.loads(answer)
            return found

    def stop(self) -> None:
        """End the process, if there is one and it is not that of the process we were forked from."""
        if self._owner == os.getpid():
            with self._asking:
                if self._process:
                    self._end(self._process)

    def _running(self, seconds: float) -> subprocess.Popen[bytes]:
        if self._process and not self._late and self._process.poll() is None:
            return self._process
        if self._process:
            self._end(self._process)
        # Isolated, and with jinja2 alone on its path: nothing else is imported or read.
        script = Path(__file__).with_name("template_process.py")
        packages = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
        places = [str(Path(spec.origin).parents[1]) for spec in packages if spec and spec.origin]
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(script), str(seconds), *places],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as error:
            raise ConfigError(f"cannot start the process that renders chat templates: {error}") from None
        self._process, self._known, self._late = process, set(), False
        threading.Thread(target=self._watch, args=(process,), daemon=True, name="tunekit-template-clock").start()
        ready = b""
        try:
            assert process.stdout
            ready = process.stdout.readline()
        finally:
            if not ready:
                self._end(process)
        if not ready:
            raise ConfigError(
                f"the process that renders chat templates does not start (exit code {process.returncode})"
            )
        return process

    def _set_clock(self, seconds: float) -> None:
        with self._clock:
            self._due = time.monotonic() + seconds

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Kill the process when its time is up. A thread, because a pipe is read with a deadline on no system alike."""
        while process.poll() is None:
            with self._clock:
                if time.monotonic() > self._due:
                    self._late = True
                    process.kill()
            time.sleep(TICK)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        self._process = None
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                if pipe:
                    pipe.close()
            except OSError:  # what was not sent can no longer be
                pass


def _row(messages: Sequence[Mapping[str, Any]], tools: Any, jobs: Sequence[Job]) -> str:
    return json.dumps({"messages": messages, "tools": tools, "jobs": jobs}, default=_plain)


def _plain(value: Any) -> Any:
    """What a template sees of an object that JSON has no form for: a number's value, or the name of its type."""
    if isinstance(value, Mapping):
        return dict(value)
    return value.item() if callable(getattr(value, "item", None)) else f"<{type(value).__name__}>"


_HELPERS: dict[int, Helper] = {}
"""By process id: after a fork, a child must not read the answers of its parent's helper."""


def _helper() -> Helper:
    found = _HELPERS.get(os.getpid())
    if found is None:
        found = _HELPERS.setdefault(os.getpid(), Helper())
        atexit.register(found.stop)
    return found
