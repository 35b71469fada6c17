"""What a conversation must be to be trained on, and the small differences between dialects that are evened out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunekit.core.fields import did_you_mean
from tunekit.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
SYNONYMS = {"developer": "system", "function": "tool"}
"""Roles of OpenAI's format by the names that chat templates know: `developer` took the place of `system`, `tool` that
of `function`."""

_FOLLOWS: Mapping[str, tuple[str | None, ...]] = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_AFTER: Mapping[str | None, frozenset[str]] = {
    before: frozenset(role for role, allowed in _FOLLOWS.items() if before in allowed) for before in (None, *ROLES)
}


def is_plain(messages: Any) -> bool:
    """Whether a conversation is sound and holds roles and texts alone: the quick way, which nearly all rows go."""
    if type(messages) is not list:
        return False
    role, allowed = None, _AFTER[None]
    try:
        for message in messages:
            role, content = message["role"], message["content"]
            if role not in allowed or len(message) != 2:
                return False
            # Of anything but text, isascii is a TypeError. An empty question may be sound: it is looked at again.
            if not (str.isascii(content) or is_unicode(content)) or not content.strip():
                return False
            allowed = _AFTER[role]
    except (TypeError, KeyError):
        return False
    return role == "assistant"


def even_out(messages: Any, where: str) -> list[dict[str, Any]]:
    """The messages with tunekit's role names, without nulls, and with `function_call` as one of `tool_calls`.

    A null is what Arrow and Parquet put where another row has a value, so it says the same as no value at all. What is
    no list of messages comes back as it is, for `check_messages` to refuse.
    """
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        check_messages(messages, where)
    evened = []
    for message in messages:
        kept = {key: value for key, value in message.items() if value is not None or key == "content"}
        role = kept.get("role")
        if isinstance(role, str) and role in SYNONYMS:
            kept["role"] = SYNONYMS[role]
        if "function_call" in kept:
            kept["tool_calls"] = [{"type": "function", "function": kept.pop("function_call")}]
        if kept.get("tool_calls") and kept.get("content") is None:
            kept.pop("content", None)
        evened.append(kept)
    return evened


def check_messages(messages: Any, where: str) -> None:
    """Raise DataError unless `messages` is a conversation to train on: roles in order, answered at the end."""
    if is_plain(messages):
        return
    if not isinstance(messages, list | tuple):
        raise DataError(f"{where}: expected a list of messages, got {kind_of(messages)} (messages)")
    if not messages:
        raise DataError(f"{where}: empty conversation (messages)")
    before = None
    for index, message in enumerate(messages):
        before = _check_message(message, before, f"messages[{index}]", where)
    if before != "assistant":
        raise DataError(
            f"{where}: the conversation must end with the assistant, not with {before!r} "
            f"(messages[{len(messages) - 1}].role)"
        )


def _check_message(message: Any, before: str | None, field: str, where: str) -> str:
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: expected an object with role and content, got {kind_of(message)} ({field})")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where}: unknown role {shown(role)}{did_you_mean(str(role), ROLES)} ({field}.role)")
    if role not in _AFTER[before]:
        place = "first" if before is None else f"after {before!r}"
        raise DataError(f"{where}: role {role!r} cannot come {place} ({field}.role)")
    if len(message) > 2 or "content" not in message:
        _check_more(message, field, where)
    content: Any = message.get("content")
    if role == "assistant" and message.get("tool_calls"):
        if content is not None:
            check_text(content, f"{field}.content", where)
        return role
    if "content" not in message:
        raise DataError(f"{where}: missing ({field}.content)")
    check_text(content, f"{field}.content", where)
    if role == "assistant" and not content.strip():
        raise DataError(f"{where}: empty answer, nothing to learn from ({field}.content)")
    return role


def _check_more(message: Mapping[str, Any], field: str, where: str) -> None:
    """Check what a message may have besides role and content."""
    weight, train = message.get("weight", 1), message.get("train", True)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"{where}: weight must be 0 (not learned) or 1, got {shown(weight)} ({field}.weight)")
    if not isinstance(train, bool):
        raise DataError(f"{where}: train must be true or false, got {shown(train)} ({field}.train)")
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list | tuple):
        raise DataError(f"{where}: expected a list of calls, got {kind_of(calls)} ({field}.tool_calls)")
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{where}: expected an object with function.name and function.arguments ({field}.tool_calls[{number}])"
            )
    check_strings(message, field, where)


def check_tools(tools: Any, where: str) -> None:
    """Raise DataError unless `tools` is a list of objects, each describing a tool."""
    if not isinstance(tools, list | tuple):
        raise DataError(f"{where}: expected a list of tools, got {kind_of(tools)} (tools)")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise DataError(f"{where}: expected an object that describes a tool, got {kind_of(tool)} (tools[{index}])")
    check_strings(tools, "tools", where)


def check_text(value: Any, field: str, where: str) -> None:
    """Raise DataError unless `value` is text that can be encoded."""
    if type(value) is str and value.isascii():
        return
    if value is None:
        raise DataError(f"{where}: null where text is required ({field})")
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text, got {kind_of(value)} {shown(value)} ({field})")
    if not is_unicode(value):
        raise DataError(f"{where}: half of a surrogate pair, which no text can hold ({field})")


def check_strings(value: Any, field: str, where: str) -> None:
    """Raise DataError if any text within `value`, keys included, cannot be encoded."""
    if isinstance(value, str):
        check_text(value, field, where)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_text(key, field, where)
            check_strings(item, field, where)
    elif isinstance(value, Sequence):
        for item in value:
            check_strings(item, field, where)


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: JSON's escapes can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON."""
    if value is None:
        return "null"
    names = {
        bool: "boolean",
        int: "number",
        float: "number",
        str: "text",
        list: "list",
        tuple: "list",
        dict: "object",
    }
    return names.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """A value for an error, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
