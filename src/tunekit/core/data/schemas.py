"""The row formats tunekit knows, and how each becomes an example the codec encodes.

| schema | columns | known from |
|---|---|---|
| messages | messages: [{role, content}], optionally tools | OpenAI |
| conversations | conversations: [{from, value}], optionally system, tools | ShareGPT |
| preference | chosen, rejected, optionally prompt | TRL, HH-RLHF |
| prompt-completion | prompt, completion: texts or lists of messages, optionally tools | TRL |
| instruction | instruction, output, optionally input | Alpaca |
| instruction-response | instruction, response, optionally context | Dolly |
| question-answer | question, answer | GSM8K |
| text-label | text, label: a name, or a number with `labels` | classification |
| text | text | continued pretraining |

They are recognised in this order, by the columns that are not optional.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import attrs

from tunekit.core.data import converters, inverses
from tunekit.core.data.preferences import to_preference
from tunekit.core.fields import did_you_mean
from tunekit.errors import ConfigError, DataError

SchemaName = Literal[
    "messages",
    "conversations",
    "preference",
    "prompt-completion",
    "instruction",
    "instruction-response",
    "question-answer",
    "text-label",
    "text",
]


@attrs.frozen
class Schema:
    """A row format.

    Args:
        required: the columns it needs.
        optional: those it knows besides.
        convert: a row, its place and label names to an example; DataError if it is wrong, KeyError if a required column
            is not there.
        invert: an example to a row that `convert` turns into it; DataError if the format cannot hold it.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Mapping[str, Any], str, Sequence[str]], dict[str, Any]]
    invert: Callable[[Mapping[str, Any]], dict[str, Any]]


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
    columns = [repr(column) for column in row]
    found = ", ".join(columns[:20]) + (", ..." if len(columns) > 20 else "")
    raise DataError(
        f"{where}: no known schema has the columns {found or '(none)'}; known: {known}. "
        "Map yours with columns={'prompt': 'your column', ...}"
    )


def to_example(
    row: Mapping[str, Any],
    schema: SchemaName,
    where: str = "the row",
    columns: Mapping[str, str] | None = None,
    labels: Sequence[str] = (),
) -> dict[str, Any]:
    """Check one row against a schema and turn it into an example.

    An example is `{"messages": [...]}` (with `tools` where there are any), `{"text": ...}`, or a preference,
    `{"prompt": [...], "chosen": [...], "rejected": [...]}`, each a list of messages.

    Args:
        row: the row as it was read.
        schema: the name of its schema.
        where: its place, as `file:line`, for errors.
        columns: for each of the schema's columns that is named otherwise in the data, that other name.
        labels: names of the labels 0, 1, ... of the schema "text-label".

    Raises:
        DataError: as `file:line: reason (field)`.
    """
    if columns:
        row = rename(row, columns, where)
    form = SCHEMAS[schema]
    try:
        return form.convert(row, where, labels)
    except KeyError:
        # Not asked beforehand: this is for every row, and a sound row has its columns.
        for column in form.required:
            if column not in row:
                raise DataError(f"{where}: missing ({column})") from None
        raise


def from_example(example: Mapping[str, Any], schema: SchemaName) -> dict[str, Any]:
    """A row of `schema` that `to_example` turns into `example`: the way to write data in another format.

    Raises:
        ConfigError: there is no such schema.
        DataError: the schema cannot hold the example; nothing is left out to make it fit.
    """
    if schema not in SCHEMAS:
        raise ConfigError(f"there is no schema {schema!r}{did_you_mean(schema, get_args(SchemaName))}")
    return SCHEMAS[schema].invert(example)


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


SCHEMAS: Mapping[SchemaName, Schema] = {
    "messages": Schema(("messages",), ("tools",), converters.from_messages, inverses.to_messages),
    "conversations": Schema(
        ("conversations",), ("system", "tools"), converters.from_conversations, inverses.to_conversations
    ),
    "preference": Schema(
        ("chosen", "rejected"),
        ("prompt",),
        lambda row, where, labels: to_preference(row, where),
        inverses.to_preference_row,
    ),
    "prompt-completion": Schema(("prompt", "completion"), ("tools",), converters.from_prompt, inverses.to_prompt),
    "instruction": Schema(("instruction", "output"), ("input",), converters.from_instruction, inverses.to_instruction),
    "instruction-response": Schema(
        ("instruction", "response"), ("context",), converters.from_context, inverses.to_context
    ),
    "question-answer": Schema(("question", "answer"), (), converters.from_question, inverses.to_question),
    "text-label": Schema(("text", "label"), (), converters.from_label, inverses.to_label),
    "text": Schema(("text",), (), converters.from_text, inverses.to_text),
}
"""Every schema by name, in the order in which they are recognised."""
