"""Preferences between two answers, from the forms in which they are published.

| form | columns |
|---|---|
| texts | prompt, chosen, rejected |
| messages | prompt: [...], chosen: [...], rejected: [...]; or without a prompt, each side the whole conversation |
| transcripts (HH-RLHF, arXiv 2204.05862) | chosen, rejected: "\\n\\nHuman: ...\\n\\nAssistant: ..." |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tunekit.core.data.conversations import check_messages, check_text, even_out, kind_of
from tunekit.errors import DataError

_TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}

Messages = list[dict[str, Any]]


def is_transcript(value: Any) -> bool:
    """Whether a text is an HH-RLHF transcript."""
    return isinstance(value, str) and _TURN.match(value) is not None


def from_transcript(text: str) -> Messages:
    """The messages of "\\n\\nHuman: ...\\n\\nAssistant: ..."; nothing but the headings is taken away."""
    _, *parts = _TURN.split(text)
    return [{"role": _SPEAKERS[who], "content": said} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def to_preference(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`{"prompt": [...], "chosen": [...], "rejected": [...]}`, each a list of messages.

    The prompt ends where it is the assistant's turn; the two answers begin there and each ends with the assistant.

    Raises:
        DataError: the two sides have different prompts, an answer is empty, or both answers are the same.
    """
    given = row.get("prompt")
    prompt = None if given is None else _side(given, "prompt", where, "user")
    sides = {name: _side(row[name], name, where, "assistant") for name in ("chosen", "rejected")}
    if prompt is not None and prompt and prompt[-1].get("role") == "assistant" and not prompt[-1].get("content"):
        prompt = prompt[:-1]  # a transcript that ends with the heading "Assistant:"
    if prompt is None:
        prompt = _common(sides["chosen"], sides["rejected"])
        for name, side in sides.items():
            roles = [message.get("role") for message in side[len(prompt) :]]
            if not prompt or roles[:1] != ["assistant"] or "user" in roles:
                raise DataError(f"{where}: the prompts of the two sides differ ({name})")
            sides[name] = side[len(prompt) :]
    else:
        sides = {name: _after(prompt, side, name, where) for name, side in sides.items()}
    for name, side in sides.items():
        try:
            check_messages([*prompt, *side], where)
        except DataError as error:
            raise DataError(_renumbered(str(error), len(prompt), name)) from None
    if sides["chosen"] == sides["rejected"]:
        raise DataError(f"{where}: chosen and rejected are the same, so neither is preferred (rejected)")
    return {"prompt": prompt, **sides}


def _side(value: Any, name: str, where: str, role: str) -> Messages:
    """One column as messages: a plain text is what `role` says."""
    if is_transcript(value):
        return from_transcript(value)
    if isinstance(value, list | tuple):
        try:
            return even_out(value, where)
        except DataError as error:
            raise DataError(str(error).replace("(messages", f"({name}")) from None
    if isinstance(value, Mapping):
        raise DataError(f"{where}: expected text or a list of messages, got {kind_of(value)} ({name})")
    check_text(value, name, where)
    return [{"role": role, "content": value}]


def _common(chosen: Messages, rejected: Messages) -> Messages:
    """The messages that both sides begin with, up to where the assistant's last common turn would be."""
    count = 0
    for ours, theirs in zip(chosen[:-1], rejected[:-1], strict=False):
        if ours != theirs:
            break
        count += 1
    return chosen[:count]


def _after(prompt: Messages, side: Messages, name: str, where: str) -> Messages:
    """One side without the prompt, where it repeats it."""
    if side and side[0].get("role") == "assistant":
        return side
    if side[: len(prompt)] == prompt:
        return side[len(prompt) :]
    raise DataError(f"{where}: begins neither with the assistant nor with the prompt ({name})")


def _renumbered(message: str, offset: int, name: str) -> str:
    """An error about `messages[i]` of prompt and answer together, with the column and the number the row has."""

    def place(match: re.Match[str]) -> str:
        number = int(match.group(1))
        return f"({name}[{number - offset}]" if number >= offset else f"(prompt[{number}]"

    return re.sub(r"\(messages\[(\d+)\]", place, message).replace("(messages)", f"({name})")
