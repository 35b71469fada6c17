"""The process that renders chat templates: started by `core/data/template.py`, which kills it where it takes too long.

A template is code from strangers. The sandbox keeps it from the machine, but nothing inside a process keeps three
nested loops or `10 ** (10 ** 10)` from running on; another process can be stopped at any point. It imports the standard
library and jinja2 alone. One request a line, one answer a line, both JSON in ASCII.
"""

import json
import sys
from collections.abc import Callable
from functools import cache
from typing import IO, Any

MEMORY = 2 * 1024**3
"""Bytes of address space, where the system can limit it."""
LONGEST = 50_000_000
"""Characters of one rendered conversation."""
TODAY = "2024-07-26"
"""The day of `strftime_now`: rows must have the same tokens today and tomorrow, or no run could be resumed."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning; templates read the first two."""


def main() -> None:
    """Answer requests until there are none."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    seconds, *packages = sys.argv[1:]
    sys.path.extend(packages)
    compiled("")  # imports jinja2, before the clock runs
    answers.write(b"ready\n")
    answers.flush()
    _serve(requests, answers, alarm=_limit(float(seconds)))


def _serve(requests: IO[bytes], answers: IO[bytes], alarm: Callable[[bool], None]) -> None:
    templates: dict[str, str] = {}
    for line in requests:
        request = json.loads(line)
        templates |= request.get("template", {})
        alarm(True)
        try:
            texts = [_render(templates[request["key"]], request["tokens"], **row) for row in request["rows"]]
            answer: Any = {"texts": texts}
        except MemoryError:
            answer = {"stopped": "needs too much memory"}
        alarm(False)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _render(
    template: str, tokens: dict[str, Any], messages: list[dict[str, Any]], tools: Any, jobs: list[tuple[int, bool]]
) -> list[list[str | None]]:
    """For each job (messages to take, whether an answer begins): the text, or None and why it was refused."""
    messages = [_message(message) for message in messages]
    texts: list[list[str | None]] = []
    for count, begin_answer in jobs:
        try:
            text = compiled(template).render(
                {
                    **tokens,
                    "messages": messages[:count],
                    "tools": tools,
                    "documents": None,
                    "add_generation_prompt": begin_answer,
                }
            )
            if len(text) > LONGEST:
                raise MemoryError
            texts.append([text, None])
        except MemoryError:
            raise
        except Exception as error:  # whatever a template does wrong, it is the template that is refused
            texts.append([None, f"{error}" or type(error).__name__])
    return texts


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as transformers gives it to templates: without empty fields, reasoning under its usual names."""
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[name] for name in REASONING if name in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


@cache
def compiled(template: str) -> Any:
    """The compiled template, in the sandbox and with the extras that chat templates know from transformers."""
    from datetime import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import CallBlock
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`: marks what the assistant says for others; here, nothing but its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("content"), [], [], body).set_lineno(line)

        def content(self, caller: Any) -> Any:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """Jinja's, without attributes that could lead to Python's own."""

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"{name!r} is no name for an attribute of a namespace")
            super().__setitem__(name, value)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": datetime.fromisoformat(TODAY).strftime,
        "namespace": Namespace,
        "dict": lambda *args, **values: dict(*args, **values),
    }
    return environment.from_string(template)


def _limit(seconds: float) -> Callable[[bool], None]:
    """Limit memory, and return what sets and clears an alarm: this process ends by itself if its parent is gone."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer: control-C reaches both
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        pass  # not on this system: the deadline bounds what is left
    if not hasattr(signal, "setitimer"):
        return lambda on: None
    return lambda on: signal.setitimer(signal.ITIMER_REAL, 2 * seconds if on else 0) and None


if __name__ == "__main__":
    main()
