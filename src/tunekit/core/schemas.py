"""The row formats tunekit knows, and how each becomes an example the codec encodes.

| schema | columns |
|---|---|
| messages | messages: [{role, content}], optionally tools |
| prompt-completion | prompt, completion |
| instruction | instruction, output, optionally input |
| question-answer | question, answer |
| text | text |
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import attrs

from tunekit.core.fields import did_you_mean
from tunekit.errors import DataError

SchemaName = Literal["messages", "prompt-completion", "instruction", "question-answer", "text"]
ROLES = ("system", "user", "assistant", "tool")


@attrs.frozen
class Schema:
    """A row format: the columns it needs, those it knows besides, and the conversion of a checked row."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Mapping[str, Any]], dict[str, Any]]


def recognise(row: Mapping[str, Any], where: str) -> SchemaName:
    """The schema whose required columns `row` has; DataError, naming the columns found, if there is none."""
    for name, schema in SCHEMAS.items():
        if all(column in row for column in schema.required):
            return name
    # A row with half of a schema's columns is that schema with one missing, not an unknown one.
    for schema in SCHEMAS.values():
        missing = [column for column in schema.required if column not in row]
        if len(missing) < len(schema.required):
            raise DataError(f"{where}: missing ({missing[0]})")
    known = "; ".join(", ".join(schema.required) for schema in SCHEMAS.values())
    raise DataError(
        f"{where}: no known schema has the columns {', '.join(map(repr, row)) or '(none)'}; known: {known}. "
        "Map yours with columns={'prompt': 'your column', ...}"
    )


def to_example(
    row: Mapping[str, Any], schema: SchemaName, where: str, columns: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Check one row against a schema and turn it into `{"messages": [...]}` or `{"text": ...}`.

    Args:
        row: the row as it was read.
        schema: the name of its schema.
        where: its place, as `file:line`, for errors.
        columns: for each of the schema's columns that is named otherwise in the data, that other name.

    Raises:
        DataError: as `file:line: reason (field)`.
    """
    row = rename(row, columns, where)
    for column in SCHEMAS[schema].required:
        if column not in row:
            raise DataError(f"{where}: missing ({column})")
    if schema != "messages":
        for column in (*SCHEMAS[schema].required, *SCHEMAS[schema].optional):
            if column in row:
                _check_text(row[column], column, where)
    example = SCHEMAS[schema].convert(row)
    if "messages" in example:
        check_messages(example["messages"], where)
    elif not example["text"].strip():
        raise DataError(f"{where}: empty text (text)")
    return example


def rename(row: Mapping[str, Any], columns: Mapping[str, str] | None, where: str) -> Mapping[str, Any]:
    """`row` with the data's column names replaced by the schema's, as `columns` maps them."""
    if not columns:
        return row
    for theirs in columns.values():
        if theirs not in row:
            raise DataError(f"{where}: missing ({theirs}){did_you_mean(theirs, map(str, row))}")
    taken = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in taken and name not in columns}
    return {**kept, **{ours: row[theirs] for ours, theirs in columns.items()}}


def check_messages(messages: Any, where: str) -> None:
    """Raise DataError unless `messages` is a conversation to train on: roles in order, answered at the end."""
    if not isinstance(messages, list | tuple):
        raise DataError(f"{where}: expected a list of messages, got {_kind(messages)} (messages)")
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
        raise DataError(f"{where}: expected an object with role and content, got {_kind(message)} ({field})")
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"{where}: unknown role {role!r}{did_you_mean(str(role), ROLES)} ({field}.role)")
    follows = {
        "system": (None,),
        "user": (None, "system", "assistant"),
        "assistant": ("user", "tool"),
        "tool": ("assistant", "tool"),
    }
    if before not in follows[role]:
        place = "first" if before is None else f"after {before!r}"
        raise DataError(f"{where}: role {role!r} cannot come {place} ({field}.role)")
    content: Any = message.get("content")
    if role == "assistant" and message.get("tool_calls"):
        if content is not None:
            _check_text(content, f"{field}.content", where)
        return str(role)
    if "content" not in message:
        raise DataError(f"{where}: missing ({field}.content)")
    _check_text(content, f"{field}.content", where)
    if role == "assistant" and not content.strip():
        raise DataError(f"{where}: empty answer, nothing to learn from ({field}.content)")
    return str(role)


def _check_text(value: Any, field: str, where: str) -> None:
    if value is None:
        raise DataError(f"{where}: null where text is required ({field})")
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text, got {_kind(value)} {value!r} ({field})")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: half of a surrogate pair, which no text can hold ({field})") from None


def _kind(value: Any) -> str:
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


def _from_messages(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("messages", "tools") if row.get(key) is not None or key == "messages"}


def _dialogue(prompt: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def _from_instruction(row: Mapping[str, Any]) -> dict[str, Any]:
    parts = [row["instruction"], row.get("input", "")]
    return _dialogue("\n\n".join(part for part in parts if part.strip()), row["output"])


SCHEMAS: Mapping[SchemaName, Schema] = {
    "messages": Schema(("messages",), ("tools",), _from_messages),
    "prompt-completion": Schema(("prompt", "completion"), (), lambda row: _dialogue(row["prompt"], row["completion"])),
    "instruction": Schema(("instruction", "output"), ("input",), _from_instruction),
    "question-answer": Schema(("question", "answer"), (), lambda row: _dialogue(row["question"], row["answer"])),
    "text": Schema(("text",), (), lambda row: {"text": row["text"]}),
}
"""Every schema by name, in the order in which they are recognised."""
